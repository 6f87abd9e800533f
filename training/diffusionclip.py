"""The edit's stage: a trained base taught to draw one thing in another's place (DiffusionCLIP).

A picture is taken to its noise by deterministic DDIM with the base as it was, and drawn again by a
copy that is trained: CLIP's features of what comes out must have moved as those of the caption do
when one word takes another's place, and the pixels must not have moved more than that asks for
(Kim, Kwon & Ye 2022, eq. 7 to 10). In the place of their identity loss of faces, pixels that were
alike may be asked to stay so, whatever they become. No caption is told to either network, so that a
picture is all an edit needs.

The judge may be the noise-aware CLIP, as in GLIDE: picture and edit are then shown to it under one
noise, at a level drawn for each row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from torch.utils.checkpoint import checkpoint

from pipeline import storage

from .autoencoding import to_bytes, to_unit
from .diffusion import Cond, DiffusionConfig, Model, ddim, normal, sample, uniform
from .diffusion.guidance import clip_loss
from .diffusion.samplers import Grid, invert, uniform_grid
from .measuring import fixed_batches, fixed_rows, heldout, per_sample
from .networks import DenoiserConfig, UNetConfig
from .networks import build as build_network
from .stage import Batch, Stage, evaluating, telling, to_tensors

Images = Float[Tensor, "batch 3 height width"]
SHOWN = 6
"""Pictures in a preview."""
SIMILAR_SIDE = 32
"""Side up to which pixels are compared with each other."""
WAY = ("noise", "inversion_steps", "steps")
"""Of EditStageConfig: what an edit may choose anew, as none of it is in the weights."""


@dataclass(frozen=True, kw_only=True)
class EditStageConfig:
    """What becomes what, and how far a picture is taken towards noise for it."""

    kind: Literal["edit"] = "edit"
    source: str = "red"
    """What pictures are trained on: those whose caption has these words."""
    target: str = "blue"
    """What takes their place in the caption."""
    network: DenoiserConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Both are those of the base in the inputs."""
    noise: float = 0.7
    """Time from which the copy draws: the paper's "return step", which bounds what can change."""
    inversion_steps: int = 20
    """To the noise, in an edit and in training."""
    steps: int = 8
    """From it."""
    direction: float = 1.0
    """Weight of the directional CLIP loss."""
    reconstruction: float = 0.3
    """Weight of the mean absolute error against the picture, in [-1, 1] units."""
    structure: float = 0.0
    """Weight of `structure_loss`. The absolute error alone holds a thing's colour as fast as its
    outline, so that what it keeps of one it keeps of the other."""
    judged_noise: float = 0.5
    """Up to which time a noise-aware judge is shown them. Where colours drown in noise, it knows no
    direction either."""
    recompute: bool = False
    """Each step forgets its inside and computes it again on the way back: the memory of one step
    instead of all."""

    def __post_init__(self):
        if not 0 < self.noise <= 1:
            raise ValueError(f"noise: got {self.noise}, wanted a time above 0 and up to 1")
        if not 0 <= self.judged_noise <= 1:
            raise ValueError(f"judged_noise: got {self.judged_noise}, wanted a time from 0 to 1")
        for name in ("inversion_steps", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted at least 1")
        for name in ("direction", "reconstruction", "structure"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted 0 or more")
        if not self.source.strip() or not self.target.strip() or self.source == self.target:
            raise ValueError(
                f"source and target: got {self.source!r} and {self.target!r}, wanted two words"
            )

    def grid(self, steps: int) -> Grid:
        """Times from the noise to the data."""
        return self.noise * uniform_grid(steps)


class EditStage(Stage):
    """Trains on `pixels` (uint8 [B, 3, side, side]) and `caption`; inputs are `base` and `clip`, or
    `noisy_clip` in that one's place.

    Rows whose caption lacks the source teach nothing.
    """

    kind = "edit"

    def __init__(self, config: EditStageConfig, inputs: Mapping[str, str] | None = None):
        self.inputs = dict(inputs or {})
        config = _resolved(config, self.inputs)
        super().__init__(config)
        self.config: EditStageConfig
        self.network = build_network(config.network)
        self._frozen: dict[str, Any] = {}  # no submodules: they are not trained, nor exported

    @property
    def model(self) -> Model:
        """The copy, as a denoiser of pictures."""
        return self.config.diffusion.build_model(
            self.network, learned_variance=self.config.network.learned_variance
        )

    def prepare(self, loader: Any) -> None:
        """Begin as the base is."""
        self.network.load_state_dict(self.frozen("base").network.state_dict())

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        taught = self.taught(batch["caption"])
        # A row that teaches nothing stands in where none does: workers share their gradients.
        rows = taught.nonzero()[:, 0] if taught.any() else torch.zeros(1, dtype=torch.int64)
        captions = [batch["caption"][row] for row in rows.tolist()]
        here = rows.to(batch["pixels"].device)
        x, position = to_unit(batch["pixels"][here]), batch["position"][here]
        y = self.drawn(self.noised(self.frozen("base").model, x))
        moved, changed = self.losses(x, y, *self.judge(x, position, self.seed), captions)
        reshaped = structure_loss(x, y)
        found = (
            self.config.direction * moved
            + self.config.reconstruction * changed
            + self.config.structure * reshaped
        )
        loss = found.new_zeros(len(taught))
        loss[rows.to(loss.device)] = found * taught[rows].to(found)
        told = {"direction": moved, "l1": changed, "structure": reshaped}
        return {"loss": loss} | {name: it.detach().mean() for name, it in told.items()}

    def judge(
        self, x: Images, position: Tensor, seed: int
    ) -> tuple[Callable[[Tensor], Tensor], Callable[[Sequence[str]], Tensor]]:
        """(features of pictures like x, features of captions), with the rows' own noise."""
        if "noisy_clip" not in self.inputs:
            clip = self.frozen("clip")
            return clip.features, clip.texts
        clip = self.frozen("noisy_clip")
        diffusion = clip.config.diffusion
        t = uniform(seed, "judged/time", position).float() * self.config.judged_noise
        eps = normal(seed, "judged/noise", position, x.shape[1:])
        a, s = diffusion.build_path().at(t, x)
        return lambda pictures: clip.noisy_features(a * pictures + s * eps, t), clip.texts

    def losses(
        self,
        x: Images,
        y: Images,
        features: Callable[[Tensor], Tensor],
        texts: Callable[[Sequence[str]], Tensor],
        captions: Sequence[str],
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """(1 - cos(change of picture, change of caption), mean absolute change) from x to y."""
        with torch.no_grad():
            before, said = features(x), texts(captions)
            wanted = texts([self.worded(it) for it in captions])
        return clip_loss(features(y), before, wanted, said), per_sample((y - x).abs())

    def way(self, chosen: Mapping[str, Any]) -> EditStageConfig:
        """The config with those of `WAY` that are chosen; None: as it was trained. ValueError for
        what cannot be chosen, and where EditStageConfig refuses the value.
        """
        from .stages import reconstruct

        chosen = {name: value for name, value in chosen.items() if value is not None}
        if unknown := chosen.keys() - {*WAY}:
            raise ValueError(
                f"edit: it has no {', '.join(sorted(unknown))}; it has {', '.join(WAY)}"
            )
        checked = reconstruct(EditStageConfig, chosen, "edit")
        return replace(self.config, **{name: getattr(checked, name) for name in chosen})

    @torch.no_grad()
    def noised(self, denoise: Model, x: Images, way: EditStageConfig | None = None) -> Images:
        """What a base takes a picture to, by as many steps as an edit has."""
        way = way or self.config
        return invert(denoise, denoise.path, x, way.grid(way.inversion_steps))

    def drawn(
        self, x: Images, model: Model | None = None, way: EditStageConfig | None = None
    ) -> Images:
        """A picture again, of what `noised` gave: by the copy, or by another model."""
        model, way = model or self.model, way or self.config

        def denoise(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            if self.config.recompute and torch.is_grad_enabled():
                return checkpoint(model, x, t, cond, use_reentrant=False)
            return model(x, t, cond)

        return sample(denoise, ddim(model.path), x, way.grid(way.steps))

    def taught(self, captions: Sequence[str]) -> Bool[Tensor, " row"]:
        """Which captions have the source."""
        return torch.tensor([bool(self._words.search(it)) for it in captions])

    def worded(self, caption: str) -> str:
        """The caption with the target in the source's place."""
        return self._words.sub(lambda _: self.config.target, caption)

    @property
    def _words(self) -> re.Pattern[str]:
        return re.compile(rf"\b{re.escape(self.config.source)}\b", re.IGNORECASE)

    def frozen(self, name: str) -> Any:
        """An input's stage, as it was trained. ValueError without one."""
        if name not in self.inputs:
            raise ValueError(f"edit: it learns from a {name}; give that stage as an input")
        if name not in self._frozen:
            from .stages import load

            self._frozen[name] = load(self.inputs[name])
        return self._frozen[name].to(next(self.network.parameters()).device)

    def finish(self, loader: Any) -> dict[str, Any]:
        """The losses on up to 256 pictures, held-out ones if there are any."""
        sums: dict[str, list[float]] = {"direction": [], "l1": [], "structure": []}
        with evaluating(self):
            for rows in fixed_batches(heldout(loader) or loader, 4096, 256):
                batch = self._chosen(rows, 256 - len(sums["l1"]))
                if not len(batch["caption"]):
                    continue
                x = to_unit(batch["pixels"])
                y = self.drawn(self.noised(self.frozen("base").model, x))
                judge = self.judge(x, batch["position"], 0)
                found = self.losses(x, y, *judge, batch["caption"])
                for name, values in zip(sums, (*found, structure_loss(x, y)), strict=True):
                    sums[name] += values.tolist()
        return {name: float(np.mean(values)) for name, values in sums.items() if values}

    def preview(
        self, loader: Any, seed: int, beat: Callable[[], None] = lambda: None
    ) -> np.ndarray | None:
        """Each picture as it was, drawn again by the base, and edited: uint8 [n, H, 3 W, 3]."""
        unseen = heldout(loader) or loader
        batch = self._chosen(unseen.rows(fixed_rows(unseen.samples, 256)), SHOWN)
        if not len(batch["caption"]):
            return None
        base, edited = (
            replace(model, network=telling(model.network, beat))
            for model in (self.frozen("base").model, self.model)
        )
        with evaluating(self):
            x = to_unit(batch["pixels"])
            noised = self.noised(base, x)
            shown = [x, self.drawn(noised, base), self.drawn(noised, edited)]
        return to_bytes(torch.cat(shown, 3)).permute(0, 2, 3, 1).cpu().numpy()

    def _chosen(self, batch: Mapping[str, Any], count: int) -> Batch:
        """The first rows of a loader's batch that have the source, on the network's device."""
        rows = self.taught(batch["caption"]).nonzero()[:count, 0].numpy()
        chosen = {
            "pixels": batch["pixels"][rows],
            "position": batch["position"][rows],
            "caption": [batch["caption"][row] for row in rows],
        }
        return to_tensors(chosen, next(self.network.parameters()).device)


def structure_loss(x: Images, y: Images) -> Float[Tensor, " batch"]:
    """How differently the pixels of x and y are like each other: the mean over all pairs of
    |d(y_i, y_j) / mean d(y) - d(x_i, x_j) / mean d(x)|, d being the distance of two colours.

    Self-similarity (Shechtman & Irani 2007, section 3) as a loss (Tumanyan et al. 2022, eq. 5), of
    pixels. It is 0 where a thing on a plain ground has another colour as a whole, its soft edge
    included, and else sees what outlines see. Of pictures above SIMILAR_SIDE it is that of their
    reductions, as it takes memory by the square of their pixels.
    """
    return per_sample((_unlikeness(y) - _unlikeness(x)).abs())


def _unlikeness(x: Images) -> Float[Tensor, "batch pixel pixel"]:
    side = min(SIMILAR_SIDE, *x.shape[2:])
    with torch.autocast(x.device.type, enabled=False):  # what follows is a small difference
        pixels = adaptive_avg_pool2d(x.float(), side).flatten(2).mT
        squares = pixels.square().sum(2)
        apart = squares[:, :, None] + squares[:, None] - 2 * pixels @ pixels.mT
    # The root's slope at 0 has no bound; a step of 8-bit colour is .008.
    distance = (apart.clamp(min=0) + 1e-4).sqrt()
    return distance / distance.mean((1, 2), keepdim=True)


def _resolved(config: EditStageConfig, inputs: Mapping[str, str]) -> EditStageConfig:
    """The config with the base's network and diffusion. ValueError for a base of latents."""
    if "base" not in inputs:
        return config
    from .results import CONFIG
    from .stages import config_of

    described = storage.read_json(storage.join(inputs["base"], CONFIG))
    base = config_of("base", described["config"])
    if base.data != "pixels":
        raise ValueError(
            f"edit: {inputs['base']} is no base of pixels, and latents are not what CLIP sees; "
            "set base.config.data=pixels"
        )
    return replace(config, network=base.network, diffusion=base.diffusion)
