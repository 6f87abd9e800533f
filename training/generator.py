"""Text -> pictures: captions are encoded, latents are sampled, the autoencoder decodes them.

A model is a fold over stages: a prior draws the embedding of the picture that is to come, the base
draws latents or a picture, and what follows enlarges it. Each may be missing, and each stage is
told the captions, and what the stage before it drew. Without a base the autoencoder is all there
is: its latents are drawn from the prior that its divergence holds them to, N(0, I), and captions
say nothing (VAE, Kingma & Welling 2014).

A generator is one directory: generator.json and a folder for each stage, JSON and safetensors only.
Picture i is a function of its own prompt and seed: its noise comes from (seed, "sample"), and its
words are padded to a length that no neighbour changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.schema import PICTURE_EMBEDDING

from .accelerators import native_precision
from .diffusion import Cond, SamplerConfig, classifier, normal
from .diffusion.guidance import Guide, clip_log_prob, reconstruction
from .diffusion.samplers import slerp
from .request import (
    Embeddings,
    Known,
    Labels,
    Maps,
    Pictures,
    Request,
    at_once,
    check_labels,
    check_low,
    check_map,
)
from .stage import to_tensors

GENERATOR = "generator.json"
FORMAT = 1
PRIOR, BASE, ENLARGING = "prior", "base", ("sr1", "sr2")
DENOISING = (PRIOR, BASE, *ENLARGING)
"""The stages that draw, in their order."""


@dataclass(frozen=True, kw_only=True)
class BaseSampler(SamplerConfig):
    """How the base draws."""

    level: float = 0.0
    """Where a picture is enlarged: how strongly it is damaged first, in the units of
    LowConfig.strongest (CDM and Imagen sweep it)."""

    def __post_init__(self):
        super().__post_init__()
        if not self.level >= 0:
            raise ValueError(f"level: got {self.level}, wanted at least 0")

    def check_threshold(self, data: str, where: str = "threshold") -> None:
        """ValueError where estimates are bound that are no pictures; `data` is the stage's."""
        if self.threshold != "none" and data != "pixels":
            drawn = {"moments": "latents", "embedding": "embeddings"}[data]
            raise ValueError(
                f"{where}: got {self.threshold!r}, which bounds pictures to [-1, 1], and {drawn} "
                "are drawn here; set it to 'none'"
            )


@dataclass(frozen=True, kw_only=True)
class StageSampler(BaseSampler):
    """How a stage before or after the base draws."""

    candidates: int = 1
    """Of a prior: embeddings that are drawn, the one nearest to the caption's is taken (unCLIP:
    2)."""

    def __post_init__(self):
        super().__post_init__()
        if self.candidates < 1:
            raise ValueError(f"candidates: got {self.candidates}, wanted at least 1")


