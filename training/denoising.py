"""The stages that denoise: a network learns the denoiser of latents, of pictures or of embeddings.

The base draws latents or pictures from captions, some of them dropped. What comes after it in a
cascade is the same, told the smaller picture besides; unCLIP's prior is the same for the embedding
of a picture, and its decoder a base that is told that embedding. Latents are sampled anew from
their moments at every look, and shifted and scaled to mean 0 and deviation 1 by what was measured
once. Every draw (latent, time, noise, dropout) is a function of (seed, purpose, global position).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.schema import PICTURE_EMBEDDING

from .alignment import Alignment, AlignmentConfig
from .autoencoding import sample_latent, to_bytes, to_unit
from .classifying import AttributeConfig
from .diffusion import (
    Cond,
    DiffusionConfig,
    Model,
    SamplerConfig,
    log_likelihood,
    loss,
    normal,
    uniform,
)
from .diffusion.objective import Uncertainty, hybrid_loss
from .diffusion.prediction import Network
from .diffusion.samplers import karras_grid
from .enlarging import LowConfig, enlarged, shrunk
from .mapping import Map, MapConfig, Mapper, shares
from .measuring import ChannelStatistics, alike, fixed_batches, fixed_rows, heldout
from .networks import (
    Context,
    ContextConfig,
    DenoiserConfig,
    PriorConfig,
    Standard,
    Tap,
    UNetConfig,
)
from .networks import build as build_network
from .stage import Batch, Stage, evaluating, telling, to_tensors

Latents = Float[Tensor, "batch channel *place"]
"""Of pictures [B, C, height, width]; embeddings are [B, C]."""
EMBEDDING_TOKENS = 4
"""Of them the network makes so many of the picture's embedding (Ramesh et al. 2022, sec. 2.1)."""
PREVIEWED = 16 * 256**2
"""Places of all pictures of a preview together: 16 of 256 px, or one of 1024, whose full-size maps
take gigabytes each."""
HALF_BYTE = 127.5
"""Bytes in one unit of the data, which lies in [-1, 1]."""
LEAST_LEVEL = 0.01
"""s/a at which the data is taken as it is, when its likelihood is asked for. A byte known exactly
costs 1.7 bits at this level, so the figure is an upper bound; networks are hardly trained below it.
"""


