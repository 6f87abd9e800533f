"""Text -> pictures: captions are encoded, latents are sampled, the autoencoder decodes them.

A generator is one directory: generator.json and a folder for each stage, JSON and safetensors only.
Picture i is a function of its own prompt and seed: its noise comes from (seed, "sample"), and its
words are padded to a length that no neighbour changes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn.functional import avg_pool2d

from .diffusion import Cond, SamplerConfig, classifier, normal
from .diffusion.guidance import Guide, clip_log_prob, linear_inverse, reconstruction
from .diffusion.path import Path as NoisePath
from .diffusion.samplers import slerp
from .stage import to_tensors

GENERATOR, MODEL = "generator.json", "model"
FORMAT = 1
BATCH = 32
"""Pictures drawn at once: a bound on memory."""

Pictures = UInt8[np.ndarray, "picture height width 3"]


@dataclass(frozen=True)
class Known:
    """What is known of pictures before they are drawn: some of their pixels, or smaller copies."""

    pictures: Pictures
    """With a `factor`, of 1/factor the generator's side: each pixel is the mean of a square."""
    mask: Bool[np.ndarray, "picture height width"] | None = None
    """True where a pixel is known; None: everywhere."""
    factor: int = 1
    noise_std: float = 0.02
    """How exactly it is known, in units of half the pixels' range."""
    data_std: float = 0.5
    """Of all pixels, in the same units."""

    def guide(self, rows: slice, path: NoisePath, device: torch.device) -> Guide:
        measured = torch.from_numpy(self.pictures[rows]).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        known = torch.ones((), device=device)
        if self.mask is not None:
            known = torch.from_numpy(self.mask[rows]).to(measured)[:, None]

        def operator(x: Tensor) -> Tensor:
            return known * avg_pool2d(x, self.factor)

        return linear_inverse(
            path, operator, known * measured, self.noise_std,
            gram=self.factor**-2, data_std=self.data_std,
        )  # fmt: skip