@dataclass(frozen=True)
class Generator:
    """generator(prompts) -> pictures. Make one by `load`."""

    base: Any
    """The base stage: network, diffusion, and the latents' shift, scale and shape; None where an
    autoencoder draws alone."""
    codec: Any
    """The autoencoder, encode and decode; None where the base draws pixels."""
    encoders: Mapping[str, Any]
    """The text encoders, by the names of the base's contexts."""
    sampler: BaseSampler
    resolution: int
    """Side of the pictures in pixels."""
    precision: str
    classifier: Any = None
    """The classifier stage, for classifier guidance; None without one."""
    clip: Path | None = None
    """Folder of a CLIP's two towers, ours or pretrained, for CLIP guidance and embeddings of
    pictures; None without one."""
    noisy_clip: Any = None
    """The noise-aware CLIP stage, which guides in that one's place; None without one."""
    prior: Any = None
    """The stage that draws embeddings of pictures from captions; None where the base needs none."""
    enlarging: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The stages that follow the base, by name, in their order."""
    samplers: Mapping[str, StageSampler] = field(default_factory=dict[str, StageSampler])
    """Of the prior and the enlarging stages."""
    editor: Any = None
    """The edit stage; None without one."""
    latent_shape: tuple[int, ...] = ()
    """Of what the base draws, or of the autoencoder's latents: channel, height, width."""

    @classmethod
    def load(
        cls,
        directory: str | Path,
        device: torch.device | str | None = None,
        precision: str | None = None,
    ) -> Generator:
        """The generator that `assemble` wrote, on a GPU where there is one.

        `precision` is "bf16" or "fp32"; by default bf16 (about 0.5 % off in a network call) where
        the device computes in it. ValueError when the directory holds no generator.
        """
        from .assembling import open_stages
        from .stages import reconstruct

        path = Path(directory, GENERATOR)
        if not path.is_file():
            raise ValueError(f"{directory}: no generator ({GENERATOR} is missing)")
        described = json.loads(path.read_text())
        if described.get("format") != FORMAT:
            raise ValueError(
                f"{path}: format {described.get('format')}, this version reads {FORMAT}"
            )
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        sampler = reconstruct(BaseSampler, described["defaults"], "defaults")
        samplers = stage_samplers(described.get("samplers", {}))
        sources = {name: Path(directory, name) for name in described["stages"]}
        shape = tuple(described.get("latent_shape", ()))
        return open_stages(
            sources, sampler, samplers, device, precision or native_precision(device), shape
        )

    @property
    def defaults(self) -> dict[str, Any]:
        """What a call that names nothing uses: the fields of BaseSampler."""
        return asdict(self.sampler)

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        guidance: float | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] = 0,
        sampler: str | None = None,
        labels: Labels | None = None,
        low: Pictures | None = None,
        map: Maps | None = None,
        classifier_guidance: float = 0.0,
        clip_guidance: float = 0.0,
        known: Known | None = None,
        embeddings: Embeddings | Literal["prior", "text", "none"] = "prior",
        **options: Any,
    ) -> Pictures:
        """Pictures uint8 [n, H, W, 3], one for each prompt; with an integer seed, i has seed + i.

        `negative` is what guidance leads away from: one text, or one for each prompt. `sampler` is
        a kind of SamplerConfig, `options` are any other fields of it (guidance_interval, eta, ...),
        and those of another stage's StageSampler by its name (`**{"sr1.level": 0.2}`). What is left
        out is the generator's default. An empty text is no caption at all.

        A stage that is told classes reads them from `labels`, one mapping of attributes to answers
        a prompt; without them it draws of any class. A base that enlarges pictures (SR3, Saharia et
        al. 2021) needs `low`: one for each prompt, `low_side` pixels a side, damaged first by the
        option `level`. One that draws by label maps (LDM, Rombach et al. 2022, section 4.3.2)
        needs `map`: for each prompt the index in `map_classes` of every pixel of the picture.

        `classifier_guidance` is the scale of log p(labels | x_t) by the classifier stage;
        `clip_guidance` that of the noise-aware CLIP, or else of the CLIP that the stages hear,
        which judges the estimate of the picture. Both come on top of `guidance`: 0 there leaves the
        captions to them. `known` is what the pictures must agree with, one for each prompt:
        inpainting and super-resolution by conditioning alone (PiGDM, Song et al. 2023).
        `embeddings` are what unCLIP's decoder is told of the pictures: what its
        prior draws, one given for each prompt, the caption's own in the same space ("text"), or
        nothing. ValueError where the generator lacks what they need.
        """
        chosen = {"guidance": guidance, "steps": steps, "kind": sampler, **options}
        guides = [
            *self._classifier_guide(prompts, labels, classifier_guidance),
            *self._clip_guide(prompts, clip_guidance),
            *self._known_guide(prompts, known),
        ]
        asked = Request.of(prompts, negative, seed, labels, low, embeddings, map)
        self._check(asked)
        pictures = [
            list(self._stages(asked.rows(rows), chosen, [make(rows) for make in guides]))[-1][1]
            for rows in asked.batches(self.resolution)
        ]
        shape = (0, self.resolution, self.resolution, 3)
        return np.concatenate(pictures) if pictures else np.zeros(shape, np.uint8)

    def stages(
        self,
        prompts: Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        labels: Labels | None = None,
        low: Pictures | None = None,
        map: Maps | None = None,
        embeddings: Embeddings | Literal["prior", "text", "none"] = "prior",
        **options: Any,
    ) -> dict[str, Pictures]:
        """What each stage that draws pictures drew, by its name, the last of them what a call
        returns; `options` are fields of BaseSampler, as there."""
        asked = Request.of(prompts, negative, seed, labels, low, embeddings, map)
        self._check(asked)
        parts = [
            dict(self._stages(asked.rows(rows), options)) for rows in asked.batches(self.resolution)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @torch.no_grad()
    def encode(self, pictures: Pictures) -> Float[Tensor, "picture channel height width"]:
        """What the autoencoder makes of pictures, the mean where it makes a Gaussian: latents
        neither shifted nor scaled. ValueError without an autoencoder."""
        if self.codec is None:
            raise ValueError("encode: this generator draws pixels and has no autoencoder")
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        parts = x.split(at_once(max(x.shape[-2:])))
        made = [self.codec.encode(part.to(self._device)) for part in parts]
        return torch.cat(made)[:, : self.latent_shape[0]].float()

    @torch.no_grad()
    def decode(self, z: Float[Tensor, "picture channel height width"]) -> Pictures:
        """Pictures of what `encode` makes."""
        if self.codec is None:
            raise ValueError("decode: this generator draws pixels and has no autoencoder")
        side = self.resolution * max(z.shape[-2:]) // self.latent_shape[-1]
        return np.concatenate([_numpy(self.codec.decode(it)) for it in z.split(at_once(side))])

    def mapped(self, pictures: Pictures) -> Maps:
        """The label maps of pictures, by what made those of the training. ValueError for a
        generator that is told none."""
        mapper = None if self.base is None else self.base.mapper
        if mapper is None:
            raise ValueError("mapped: this generator is told no label maps")
        found = [np.zeros((0, *pictures.shape[1:3]), np.uint8)]
        rows = at_once(max(pictures.shape[1:3]))
        for start in range(0, len(pictures), rows):
            x = torch.from_numpy(np.ascontiguousarray(pictures[start : start + rows]))
            maps = mapper(x.permute(0, 3, 1, 2).to(self._device))
            found.append(maps.to(torch.uint8).cpu().numpy())
        return np.concatenate(found)

    def embed(self, pictures: Pictures) -> Embeddings:
        """The embeddings of square pictures. ValueError without a CLIP."""
        if self.clip is None:
            raise ValueError("embed: this generator has no CLIP")
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2)
        return self._judge.images(x.to(self._device))

    def embed_texts(self, texts: Sequence[str]) -> Embeddings:
        """The embeddings of captions, in the space of those of pictures."""
        if "clip" not in self.encoders:
            raise ValueError("embed_texts: this generator has no CLIP")
        pooled = torch.from_numpy(self.encoders["clip"](texts)[1]).to(self._device)
        return normalize(pooled.float(), dim=1)

    @torch.no_grad()
    def between(
        self,
        prompt: str,
        seeds: tuple[int, int],
        shares: Sequence[float],
        *,
        label: Mapping[str, str] | None = None,
        low: UInt8[np.ndarray, "side side 3"] | None = None,
        map: UInt8[np.ndarray, "height width"] | None = None,
        **options: Any,
    ) -> Pictures:
        """Pictures of one prompt from noise between that of two seeds, on the sphere: share 0 is
        the first seed's picture (DDIM, Song et al. 2021, sec. 5.3). `label`, `low` and `map` are
        those of one prompt of a call; `options` are fields of BaseSampler, without which the
        sampler is deterministic.
        """
        first, last = (self._drawn(self.latent_shape, [seed], "sample") for seed in seeds)
        eps = torch.cat([slerp(first, last, share) for share in shares])
        # All else, as what the prior or the enlarging stages draw, is the first seed's.
        count = len(shares)
        asked = Request.of(
            [prompt] * count,
            None,
            [seeds[0]] * count,
            None if label is None else [label] * count,
            None if low is None else np.stack([low] * count),
            map=None if map is None else np.stack([map] * count),
        )
        self._check(asked)
        chosen = {"kind": "ddim", "eta": 0.0, "corrections": 0, **options}
        drawn = [
            list(self._stages(asked.rows(rows), chosen, eps=eps[rows]))[-1][1]
            for rows in asked.batches(self.resolution)
        ]
        return np.concatenate(drawn)

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        labels: Labels | None = None,
        low: Pictures | None = None,
        map: Maps | None = None,
        embeddings: Embeddings | Literal["prior", "text", "none"] = "prior",
        **options: Any,
    ) -> Float[Tensor, "picture channel height width"]:
        """What a call decodes, still shifted and scaled; `options` are fields of BaseSampler."""
        asked = Request.of(prompts, negative, seed, labels, low, embeddings, map)
        self._check(asked)
        sampler, samplers = self._samplers(options)
        return torch.cat(
            [
                self._latents(part, told, self._embeddings(part, told, samplers), sampler)
                for rows in asked.batches(self.resolution)
                for part in [asked.rows(rows)]
                for told in [self._read(part)]
            ]
        )

    @torch.no_grad()
    def edit(self, pictures: Pictures, *, edited: bool = True, **options: Any) -> Pictures:
        """Pictures uint8 [n, side, side, 3] with what the edit stage was trained to put in
        another's place (DiffusionCLIP, Kim et al. 2022); nothing is drawn by chance.

        With `edited` False they are only taken to noise and back: what the way itself costs.
        `options` are `noise`, `inversion_steps` and `steps` of EditStageConfig; what is left out
        is as it was trained. ValueError without an edit stage, for pictures of another size than
        the base's, and for other options.
        """
        from .autoencoding import to_bytes

        if self.editor is None:
            raise ValueError("edit: this generator has no edit stage; add `edit` to its recipe")
        if not isinstance(edited, bool):
            raise ValueError(f"edited: got {edited!r}, wanted True or False")
        way = self.editor.way(options)
        side = self.latent_shape[-1]
        wanted = (side, side, 3)
        if pictures.dtype != np.uint8 or pictures.shape[1:] != wanted:
            raise ValueError(
                f"edit: got pictures {pictures.dtype} {pictures.shape}, wanted uint8 [n, "
                f"{', '.join(map(str, wanted))}]"
            )
        drawn = [np.zeros((0, *wanted), np.uint8)]
        rows = at_once(side)
        for start in range(0, len(pictures), rows):
            x = torch.from_numpy(pictures[start : start + rows]).to(self._device)
            noised = self.editor.noised(self.base.model, x.permute(0, 3, 1, 2) / 127.5 - 1, way)
            by = self.editor.model if edited else self.base.model
            drawn.append(_numpy(to_bytes(self.editor.drawn(noised, by, way))))
        return np.concatenate(drawn)

    @torch.no_grad()
    def denoising_loss(
        self, batch: Mapping[str, Any], seed: int = 0
    ) -> Float[np.ndarray, " sample"] | None:
        """The base's loss for each row of a loader's batch, with fixed (latent, time, noise); None
        without a base.

        In fp32 whatever the precision: it is compared between models to the fourth digit.
        """
        if self.base is None:
            return None
        return self.base.heldout_loss(to_tensors(batch, self._device), seed).cpu().numpy()

    def bits_per_dim(
        self, batch: Mapping[str, Any], seed: int = 0
    ) -> Float[np.ndarray, " sample"] | None:
        """-log2 p(picture | caption) per byte for each row of a loader's batch; None for a model of
        latents or a cascade, which has no such density."""
        if self.codec is not None or self.enlarging or self.prior:
            return None
        return self.base.bits_per_dim(to_tensors(batch, self._device), seed).cpu().numpy()

    @cached_property
    def _judge(self) -> Any:
        """The CLIP with both towers."""
        from .encoders.clip import open_judge
        from .encoders.sources import open_source

        assert self.clip is not None
        return open_judge(open_source(self.clip, "clip"), self._device)

    @property
    def networks(self) -> list[torch.nn.Module]:
        """Of the stages that draw, in their order."""
        return [stage.network for stage in self._drawing]

    @property
    def _drawing(self) -> list[Any]:
        before = [it for it in (self.prior, self.base) if it is not None]
        return [*before, *self.enlarging.values()]

    @property
    def reads_labels(self) -> bool:
        """Whether stages are told classes, which a call gives as `labels`."""
        return any(stage.config.attributes for stage in self._drawing)

    @property
    def reads_text(self) -> bool:
        """Whether stages are told captions."""
        return bool(self.encoders)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Attribute -> answers, of the stages that are told classes."""
        return _answers(self._drawing)

    @property
    def answers(self) -> dict[str, tuple[str, ...]]:
        """All that `labels` may say: to these stages, and to the classifier."""
        return _answers([*self._drawing, *([self.classifier] if self.classifier else [])])

    @property
    def given(self) -> dict[str, Any]:
        """What a call gives beside prompts, for those who only read of the generator: "labels"
        (attribute -> answers), "low" (side in pixels) and "map" (its "classes" by index, its "side"
        in pixels), where stages are told them, "edit" (the "side" of pictures that `edit` takes,
        and that their "source" becomes the "target"), and then "text", whether prompts are heard as
        well; {} where they are all there is."""
        labels = {"labels": {name: list(it) for name, it in self.classes.items()}}
        low = {"low": self.low_side}
        maps = {"map": {"classes": list(self.map_classes), "side": self.resolution}}
        found: dict[str, Any] = labels if self.reads_labels else {}
        found |= low if self.low_side else {}
        found |= maps if self.map_classes else {}
        if self.editor is not None:
            config, side = self.editor.config, self.latent_shape[-1]
            found["edit"] = {"side": side, "source": config.source, "target": config.target}
        return {**found, "text": self.reads_text} if found else {}

    @property
    def low_side(self) -> int:
        """Of the pictures that a call gives as `low`, in pixels; 0 where the base enlarges none."""
        low = None if self.base is None else self.base.config.low
        return low.side if low else 0

    @property
    def map_classes(self) -> tuple[str, ...]:
        """Of the label maps that a call gives as `map`, which have the side of the pictures; none
        where the base is told no maps."""
        config = None if self.base is None else self.base.config.map
        return config.names if config else ()

    @property
    def map_colours(self) -> UInt8[np.ndarray, "class 3"]:
        """In which the classes of maps are shown. ValueError where there are none."""
        if not self.map_classes:
            raise ValueError("map_colours: this generator is told no label maps")
        return self.base.config.map.colours

    @property
    def map_judge(self) -> tuple[str, str]:
        """What makes the maps of pictures: its name, and a digest of it."""
        config = self.base.config.map
        name = f"segmenter {config.segmenter}" if config.segmenter else "the model's palette"
        return name, self.base.mapper.digest

    @property
    def _device(self) -> torch.device:
        drawing = self.codec if self.base is None else self.base
        return next(drawing.parameters()).device

    def _samplers(
        self, chosen: Mapping[str, Any]
    ) -> tuple[BaseSampler, Mapping[str, StageSampler]]:
        """(the base's sampler, those of the others), with what a call chose."""
        chosen = {name: value for name, value in chosen.items() if value is not None}
        mine = {name: chosen.pop(name) for name in [*chosen] if "." not in name}
        samplers = dict(self.samplers)
        for name, value in chosen.items():
            stage, _, key = name.partition(".")
            if stage not in samplers:
                has = ", ".join(samplers) or "none beside the base"
                raise ValueError(f"{name}: no stage {stage!r} that draws; this generator has {has}")
            samplers[stage] = _replaced(samplers[stage], {key: value}, stage)
        sampler = _replaced(self.sampler, mine)
        check_samplers(self.base, sampler, self.enlarging, samplers)
        return sampler, samplers

    def _check(self, asked: Request) -> None:
        """ValueError where the stages cannot be told what is asked."""
        count = len(asked.prompts)
        together = [[it.name for it in stage.config.attributes] for stage in self._drawing]
        check_labels(asked.labels, self.answers, together)
        check_map(asked.map, count, self.map_classes, self.resolution)
        check_low(asked.low, count, self.low_side)

    @torch.no_grad()
    def _stages(
        self,
        asked: Request,
        chosen: Mapping[str, Any],
        guides: Sequence[Guide] = (),
        eps: Tensor | None = None,
    ) -> Iterator[tuple[str, Pictures]]:
        """(name, its pictures) of each stage that draws pictures."""
        from .autoencoding import to_bytes, to_unit

        sampler, samplers = self._samplers(chosen)
        told = self._read(asked)
        z = self._embeddings(asked, told, samplers)
        x = self._latents(asked, told, z, sampler, guides, eps)
        pixels = to_bytes(x) if self.codec is None else self.codec.decode(self._unscaled(x))
        yield BASE, _numpy(pixels)
        x = x.clamp(-1, 1) if self.codec is None else to_unit(pixels)
        for name, stage in self.enlarging.items():
            more = self._more(stage, asked, z)
            more |= self._damaged(name, stage, asked, x, samplers[name].level)
            x = self._sampled(name, stage, asked, told, samplers[name], more).clamp(-1, 1)
            yield name, _numpy(to_bytes(x))

    def _latents(
        self,
        asked: Request,
        told: _Told,
        z: Embeddings | None,
        sampler: BaseSampler,
        guides: Sequence[Guide] = (),
        eps: Tensor | None = None,
    ) -> Tensor:
        """What the base draws, or the autoencoder's prior."""
        from .autoencoding import to_unit

        if self.base is None:
            return self._drawn(self.latent_shape, asked.seeds, "sample") if eps is None else eps
        more = self._more(self.base, asked, z)
        if asked.low is not None:
            small = torch.from_numpy(np.ascontiguousarray(asked.low)).permute(0, 3, 1, 2)
            small = to_unit(small.to(self._device))
            more |= self._damaged(BASE, self.base, asked, small, sampler.level)
        if asked.map is not None:
            maps = torch.from_numpy(np.ascontiguousarray(asked.map)).to(self._device).long()
            more = self.base.with_map(more, maps, self.base.latent_shape.tolist()[-1])
        return self._sampled(BASE, self.base, asked, told, sampler, more, guides, eps)

    def _unscaled(self, x: Tensor) -> Tensor:
        """Latents as the autoencoder knows them."""
        return x if self.base is None else self.base.unscaled(x)

    def _damaged(
        self, name: str, stage: Any, asked: Request, small: Tensor, level: float
    ) -> dict[str, Tensor]:
        """What a stage is told of the pictures that it enlarges."""
        strength = torch.full((len(small),), level, device=small.device)
        noise = self._drawn(small.shape[1:], asked.seeds, f"{name}/level")
        side = stage.latent_shape.tolist()[-1]
        return stage.config.low.told(small, strength, stage.model, noise, side)

    def _more(self, stage: Any, asked: Request, z: Embeddings | None) -> dict[str, Tensor]:
        """What a stage is told beside the texts: its classes, the embedding of what is drawn."""
        more: dict[str, Tensor] = {}
        if stage.config.attributes:
            labels = asked.labels or [None] * len(asked.prompts)
            more["y"] = stage.classes(labels, self._device)
        if z is not None and stage.config.hears_embedding:
            more[f"{PICTURE_EMBEDDING}_pooled"] = z
        return more

    def _embeddings(
        self, asked: Request, told: _Told, samplers: Mapping[str, StageSampler]
    ) -> Embeddings | None:
        """What stages are told of the pictures to come; None where they are told nothing."""
        wanted = asked.embeddings
        if not any(stage.config.hears_embedding for stage in self._drawing):
            if not isinstance(wanted, str) or wanted == "text":
                raise ValueError("embeddings: no stage of this generator is told any")
            return None
        if isinstance(wanted, Tensor):
            return wanted.to(self._device)
        if wanted == "text":
            return self.embed_texts(asked.prompts)
        if wanted == "none" or self.prior is None:
            return None
        sampler = samplers[PRIOR]
        drawn = [
            self.prior.unscaled(
                self._sampled(
                    f"{PRIOR}/candidate{k}" if k else PRIOR,
                    self.prior,
                    asked,
                    told,
                    sampler,
                    self._more(self.prior, asked, None),
                )
            )
            for k in range(sampler.candidates)
        ]
        if len(drawn) == 1:
            return drawn[0]
        texts = normalize(told.texts["clip_pooled"].float(), dim=1)
        near = torch.stack([(z * texts).sum(1) for z in drawn]).argmax(0)
        return torch.stack(drawn)[near, torch.arange(len(near), device=near.device)]

    def _classifier_guide(
        self, prompts: Sequence[str], labels: Labels | None, scale: float
    ) -> list[Callable[[slice], Guide]]:
        if not scale:
            return []
        if self.classifier is None or self.codec is not None:
            raise ValueError(
                "classifier_guidance needs a base of pixels and a classifier stage: "
                + ("this generator draws latents" if self.classifier else "it has none")
            )
        if labels is None or len(labels) != len(prompts):
            raise ValueError(
                f"classifier_guidance needs labels, one for each of {len(prompts)} prompts, got "
                f"{'none' if labels is None else len(labels)}"
            )
        path = self.base.config.diffusion.build_path()
        return [lambda rows: classifier(path, self.classifier.log_prob(labels[rows]), scale)]

    def _clip_guide(self, prompts: Sequence[str], scale: float) -> list[Callable[[slice], Guide]]:
        if not scale:
            return []
        if (self.clip is None and self.noisy_clip is None) or self.codec is not None:
            raise ValueError(
                "clip_guidance needs a base of pixels and a CLIP: "
                + ("this generator draws latents" if self.codec else "this generator has none")
            )
        path = self.base.config.diffusion.build_path()
        if (noisy := self.noisy_clip) is not None:
            return [lambda rows: classifier(path, noisy.log_prob(prompts[rows]), scale)]
        judge = self._judge

        def guide(rows: slice) -> Guide:
            log_prob = clip_log_prob(
                lambda x0, t: judge.features(x0), judge.texts(prompts[rows]), judge.temperature
            )
            return reconstruction(path, log_prob, scale)

        return [guide]

    def _known_guide(
        self, prompts: Sequence[str], known: Known | None
    ) -> list[Callable[[slice], Guide]]:
        if known is None:
            return []
        if self.codec is not None:
            raise ValueError("known: needs a base of pixels, and this generator draws latents")
        side = self.latent_shape[-1] // known.factor
        wanted = (len(prompts), side, side, 3)
        masked = wanted[:3] if known.mask is None else known.mask.shape
        if known.pictures.shape != wanted or masked != wanted[:3]:
            raise ValueError(
                f"known: got pictures {known.pictures.shape} and a mask {masked}, wanted {wanted} "
                f"and {wanted[:3]}"
            )
        path = self.base.config.diffusion.build_path()
        return [lambda rows: known.guide(rows, path, self._device)]

    def cond(self, texts: Sequence[str], stage: Any = None) -> Cond:
        """What a stage's network (the base's) is told by these texts; a blank one is the null
        condition."""
        return _cond(stage or self.base, self._encoded(texts))

    def _encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The fields of all text encoders, and "said": which texts are not blank."""
        fields = {"said": torch.tensor([bool(text.strip()) for text in texts], device=self._device)}
        for name, encoder in self.encoders.items():
            tokens, pooled = encoder(texts)
            padded = np.zeros((len(tokens), encoder.limit, tokens[0].shape[1]), np.float32)
            mask = np.zeros(padded.shape[:2], bool)
            for row, found in enumerate(tokens):
                padded[row, : len(found)], mask[row, : len(found)] = found, True
            fields |= to_tensors(
                {f"{name}_tokens": padded, f"{name}_mask": mask, f"{name}_pooled": pooled},
                self._device,
            )
        return fields

    def _read(self, asked: Request) -> _Told:
        negatives = asked.negatives
        return _Told(
            self._encoded(asked.prompts), None if negatives is None else self._encoded(negatives)
        )

    def _sampled(
        self,
        name: str,
        stage: Any,
        asked: Request,
        told: _Told,
        sampler: SamplerConfig,
        more: Mapping[str, Tensor] | None = None,
        guides: Sequence[Guide] = (),
        eps: Tensor | None = None,
    ) -> Tensor:
        """What a stage draws, told the texts and `more`. Guidance leads away from `against`, or
        from no caption; from no map as well where that was learnt."""
        purpose = "sample" if name == BASE else f"sample/{name}"
        shape = stage.latent_shape.tolist()
        calls = iter(range(1 << 62))

        def network(x: Tensor, label: Tensor, cond: Cond) -> Tensor:
            # Autocast around the network alone: the sampler's arithmetic stays in float32.
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return stage.network(x, label, cond)

        cond = _cond(stage, told.texts, more)
        negative = None if told.against is None else _cond(stage, told.against, more, False)
        if stage.config.map and stage.config.map.dropout:
            silent = torch.zeros_like(cond["keep"])
            negative = stage.without_map(negative or {**cond, "keep": silent}, silent)
        return sampler.sample(
            stage.build_model(network),
            self._drawn(shape, asked.seeds, purpose) if eps is None else eps,
            cond,
            negative=negative,
            guides=guides,
            noise=lambda x: self._drawn(shape, asked.seeds, f"{purpose}/{next(calls)}").to(x),
        )

    def _drawn(self, shape: Sequence[int], seeds: Sequence[int], purpose: str) -> Tensor:
        """Standard normal noise of this shape, each row a function of its own seed."""
        shape = tuple(shape)
        origin = torch.zeros(1, dtype=torch.int64, device=self._device)
        return torch.cat([normal(seed, purpose, origin, shape) for seed in seeds])


@dataclass(frozen=True)
class _Told:
    """The encoded texts, and those that guidance leads away from."""

    texts: Mapping[str, Tensor]
    against: Mapping[str, Tensor] | None


def _cond(
    stage: Any,
    fields: Mapping[str, Tensor],
    more: Mapping[str, Tensor] | None = None,
    embedded: bool = True,
) -> Cond:
    """What a stage is told. Where it has a picture's embedding or a class, a blank text silences
    the text encoders alone; without `embedded` those are silent instead."""
    said = fields["said"]
    cond: dict[str, Tensor] = {"keep": said, **(more or {})}
    texts = stage.config.texts
    for name in texts:
        cond |= {
            key: fields[key] for key in (f"{name}_{it}" for it in ("tokens", "mask", "pooled"))
        }
    pictured = f"{PICTURE_EMBEDDING}_pooled" in cond
    if pictured or "y" in cond:
        cond |= {f"{name}_keep": said for name in texts}
        cond["keep"] = torch.ones_like(said) if embedded else said
    if pictured:
        cond[f"{PICTURE_EMBEDDING}_keep"] = torch.full_like(said, embedded)
    if "y" in cond and not embedded:
        cond["y"] = torch.full_like(cond["y"], stage.config.network.classes)
    return cond


def _answers(stages: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """Attribute -> its answers in all of these stages."""
    found: dict[str, tuple[str, ...]] = {}
    for stage in stages:
        for it in stage.config.attributes:
            found[it.name] = tuple(dict.fromkeys((*found.get(it.name, ()), *it.answers)))
    return found


def _replaced(sampler: Any, chosen: Mapping[str, Any], where: str = "") -> Any:
    from .stages import reconstruct

    if unknown := chosen.keys() - asdict(sampler).keys():
        raise ValueError(
            f"{where}{': ' if where else ''}a sampler has no {', '.join(sorted(unknown))}; "
            f"it has {', '.join(asdict(sampler))}"
        )
    return reconstruct(type(sampler), asdict(sampler) | dict(chosen), where or "sampler")


def check_samplers(
    base: Any,
    sampler: BaseSampler,
    enlarging: Mapping[str, Any],
    samplers: Mapping[str, StageSampler],
) -> None:
    """ValueError where stages do not draw as samplers say, which are a prior's too: what is damaged
    in another way than it was learnt, and bounds for what is no picture."""
    if base is not None:
        sampler.check_threshold(base.config.data)
    if PRIOR in samplers:
        samplers[PRIOR].check_threshold("embedding", f"{PRIOR}.threshold")
    low = None if base is None else base.config.low
    if low:
        low.check(sampler.level, "level")
    elif sampler.level:
        raise ValueError(f"level: got {sampler.level:g}, and the base enlarges no picture")
    for name, stage in enlarging.items():
        stage.config.low.check(samplers[name].level, f"{name}.level")


def _numpy(pixels: Tensor) -> Pictures:
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def stage_samplers(samplers: Mapping[str, Mapping[str, Any]]) -> dict[str, StageSampler]:
    """How the stages beside the base draw, from JSON."""
    from .stages import reconstruct

    return {name: reconstruct(StageSampler, dict(it), name) for name, it in samplers.items()}