@dataclass(frozen=True, kw_only=True)
class BaseStageConfig:
    """What is denoised by what network, and what it is told."""

    kind: Literal["base"] = "base"
    network: DenoiserConfig | PriorConfig = field(default_factory=UNetConfig)
    """Channels, classes and contexts that are left out are those of the inputs."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    data: Literal["moments", "pixels", "embedding"] = "moments"
    """Latents of an autoencoder, the pictures themselves, or their embeddings by the inputs' CLIP,
    whose length is made the square root of their width (unCLIP's prior)."""
    side: int = 0
    """Of pixels: the side to which pictures are shrunk, by means of squares; 0: the data's."""
    low: LowConfig | None = None
    """The smaller picture that is enlarged; None: nothing is."""
    map: MapConfig | None = None
    """Which class each pixel is to have; None: it is not told."""
    listens: tuple[str, ...] | None = None
    """The text encoders that are listened to, and "clip_image" for the picture's own embedding;
    None: all text encoders of the inputs."""
    standardized: tuple[str, ...] = ()
    """Those of them whose features are each brought to mean 0 and deviation 1, as measured before
    the first step. T5's hold one large vector that all captions share, beside which what they
    differ in is lost on a network that trains for minutes."""
    attributes: tuple[AttributeConfig, ...] = ()
    """Of the samples' labels; their answers together are the class that the network is told."""
    caption_dropout: float = 0.1
    """Share of rows that are trained without any caption, which is what guidance needs."""
    context_dropout: float | dict[str, float] = 0.0
    """Share of rows that lose one encoder's words, for each on its own: the same for all, or by
    encoder, where others lose none (unCLIP's decoder, Ramesh et al. 2022, section 2.1: a tenth the
    picture's embedding, half the caption)."""
    alignment: AlignmentConfig | None = None
    """What the network's first blocks make of a noisy picture is drawn to what a frozen encoder
    sees in the clean one (REPA): batches hold the pictures too. None: it is not."""
    measured_pictures: int = 4096
    """Pictures over which the latents of a pretrained autoencoder are measured."""
    preview: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(kind="dpmpp2m", steps=16, guidance=3.0)
    )
    """How previews are drawn."""

    def __post_init__(self):
        shares = {"caption_dropout": self.caption_dropout}
        if isinstance(self.context_dropout, dict):
            shares |= {f"context_dropout.{name}": it for name, it in self.context_dropout.items()}
        else:
            shares["context_dropout"] = self.context_dropout
        for name, share in shares.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name} must lie in [0, 1), got {share}")
        prior = isinstance(self.network, PriorConfig)
        if prior != (self.data == "embedding"):
            raise ValueError(
                f"network.kind {self.network.kind!r} does not denoise {self.data}: wanted 'prior' "
                "for data 'embedding', and a network of pictures for the rest"
            )
        if prior and self.hears_embedding:
            raise ValueError(
                f"listens: a prior draws {PICTURE_EMBEDDING} and cannot be told it; leave it out"
            )
        if self.alignment:
            if isinstance(self.network, PriorConfig):
                raise ValueError(
                    f"alignment: network.kind {self.network.kind!r} has no states of places: "
                    "leave it out"
                )
            try:
                self.network.state_width(self.alignment.block)
            except ValueError as error:
                raise ValueError(f"alignment.block: {error}") from None
        if self.side and self.data != "pixels":
            raise ValueError(f"side is of data 'pixels' alone, got {self.side} for {self.data!r}")
        if self.low and prior:
            raise ValueError("low: embeddings are not enlarged; set it to null")
        if self.low and self.low.residual and self.data != "pixels":
            raise ValueError(
                f"low.residual: what a picture lacks is of data 'pixels', got {self.data!r}; set "
                "low.residual=false"
            )
        if self.map and prior:
            raise ValueError("map: embeddings have no pixels; set it to null")
        if not self.low and not self.map and getattr(self.network, "low_channels", 0):
            raise ValueError(
                "network.low_channels: nothing is enlarged here; set low, or network.low_channels=0"
            )
        if self.low and self.side and (self.side % self.low.side or self.side == self.low.side):
            raise ValueError(
                f"low.side: got {self.low.side}, wanted a proper divisor of side {self.side}"
            )
        object.__setattr__(self, "attributes", tuple(self.attributes))
        if self.learned_variance and self.diffusion.uncertainty:
            raise ValueError(
                "network.learned_variance and diffusion.uncertainty: the bound that teaches the "
                "variance has no learned weight; set one of them to false"
            )
        if self.listens is not None:
            object.__setattr__(self, "listens", tuple(self.listens))
            _check_heard(self, self.listens)
        object.__setattr__(self, "standardized", tuple(self.standardized))

    @property
    def learned_variance(self) -> bool:
        return not isinstance(self.network, PriorConfig) and self.network.learned_variance

    @property
    def channels(self) -> int:
        """Of what is denoised."""
        network = self.network
        return network.vector if isinstance(network, PriorConfig) else network.in_channels

    @property
    def heard(self) -> tuple[str, ...]:
        """What `listens` names."""
        return self.listens or ()

    @property
    def hears_embedding(self) -> bool:
        """Whether it is told the embedding of the picture itself."""
        return PICTURE_EMBEDDING in self.heard

    @property
    def silences(self) -> dict[str, float]:
        """Of each context, the share of rows that lose it alone."""
        given = self.context_dropout
        return {
            context.name: given.get(context.name, 0.0) if isinstance(given, dict) else given
            for context in self.network.contexts
        }

    @property
    def texts(self) -> tuple[str, ...]:
        """The contexts that are of captions."""
        names = (context.name for context in self.network.contexts)
        return tuple(name for name in names if name != PICTURE_EMBEDDING)