@dataclass(frozen=True)
class Generator:
    """generator(prompts) -> pictures. Make one by `load`."""

    base: Any
    """The base stage: network, diffusion, and the latents' shift, scale and shape."""
    codec: Any
    """The autoencoder, encode and decode; None where the base draws pixels."""
    encoders: Mapping[str, Any]
    """The text encoders, by the names of the base's contexts."""
    sampler: SamplerConfig
    resolution: int
    """Side of the pictures in pixels."""
    precision: str
    classifier: Any = None
    """The classifier stage, for classifier guidance; None without one."""
    clip: Path | None = None
    """Folder of a CLIP stage with both towers, for CLIP guidance; None without one."""
    noisy_clip: Any = None
    """The noise-aware CLIP stage, which guides in that one's place; None without one."""
    editor: Any = None
    """The edit stage; None without one."""

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
        sampler = reconstruct(SamplerConfig, described["defaults"], "defaults")
        sources = {name: Path(directory, name) for name in described["stages"]}
        return _open(sources, sampler, device, precision or _precision(device))

    @property
    def defaults(self) -> dict[str, Any]:
        """What a call that names nothing uses: the fields of SamplerConfig."""
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
        labels: Sequence[Mapping[str, str]] | None = None,
        classifier_guidance: float = 0.0,
        clip_guidance: float = 0.0,
        known: Known | None = None,
        **options: Any,
    ) -> Pictures:
        """Pictures uint8 [n, H, W, 3], one for each prompt; with an integer seed, i has seed + i.

        `negative` is what guidance leads away from: one text, or one for each prompt. `sampler` is
        a kind of SamplerConfig, `options` are any other fields of it (guidance_interval, eta, ...).
        What is left out is the generator's default. An empty text is no caption at all.

        `classifier_guidance` is the scale of log p(labels | x_t) by the classifier stage, for one
        mapping of attributes to answers a prompt; `clip_guidance` that of the noise-aware CLIP, or
        else of the line's CLIP, which judges the estimate of the picture. Both come on top of
        `guidance`: 0 there leaves the captions to them. `known` is what the pictures must agree
        with, one for each prompt: inpainting and super-resolution by conditioning alone (PiGDM,
        Song et al. 2023). ValueError where the generator lacks what they need.
        """
        chosen = {"guidance": guidance, "steps": steps, "kind": sampler, **options}
        guides = [
            *self._classifier_guide(prompts, labels, classifier_guidance),
            *self._clip_guide(prompts, clip_guidance),
            *self._known_guide(prompts, known),
        ]
        pictures = [
            self._decoded(x)
            for x in self._latents(prompts, negative, seed, self._sampler(chosen), guides)
        ]
        shape = (0, self.resolution, self.resolution, 3)
        return np.concatenate(pictures) if pictures else np.zeros(shape, np.uint8)

    @torch.no_grad()
    def between(
        self, prompt: str, seeds: tuple[int, int], shares: Sequence[float], **options: Any
    ) -> Pictures:
        """Pictures of one prompt from noise between that of two seeds, on the sphere: share 0 is
        the first seed's picture (DDIM, Song et al. 2021, sec. 5.3). `options` are fields of
        SamplerConfig; without them the sampler is deterministic.
        """
        sampler = self._sampler({"kind": "ddim", "eta": 0.0, "corrections": 0, **options})
        first, last = self._drawn([seeds[0]], "sample"), self._drawn([seeds[1]], "sample")
        eps = torch.cat([slerp(first, last, share) for share in shares])
        cond = self.cond([prompt] * len(shares))
        return self._decoded(self._sampled(cond, None, [seeds[0]] * len(shares), sampler, (), eps))

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        *,
        negative: str | Sequence[str] | None = None,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> Float[Tensor, "picture channel height width"]:
        """What a call decodes, still shifted and scaled; `options` are fields of SamplerConfig."""
        return torch.cat([*self._latents(prompts, negative, seed, self._sampler(options))])

    @torch.no_grad()
    def edit(self, pictures: Pictures, *, edited: bool = True) -> Pictures:
        """Pictures with what the edit stage was trained to put in another's place (DiffusionCLIP).

        With `edited` False they are only taken to noise and back: what the way itself costs.
        ValueError without an edit stage, and for pictures of another size than the base's.
        """
        if self.editor is None:
            raise ValueError("edit: this generator has no edit stage; add `edit` to its recipe")
        wanted = (self.resolution, self.resolution, 3)
        if pictures.dtype != np.uint8 or pictures.shape[1:] != wanted:
            raise ValueError(
                f"edit: got pictures {pictures.dtype} {pictures.shape}, wanted uint8 [n, "
                f"{', '.join(map(str, wanted))}]"
            )
        drawn = [np.zeros((0, *wanted), np.uint8)]
        for start in range(0, len(pictures), BATCH):
            rows = torch.from_numpy(pictures[start : start + BATCH]).to(self._device)
            noised = self.editor.noised(self.base.model, rows.permute(0, 3, 1, 2) / 127.5 - 1)
            by = self.editor.model if edited else self.base.model
            drawn.append(self._decoded(self.editor.drawn(noised, by)))
        return np.concatenate(drawn)

    @torch.no_grad()
    def denoising_loss(
        self, batch: Mapping[str, Any], seed: int = 0
    ) -> Float[np.ndarray, " sample"]:
        """The base's loss for each row of a loader's batch, with fixed (latent, time, noise).

        In fp32 whatever the precision: it is compared between models to the fourth digit.
        """
        return self.base.heldout_loss(to_tensors(batch, self._device), seed).cpu().numpy()

    def bits_per_dim(
        self, batch: Mapping[str, Any], seed: int = 0
    ) -> Float[np.ndarray, " sample"] | None:
        """-log2 p(picture | caption) per byte for each row of a loader's batch; None for a model of
        latents, which has no such density."""
        if self.codec is not None:
            return None
        return self.base.bits_per_dim(to_tensors(batch, self._device), seed).cpu().numpy()

    @cached_property
    def _judge(self) -> Any:
        """The CLIP stage with both towers."""
        from .stages import load

        assert self.clip is not None
        return load(self.clip).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.base.shift.device

    def _sampler(self, chosen: Mapping[str, Any]) -> SamplerConfig:
        chosen = {name: value for name, value in chosen.items() if value is not None}
        if unknown := chosen.keys() - asdict(self.sampler).keys():
            raise ValueError(
                f"a sampler has no {', '.join(sorted(unknown))}; it has {', '.join(self.defaults)}"
            )
        return replace(self.sampler, **chosen)

    @torch.no_grad()
    def _latents(
        self,
        prompts: Sequence[str],
        negative: str | Sequence[str] | None,
        seed: int | Sequence[int],
        sampler: SamplerConfig,
        guides: Sequence[Callable[[slice], Guide]] = (),
    ):
        if isinstance(prompts, str):
            raise ValueError(f"prompts: wanted a list of texts, got one text: {prompts!r:.80}")
        count = len(prompts)
        seeds = [seed + i for i in range(count)] if isinstance(seed, int) else [*map(int, seed)]
        negatives = [negative] * count if isinstance(negative, str) else negative
        for name, values in {"seed": seeds, "negative": negatives}.items():
            if values is not None and len(values) != count:
                raise ValueError(f"{name}: got {len(values)} for {count} prompts")
        for start in range(0, count, BATCH):
            rows = slice(start, start + BATCH)
            against = None if negatives is None else self.cond(negatives[rows])
            cond, around = self.cond(prompts[rows]), [make(rows) for make in guides]
            yield self._sampled(cond, against, seeds[rows], sampler, around)

    def _classifier_guide(
        self, prompts: Sequence[str], labels: Sequence[Mapping[str, str]] | None, scale: float
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
                "clip_guidance needs a base of pixels and the line's own CLIP: "
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
        side = self.resolution // known.factor
        wanted = (len(prompts), side, side, 3)
        masked = wanted[:3] if known.mask is None else known.mask.shape
        if known.pictures.shape != wanted or masked != wanted[:3]:
            raise ValueError(
                f"known: got pictures {known.pictures.shape} and a mask {masked}, wanted {wanted} "
                f"and {wanted[:3]}"
            )
        path = self.base.config.diffusion.build_path()
        return [lambda rows: known.guide(rows, path, self._device)]

    def cond(self, texts: Sequence[str]) -> Cond:
        """What the network is told by these texts; a blank one is the null condition."""
        cond = {"keep": torch.tensor([bool(text.strip()) for text in texts], device=self._device)}
        for context in self.base.config.network.contexts:
            encoder, name = self.encoders[context.name], context.name
            tokens, pooled = encoder(texts)
            padded = np.zeros((len(tokens), encoder.limit, tokens[0].shape[1]), np.float32)
            mask = np.zeros(padded.shape[:2], bool)
            for row, found in enumerate(tokens):
                padded[row, : len(found)], mask[row, : len(found)] = found, True
            fields = {f"{name}_tokens": padded, f"{name}_mask": mask, f"{name}_pooled": pooled}
            cond |= to_tensors(fields, self._device)
        return cond

    def _sampled(
        self,
        cond: Cond,
        against: Cond | None,
        seeds: Sequence[int],
        sampler: SamplerConfig,
        guides: Sequence[Guide] = (),
        eps: Tensor | None = None,
    ) -> Tensor:
        calls = iter(range(1 << 62))

        def network(x: Tensor, label: Tensor, cond: Cond) -> Tensor:
            # Autocast around the network alone: the sampler's arithmetic stays in float32.
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
                return self.base.network(x, label, cond)

        return sampler.sample(
            self.base.build_model(network),
            self._drawn(seeds, "sample") if eps is None else eps,
            cond,
            negative=against,
            guides=guides,
            noise=lambda x: self._drawn(seeds, f"sample/{next(calls)}").to(x),
        )

    def _drawn(self, seeds: Sequence[int], purpose: str) -> Tensor:
        """Standard normal noise, each row a function of its own seed."""
        shape = self.base.latent_shape.tolist()
        origin = torch.zeros(1, dtype=torch.int64, device=self._device)
        return torch.cat([normal(seed, purpose, origin, shape) for seed in seeds])

    @torch.no_grad()
    def _decoded(self, x: Tensor) -> Pictures:
        from .autoencoding import to_bytes

        pixels = to_bytes(x) if self.codec is None else self.codec.decode(self.base.unscaled(x))
        return pixels.permute(0, 2, 3, 1).cpu().numpy()


def assemble(
    directory: str | Path, stages: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Make a self-contained generator of trained stages.

    `stages` maps "base", "autoencoder" and the names of the base's text encoders to stage
    directories, or to pretrained models (folder or hub id), whose files are copied. `defaults` are
    fields of SamplerConfig (guidance, steps, ...). What was in the directory is replaced.
    ValueError when a stage is missing or not the one that the base was trained with.
    """
    from .encoders.sources import files, open_source
    from .results import CONFIG, WEIGHTS, committed
    from .stages import reconstruct

    target = Path(directory)
    sources = {name: open_source(where, name) for name, where in stages.items()}
    if "base" not in sources or sources["base"].family != "base":
        raise ValueError(f"{target}: a generator needs a base stage, got {', '.join(stages)}")
    sampler = reconstruct(SamplerConfig, dict(defaults or {}), "defaults")

    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        origins = {}
        for name, source in sources.items():
            origin, place = source.directory(), draft / name
            place.mkdir()
            origins[name] = {"pretrained": source.where, "weights_sha256": source.weights_sha256()}
            if source.pretrained:
                for file in files(origin):
                    copied = place / MODEL / file.relative_to(origin)
                    copied.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copied)
                described = {"kind": "pretrained", "config": {"family": source.family}}
                _write(place / CONFIG, described)
            else:
                for file in (CONFIG, WEIGHTS):
                    shutil.copyfile(origin / file, place / file)
                done = committed(origin) or {}
                origins[name] |= {"pretrained": None, "fingerprint": done.get("fingerprint")}
        generator = _open({name: draft / name for name in sources}, sampler, "cpu", "fp32")
        _same_encoders(committed(sources["base"].directory()), sources, generator.resolution)
        described = {
            "format": FORMAT,
            "stages": origins,
            "resolution": generator.resolution,
            "defaults": generator.defaults,
        }
        _write(draft / GENERATOR, described)
        draft.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _open(
    directories: Mapping[str, Path],
    sampler: SamplerConfig,
    device: torch.device | str,
    precision: str,
) -> Generator:
    """The generator of these stage folders. ValueError when the base needs another one."""
    from .encoders import LOADERS
    from .encoders.autoencoder import open_codec
    from .encoders.sources import open_source
    from .stages import load

    if precision not in ("bf16", "fp32"):
        raise ValueError(f"precision: got {precision!r}, wanted 'bf16' or 'fp32'")
    base: Any = load(directories["base"]).to(device)
    texts = [context.name for context in base.config.network.contexts]
    wanted = [*(["autoencoder"] if base.config.data == "moments" else []), *texts]
    if missing := [name for name in wanted if name not in directories]:
        raise ValueError(
            f"the base stage needs {', '.join(missing)} too (given: {', '.join(directories)})"
        )
    sources = {name: open_source(directories[name], name) for name in wanted}
    codec = open_codec(sources["autoencoder"], device) if "autoencoder" in sources else None
    encoders = {name: LOADERS[sources[name].family](sources[name], device) for name in texts}
    judge, noisy, editor = (
        load(directories[name]).to(device) if name in directories else None
        for name in ("classifier", "noisy_clip", "edit")
    )
    towers = directories.get("clip") if "clip" in sources else None
    shape = base.latent_shape.tolist()
    side = shape[-1]
    if codec is not None:
        with torch.no_grad():
            side = codec.decode(torch.zeros(1, *shape, device=device)).shape[-1]
    if towers is not None and sources["clip"].pretrained:
        towers = None
    return Generator(base, codec, encoders, sampler, side, precision, judge, towers, noisy, editor)


def _same_encoders(
    base: Mapping[str, Any] | None, sources: Mapping[str, Any], resolution: int
) -> None:
    """ValueError when an encoder is not the one whose numbers the base learned from."""
    from .encoders import spec_of

    for encoding in (base or {}).get("encodings", ()):
        if (name := encoding["name"]) in sources:
            side = encoding.get("side", resolution) if encoding["kind"] == "image" else None
            shown = {key: encoding[key] for key in ("buckets", "flip") if key in encoding}
            precision = encoding.get("precision", "fp32")
            given = spec_of(sources[name], name, side, **shown, precision=precision).fingerprint
            if given != encoding["fingerprint"]:
                raise ValueError(
                    f"{name} at {sources[name].where} is encoder {given}, the base was trained "
                    f"with {encoding['fingerprint']}: give that one, or train the base anew"
                )


def _precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # Without the instructions bf16 on a CPU is emulated, and slower than fp32.
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def _write(path: Path, described: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(described, indent=1, sort_keys=True) + "\n")