class BaseStage(Stage):
    """Trains on `moments`, `pixels` or `clip_image_pooled`, the text fields of its contexts, and
    with `low`, `map` or `alignment` on `pixels` too."""

    kind = "base"
    shift: Tensor
    scale: Tensor
    latent_shape: Tensor

    def __init__(self, config: BaseStageConfig, inputs: Mapping[str, str] | None = None):
        self.inputs = dict(inputs or {})
        config = resolved(config, self.inputs)
        super().__init__(config)
        self.config: BaseStageConfig
        self.network = build_network(config.network)
        self.alignment: Alignment | None = None
        if config.alignment and not isinstance(config.network, PriorConfig):
            states = config.network.state_width(config.alignment.block)
            tower = config.alignment.tower or self.inputs.get("clip", "")
            self.alignment = Alignment(config.alignment, states, tower)
        self.mapper = Mapper(config.map) if config.map else None
        self.weight = config.diffusion.build_weight()
        self.uncertainty = config.diffusion.build_uncertainty()
        axes = 1 if config.data == "embedding" else 3
        self.register_buffer("shift", torch.zeros(config.channels))
        self.register_buffer("scale", torch.ones(config.channels))
        self.register_buffer("latent_shape", torch.zeros(axes, dtype=torch.int64))

    @property
    def model(self) -> Model:
        """The network as a denoiser of shifted and scaled latents."""
        return self.build_model(self.network)

    def build_model(self, network: Network) -> Model:
        """The same with `network` called in its place."""
        return self.config.diffusion.build_model(
            network, learned_variance=self.config.learned_variance
        )

    def prepare(self, loader: Any) -> None:
        """Take the latents' shift and scale from the autoencoder's stage, or measure them; measure
        the features that are standardized."""
        self.adapt(loader)
        self._standardize(loader)
        if self.config.data != "moments":
            return
        measured = _measured(self.inputs.get("autoencoder"))
        if measured is None:
            measured = self._measure(loader)
        for name in ("shift", "scale"):
            value = torch.as_tensor(measured[name], dtype=torch.float32)
            if len(value) != len(self.shift):
                raise ValueError(
                    f"base: latents have {len(self.shift)} channels, those of the autoencoder in "
                    f"{self.inputs.get('autoencoder')} {len(value)}: encode the pictures with it"
                )
            getattr(self, name).copy_(value)

    def adapt(self, loader: Any) -> None:
        """Take the size of what is drawn from the data: a parent may have learnt at another. Shift
        and scale stay the parent's, whose weights expect them.

        It is square, whatever buckets of aspect ratio most pictures are in: so is what judges look
        at. Buckets have about the area of their square, and sides of which it is a multiple too.
        """
        batch = to_tensors(alike(loader)[0].batch(0), self.shift.device)
        channels, *sides = self._plain(batch).shape[1:]
        if len(set(sides)) > 1:
            multiple = math.gcd(*sides)
            sides = [multiple * round(math.prod(sides) ** 0.5 / multiple)] * 2
        self.latent_shape.copy_(torch.tensor([channels, *sides]))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        position, config = batch["position"], self.config
        cond = dict(self.cond(batch, self.seed))
        cond["keep"] = uniform(self.seed, "keep", position) >= config.caption_dropout
        if config.map and config.map.dropout:
            kept = uniform(self.seed, "keep/map", position) >= config.map.dropout
            cond = self.without_map(cond, kept)
        for name, share in config.silences.items():
            if share:
                cond[f"{name}_keep"] = uniform(self.seed, f"keep/{name}", position) >= share
        if self.alignment is None:
            return {"loss": self._loss(batch, cond, self.seed, "", self.uncertainty)}
        tap = Tap(self.alignment.config.block)
        model = self.build_model(partial(self.network, tap=tap))
        loss = self._loss(batch, cond, self.seed, "", self.uncertainty, model)
        assert tap.states is not None
        weight = self.alignment.config.weight
        with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
            alike = self.alignment(tap.states, to_unit(self._field(batch, "pixels")))
        return {
            "loss": loss - weight * alike,
            "denoising": loss.detach().mean(),
            "alignment": alike.detach().mean(),
        }

    def exported(self) -> dict[str, Tensor]:
        """Without the projector, whose work is done."""
        return {n: t for n, t in super().exported().items() if not n.startswith("alignment.")}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As usual, but the network alone where another one, which is opened on the way, sees the
        pictures too."""
        if self.alignment is None and not (self.config.map and self.config.map.segmenter):
            super().compile(*args, **kwargs)
        else:
            self.network.compile(*args, **kwargs)

    def heldout_loss(self, batch: Batch, seed: int = 0) -> Float[Tensor, " batch"]:
        """The loss on (latent, time, noise) fixed by seed and position, with every caption."""
        return self._loss(batch, self.cond(batch, seed, "heldout/"), seed, "heldout/")

    def heldout_bands(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]]:
        return self.config.diffusion.bands(0, batch["position"], "heldout/time")

    def bits_per_dim(self, batch: Batch, seed: int = 0, steps: int = 40) -> Float[Tensor, " batch"]:
        """-log2 p(picture | caption) per byte: the probability-flow ODE, a uniform draw added to
        each byte (Song et al. 2021b, section 4.3), one random direction for the trace.

        ValueError for a base of latents, as what an autoencoder loses has no density, and for one
        of shrunk pictures.
        """
        config = self.config
        if config.data != "pixels" or config.side not in (0, batch["pixels"].shape[-1]):
            raise ValueError(
                "bits per dimension need data 'pixels' as they are, got "
                f"{config.data!r}, side {config.side}"
            )
        position, x = batch["position"], self._plain(batch)
        shape = tuple(x.shape[1:])
        x = x + (uniform(seed, "dequantize", position, shape).to(x) - 0.5) / HALF_BYTE
        path = self.config.diffusion.build_path()
        last = path.ratio(torch.ones((), dtype=torch.float64)).item()
        grid = karras_grid(path, steps, LEAST_LEVEL, min(80.0, last))
        probe = normal(seed, "probe", position, shape).to(x).sign()
        cond = self.cond(batch, seed, "heldout/")
        nats = log_likelihood(self.model, path, x, grid, cond, probe=probe, data_std=x.std().item())
        return math.log2(HALF_BYTE) - nats / (math.log(2) * x[0].numel())

    def _loss(
        self,
        batch: Batch,
        cond: Cond,
        seed: int,
        purpose: str,
        uncertainty: Uncertainty | None = None,
        model: Model | None = None,
    ) -> Float[Tensor, " batch"]:
        position, model = batch["position"], model or self.model
        x0 = self.latents(batch, seed, f"{purpose}posterior")
        t = self.config.diffusion.draw_times(seed, position, f"{purpose}time")
        eps = normal(seed, f"{purpose}noise", position, x0.shape[1:])
        if self.config.learned_variance:
            steps = self.config.diffusion.table_steps
            return hybrid_loss(model, x0, t, eps, cond, self.weight, steps=steps)
        return loss(model, x0, t, eps, cond, self.weight, uncertainty)

    def latents(self, batch: Batch, seed: int, purpose: str = "posterior") -> Latents:
        """What is denoised: sampled from the batch's moments, shifted and scaled."""
        x = self._plain(batch)
        if self.config.data == "moments" and batch["moments"].shape[1] != x.shape[1]:
            x = sample_latent(batch["moments"], seed, batch["position"], purpose)
        return (x - _channels(self.shift, x)) * _channels(self.scale, x)

    def unscaled(self, x: Latents) -> Latents:
        """What the autoencoder decodes; embeddings of length 1."""
        x = x / _channels(self.scale, x) + _channels(self.shift, x)
        return F.normalize(x, dim=1) if self.config.data == "embedding" else x

    def cond(self, batch: Batch, seed: int = 0, purpose: str = "") -> Cond:
        """What the network reads; damage to the smaller picture is drawn from (seed, purpose).
        ValueError names a field that the batch lacks."""
        config, cond = self.config, dict(self._fields(batch))
        if config.attributes:
            cond["y"] = self.classes(batch["label"], batch["position"].device)
        if config.low:
            position = batch["position"]
            small = shrunk(to_unit(self._field(batch, "pixels")), config.low.side)
            strength = config.low.draw(seed, position, purpose)
            noise = config.low.noise(seed, position, small, purpose)
            side = config.side or batch["pixels"].shape[-1]
            cond |= config.low.told(small, strength, self.model, noise, side)
        if self.mapper:
            denoised = self._field(batch, config.data)
            maps = self.mapper(self._field(batch, "pixels"))
            cond = self.with_map(cond, maps, config.side or denoised.shape[-1])
        return cond

    def with_map(self, cond: Cond, maps: Map, side: int) -> dict[str, Tensor]:
        """The condition with maps of pictures as the last channels of its "low", of the `side` of
        what is denoised."""
        assert self.config.map is not None
        told = shares(maps, len(self.config.map.names), side)
        if "low" in cond:
            told = torch.cat([enlarged(cond["low"], side), told], 1)
        return {**cond, "low": told}

    def without_map(self, cond: Cond, keep: Bool[Tensor, " batch"]) -> dict[str, Tensor]:
        """The condition with zeros in the place of the maps of rows that are not kept."""
        assert self.config.map is not None
        count = len(self.config.map.names)
        before, told = cond["low"].split([cond["low"].shape[1] - count, count], 1)
        told = torch.where(keep[:, None, None, None], told, 0)
        return {**cond, "low": torch.cat([before, told], 1)}

    def classes(self, labels: Sequence[Any], device: torch.device | str) -> Int64[Tensor, " row"]:
        """The class of each label: its attributes' answers as the digits of a number; the null
        class where one is missing."""
        return torch.tensor([_class(self.config.attributes, it) for it in labels], device=device)

    def _fields(self, batch: Batch) -> Cond:
        wanted = [
            f"{context.name}_{part}"
            for context in self.config.network.contexts
            for part in (
                *(("tokens", "mask") if context.width else ()),
                *(("pooled",) if context.pooled_width else ()),
            )
        ]
        if missing := [name for name in wanted if name not in batch]:
            raise ValueError(
                f"base: the batch has no {', '.join(missing)} (it has {', '.join(sorted(batch))}): "
                "encode captions and pictures with these encoders and give their encodings to the "
                "stage"
            )
        return {name: batch[name] for name in wanted}

    def finish(self, loader: Any) -> dict[str, Any]:
        """The loss on fixed triples of training and held-out pictures; how latents are scaled."""
        measured: dict[str, Any] = {
            "shift": self.shift.tolist(),
            "scale": self.scale.tolist(),
            "latent_shape": self.latent_shape.tolist(),
            "fixed_loss": self._fixed_loss(loader),
        }
        unseen = heldout(loader)
        if unseen is not None:
            measured["heldout_fixed_loss"] = self._fixed_loss(unseen)
        return measured

    def preview(
        self, loader: Any, seed: int, beat: Callable[[], None] = lambda: None
    ) -> np.ndarray | None:
        """Samples for fixed captions, held-out if there are any: uint8 [n, H, W, 3], n <= 16, and
        fewer where they are large."""
        if self.config.data == "embedding":
            return None
        shown = alike(heldout(loader) or loader)[0]
        count = max(1, min(16, PREVIEWED // math.prod(self.latent_shape.tolist()[1:])))
        batch = to_tensors(shown.rows(fixed_rows(shown.samples, count)), self.shift.device)
        position = torch.arange(len(batch["position"]), device=self.shift.device)
        with evaluating(self):
            eps = normal(seed, "preview", position, self.latent_shape.tolist())
            cond = self.cond(batch, seed, "preview/")
            model = self.build_model(telling(self.network, beat))
            x = self.config.preview.sample(model, eps, cond)
            if self.config.data == "pixels":
                return to_bytes(x).permute(0, 2, 3, 1).cpu().numpy()
            if "autoencoder" not in self.inputs:
                return None
            from .encoders.autoencoder import open_codec
            from .encoders.sources import open_source

            codec = open_codec(open_source(self.inputs["autoencoder"], "autoencoder"), x.device)
            return codec.decode(self.unscaled(x)).permute(0, 2, 3, 1).cpu().numpy()

    def _plain(self, batch: Batch) -> Latents:
        """Pictures in [-1, 1], means of latents, or embeddings of the length that noise has.
        ValueError unless they fit the network."""
        data, channels = self.config.data, self.config.channels
        field = f"{PICTURE_EMBEDDING}_pooled" if data == "embedding" else data
        x = self._field(batch, field)
        if data == "pixels":
            x = to_unit(x)
            x = shrunk(x, self.config.side) if self.config.side else x
        elif data == "embedding":
            # Of length 1 it would drown in noise whose values are of deviation 1 each.
            x = F.normalize(x.float(), dim=1) * channels**0.5
        elif x.shape[1] == 2 * channels:
            x = x.chunk(2, dim=1)[0]
        if x.shape[1] != channels:
            raise ValueError(
                f"base: {field} with {batch[field].shape[1]} channels for a network with "
                f"in_channels {channels}; wanted as many, or twice (mean and log-variance)"
            )
        return x.float()

    def _field(self, batch: Batch, name: str) -> Tensor:
        if name not in batch:
            raise ValueError(
                f"base: the batch has no {name} (it has {', '.join(sorted(batch))}): "
                "encode the pictures first"
            )
        return batch[name]

    def _measure(self, loader: Any) -> dict[str, Tensor]:
        """Over samples that are the same for all workers."""
        self.shift.zero_()
        self.scale.fill_(1)
        statistics = ChannelStatistics()
        for batch in fixed_batches(loader, self.config.measured_pictures, 256):
            statistics.add(self.latents(to_tensors(batch, self.shift.device), self.seed))
        shift, scale = statistics.shift_and_scale()
        return {"shift": shift, "scale": scale}

    def _standardize(self, loader: Any) -> None:
        """Over samples that are the same for all workers."""
        found: dict[str, tuple[Standard, ChannelStatistics]] = {}
        for it in self.network.modules():
            if isinstance(it, Context) and it.config.standardized:
                for part, standard in it.standards.items():
                    assert isinstance(standard, Standard)
                    found[f"{it.config.name}_{part}"] = standard, ChannelStatistics()
        if not found:
            return
        for loaded in fixed_batches(loader, self.config.measured_pictures, 256):
            batch = to_tensors(loaded)
            for name, (_, statistics) in found.items():
                features = self._field(batch, name)
                if name.endswith("_tokens"):
                    features = features[self._field(batch, name.replace("_tokens", "_mask")).bool()]
                statistics.add(features)
        for standard, statistics in found.values():
            shift, scale = statistics.shift_and_scale()
            standard.shift.copy_(shift)
            standard.scale.copy_(scale)

    def _fixed_loss(self, loader: Any) -> float:
        """Mean over up to 1024 pictures."""
        found = []
        with evaluating(self):
            for batch in fixed_batches(loader, 1024, 128):
                found.append(self.heldout_loss(to_tensors(batch, self.shift.device)))
        return torch.cat(found).mean().item()


def resolved(config: BaseStageConfig, inputs: Mapping[str, str]) -> BaseStageConfig:
    """The config with the channels and contexts of the inputs filled in where it leaves them out.

    ValueError when it states others than the inputs have.
    """
    from .encoders import shapes
    from .encoders.sources import open_source

    texts = {
        name: shapes.text_widths(where, name)
        for name, where in inputs.items()
        if name != "autoencoder"
    }
    channels = embedding = patches = None
    classes: tuple[str, ...] = ()
    if config.map and not config.map.names:
        classes = shapes.class_names(config.map.segmenter)
    if "autoencoder" in inputs and config.data == "moments":
        channels = shapes.latent_channels(inputs["autoencoder"])
        stated = config.channels
        if stated not in (channels, type(config)().channels):
            raise ValueError(
                f"network.in_channels is {stated}, the autoencoder has {channels} "
                "latent channels: leave it out"
            )
    if "clip" in inputs and (config.data == "embedding" or config.hears_embedding):
        embedding = shapes.clip_shape(open_source(inputs["clip"], "clip"))[1]
    if config.alignment and (tower := config.alignment.tower or inputs.get("clip")):
        patches = config.alignment.width or shapes.patch_width(tower)
    found = {it.name: it for it in contexts_of(config, texts, embedding)}
    if inputs and (missing := set(config.heard) - found.keys()):
        raise ValueError(
            f"listens names {', '.join(sorted(missing))}, the inputs are {', '.join(inputs)}"
        )
    if inputs and (missing := set(config.standardized) - found.keys()):
        raise ValueError(
            f"standardized names {', '.join(sorted(missing))}, heard are "
            f"{', '.join(found) or 'none'}"
        )
    if inputs:
        _check_heard(config, found)
    for context in config.network.contexts:
        has = found.get(context.name)
        if has and (
            context.width not in (0, has.width) or context.pooled_width not in (0, has.pooled_width)
        ):
            raise ValueError(
                f"network.contexts: {context.name} has width {context.width} and pooled_width "
                f"{context.pooled_width}, the encoder gives {has.width} and {has.pooled_width}: "
                "leave contexts out"
            )
    return filled(config, channels, texts, embedding, patches, classes)


def filled(
    config: BaseStageConfig,
    channels: int | None,
    texts: Mapping[str, tuple[int, int]],
    embedding: int | None,
    patches: int | None = None,
    classes: Sequence[str] = (),
) -> BaseStageConfig:
    """The config with what its inputs decide: the latents' channels, the (tokens', pooled) widths
    of the text encoders, the widths of CLIP's embeddings and of the features that are aligned with,
    the classes of what makes label maps; None, or none, where there is no such input."""
    more: dict[str, Any] = {}
    if config.map and classes:
        config = replace(config, map=replace(config.map, classes=tuple(classes)))
    if config.alignment and patches:
        config = replace(config, alignment=replace(config.alignment, width=patches))
    if config.data == "embedding":
        more |= {"vector": embedding} if embedding else {}
    elif config.data == "pixels":
        more["in_channels"] = 3
    elif channels:
        more["in_channels"] = channels
    if config.low or config.map:
        named = config.map.names if config.map else ()
        more["low_channels"] = (3 if config.low else 0) + len(named)
    if config.attributes:
        more["classes"] = class_count(config.attributes)
    if not config.network.contexts:
        more["contexts"] = contexts_of(config, texts, embedding)
    return replace(config, network=replace(config.network, **more))


def contexts_of(
    config: BaseStageConfig, texts: Mapping[str, tuple[int, int]], embedding: int | None
) -> tuple[ContextConfig, ...]:
    """What the network listens to."""
    heard = texts if config.listens is None else config.listens
    found = [ContextConfig(it, *texts[it]) for it in texts if it in heard]
    if PICTURE_EMBEDDING in heard and embedding:
        found.append(
            ContextConfig(PICTURE_EMBEDDING, pooled_width=embedding, pooled_tokens=EMBEDDING_TOKENS)
        )
    return tuple(replace(it, standardized=it.name in config.standardized) for it in found)


def _check_heard(config: BaseStageConfig, heard: Collection[str]) -> None:
    """ValueError where an encoder is to fall silent that nobody listens to."""
    given = config.context_dropout
    if isinstance(given, dict) and (missing := given.keys() - set(heard)):
        raise ValueError(
            f"context_dropout names {', '.join(sorted(missing))}, heard are "
            f"{', '.join(heard) or 'none'}"
        )


def class_count(attributes: Sequence[AttributeConfig]) -> int:
    """How many classes the attributes' answers make."""
    return math.prod(len(it.answers) for it in attributes)


def _class(attributes: Sequence[AttributeConfig], label: Any) -> int:
    number = 0
    for it in attributes:
        answer = (label or {}).get(it.name)
        if answer not in it.answers:
            return class_count(attributes)
        number = number * len(it.answers) + it.answers.index(answer)
    return number


def _channels(values: Tensor, x: Tensor) -> Tensor:
    """A value of each channel, along axis 1 of x."""
    return values.view(-1, *(1,) * (x.ndim - 2))


def _measured(autoencoder: str | None) -> dict[str, Any] | None:
    """What the autoencoder's stage measured; None for a pretrained one."""
    from .results import committed

    done = committed(autoencoder) if autoencoder else None
    return done["measured"] if done else None
