"""Diffusion as plain names and numbers, which build a path, an objective and a sampler."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor

from . import draws, guidance, objective, path, samplers
from .path import Data, Path, Time
from .prediction import NULL, PREDICTIONS, Cond, Denoiser, Model, Network, Prediction

PATHS: dict[str, Callable[..., Path]] = {
    "flow": path.flow,
    "cosine": path.cosine,
    "vp": path.vp,
    "subvp": path.subvp,
    "ve": path.ve,
    "edm": path.edm,
}
_LEVELS = {"ve": ("sigma_min", "sigma_max"), "edm": ("sigma_max",)}
"""Which fields a path takes."""


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """What is diffused how, and what the network learns of it."""

    kind: Literal["diffusion"] = "diffusion"
    path: Literal[
        "flow", "cosine", "vp", "subvp", "ve", "edm",
        "ddpm_linear", "ddpm_scaled_linear", "ddpm_cosine", "ddpm_sigmoid",
    ] = "flow"  # fmt: skip
    """ddpm_*: the beta tables, of `table_steps` states; the others are continuous."""
    table_steps: int = 1000
    zero_terminal_snr: bool = False
    """Of a table: moved to end in pure noise (Lin et al. 2024)."""
    sigma_min: float = 0.01
    """Of path ve: about where its geometric levels begin."""
    sigma_max: float | None = None
    """Last level of ve and edm; None is 50 and 80. NCSNv2: the largest distance in the data."""
    shift: float = 1.0
    """Above 1: more time at high noise, as larger pictures need (SD3: 3 at 1024 pixels)."""
    prediction: Literal["x0", "eps", "score", "v", "flow", "edm"] = "flow"
    sigma_data: float | None = None
    """Standard deviation of the data; None is 1, and .5 for prediction "edm"."""
    label: Literal["noise", "time"] = "noise"
    """How the network is told the level: log(s/a)/4, or t."""
    weight: Literal["none", "x0", "snr", "min_snr", "v", "flow", "edm", "likelihood"] = "none"
    weight_limit: float | None = None
    """The largest weight of the x0-error; None is no limit, and 5 for min_snr."""
    uncertainty: bool = False
    """A learned log-variance of the error at each level besides (EDM2): all levels weigh alike."""
    times: Literal["logit_normal", "uniform", "discrete", "lognormal"] = "logit_normal"
    times_mean: float = 0.0
    """Of the normal behind logit-normal times, or behind log(s/a) (EDM: -1.2)."""
    times_std: float = 1.0
    uniform_share: float = 0.0
    """Of logit-normal times: the share drawn uniformly instead (PRX: .1)."""
    t_min: float = 1e-3
    """Least time trained on: at the data a network's output says nothing."""
    stratified: bool = False
    """Times spread evenly over each batch (`draws.stratified`): a loss of less variance."""

    def __post_init__(self):
        _check_names(self)
        if not 0 < self.t_min < 1:
            raise ValueError(f"t_min: got {self.t_min}, wanted a time between 0 and 1")
        if not 0 <= self.uniform_share < 1:
            raise ValueError(f"uniform_share: got {self.uniform_share}, wanted 0 <= share < 1")
        if self.sigma_max is not None and self.path not in _LEVELS:
            raise ValueError(
                f"sigma_max is the last level of paths ve and edm; {self.path!r} has its own"
            )
        if self.zero_terminal_snr and not self.path.startswith("ddpm_"):
            raise ValueError(
                f"zero_terminal_snr rescales a beta table, and path {self.path!r} is none; "
                "use a ddpm_ path, or flow or cosine, which end in pure noise as they are"
            )
        # Refuses levels that are none, and a prediction the path cannot carry.
        self.build_model(lambda x, label, cond: x)

    def build_path(self) -> Path:
        levels = {name: getattr(self, name) for name in _LEVELS.get(self.path, ())}
        given = tuple((name, it) for name, it in levels.items() if it is not None)
        return _build_path(self.path, self.table_steps, self.zero_terminal_snr, self.shift, given)

    def build_prediction(self) -> Prediction:
        named = PREDICTIONS[self.prediction]
        return named if self.sigma_data is None else replace(named, sigma_data=self.sigma_data)

    def build_model(self, network: Network, **options: Any) -> Model:
        """The denoiser; `options` are Model's own (dtype, learned_variance)."""
        return Model(
            network, self.build_path(), self.build_prediction(), label=self.label, **options
        )

    def build_weight(self) -> objective.Weight | None:
        return objective.weight(
            self.weight,
            limit=self.weight_limit,
            sigma_data=self.build_prediction().sigma_data,
            path=self.build_path(),
        )

    def build_times(self) -> objective.Times:
        if self.times == "uniform":
            return objective.uniform_times(self.t_min)
        if self.times == "discrete":
            return objective.discrete_times(self.table_steps)
        if self.times == "lognormal":
            return objective.lognormal_times(self.build_path(), self.times_mean, self.times_std)
        return objective.logit_normal_times(
            self.times_mean, self.times_std, uniform_share=self.uniform_share, t_min=self.t_min
        )

    def build_uncertainty(self) -> objective.Uncertainty | None:
        return objective.Uncertainty() if self.uncertainty else None

    def draw_times(self, seed: int, position: draws.Position, purpose: str = "time") -> Time:
        """The training times of the rows at these global positions, [batch]."""
        return self.build_times()(self._draw(seed, position, purpose))

    def bands(
        self, seed: int, position: draws.Position, purpose: str = "time", count: int = 4
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Into which of `count` bands, as likely as each other, the times that `draw_times` gives
        fall, int64 [batch]; and the bands' names, the time in the middle of each."""
        drawn = self._draw(seed, position, purpose)
        middles = self.build_times()((torch.arange(count) + 0.5) / count)
        return (drawn * count).long(), tuple(f"{float(t):.3g}" for t in middles)

    def _draw(self, seed: int, position: draws.Position, purpose: str) -> Tensor:
        draw = draws.stratified if self.stratified else draws.uniform
        return draw(seed, purpose, position)


@functools.cache
def _build_path(
    name: str,
    table_steps: int,
    zero_terminal_snr: bool,
    shift: float,
    levels: tuple[tuple[str, float], ...],
) -> Path:
    if name in PATHS:
        built = PATHS[name](**dict(levels))
    else:
        betas = path.named_betas(name.removeprefix("ddpm_"), table_steps)
        built = path.table(path.zero_terminal_snr(betas) if zero_terminal_snr else betas, name)
    return built if shift == 1 else path.shift(built, shift)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How a model's pictures are drawn."""

    kind: Literal["ddim", "heun", "dpmpp2m", "unipc", "euler_maruyama", "annealed"] = "dpmpp2m"
    steps: int = 16
    eta: float = 0.0
    """Of ddim: 0 is deterministic, 1 is DDPM's ancestral sampling."""
    variance: Literal["small", "large", "learned"] = "small"
    """Of ddim's fresh noise: DDPM's beta-tilde or beta, or what the network says lies between."""
    step_size: float = 0.1
    """Of Langevin dynamics (annealed, and the corrector), in units of the level's variance."""
    grid: Literal["uniform", "trailing", "leading", "karras", "shifted"] = "uniform"
    table_steps: int = 1000
    """Of the trailing and leading grids."""
    shift: float = 3.0
    """Of the shifted grid."""
    sigma_min: float = 0.002
    sigma_max: float | None = None
    """Of the karras grid; None is the path's own last level."""
    rho: float = 7.0
    guidance: float = 1.0
    """1 is the plain conditional model, 0 the unconditional one."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """The times at which guidance is on; elsewhere a step costs half."""
    guidance_rescale: float = 0.0
    threshold: Literal["none", "static", "dynamic"] = "none"
    """For data in [-1, 1]."""
    threshold_quantile: float = 0.995
    corrections: int = 0
    """Langevin steps at each level: after a step of the others (predictor-corrector), and of
    annealed, which has 20 where this is 0."""

    def __post_init__(self):
        _check_names(self)
        # JSON has no tuples.
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
        first, last = self.guidance_interval
        levels = self.sigma_max is None or self.sigma_min < self.sigma_max < math.inf
        for name, right, wanted in (
            ("steps", self.steps >= 1, "at least 1"),
            ("eta", 0 <= self.eta <= 1, "0 (deterministic) to 1 (ancestral)"),
            ("step_size", 0 < self.step_size < math.inf, "a finite number above 0"),
            ("table_steps", self.table_steps >= 1, "at least 1"),
            ("shift", 0 < self.shift < math.inf, "a finite number above 0"),
            ("sigma_min", 0 < self.sigma_min < math.inf, "a finite level above 0"),
            ("sigma_max", levels, f"a finite level above sigma_min, {self.sigma_min}, or none"),
            ("rho", 0 < self.rho < math.inf, "a finite number above 0"),
            ("guidance", math.isfinite(self.guidance), "a finite scale"),
            ("guidance_interval", 0 <= first <= last <= 1, "two times in order, from 0 to 1"),
            ("guidance_rescale", 0 <= self.guidance_rescale <= 1, "0 to 1"),
            ("threshold_quantile", 0 < self.threshold_quantile <= 1, "above 0 and up to 1"),
            ("corrections", self.corrections >= 0, "at least 0"),
        ):
            if not right:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted {wanted}")

    def build_step(self, path: Path, learned: samplers.Variance | None = None) -> samplers.Step:
        """`learned` is what variance "learned" stands for."""
        if self.kind == "ddim":
            variance = self.variance if self.variance != "learned" else learned
            if variance is None:
                raise ValueError("variance 'learned' is that of a model: see samplers.learned")
            return samplers.ddim(path, self.eta, variance)
        if self.kind == "annealed":
            return samplers.annealed(path, self.step_size, self.corrections or 20)
        return samplers.STEPS[self.kind](path)

    def build_corrector(self, path: Path) -> samplers.Step | None:
        if not self.corrections or self.kind == "annealed":
            return None
        return samplers.langevin(path, self.step_size, self.corrections)

    def build_grid(self, path: Path) -> samplers.Grid:
        if self.grid == "trailing":
            return samplers.trailing_grid(self.steps, self.table_steps)
        if self.grid == "leading":
            return samplers.leading_grid(self.steps, self.table_steps)
        if self.grid == "karras":
            return samplers.karras_grid(path, self.steps, self.sigma_min, self.sigma_max, self.rho)
        if self.grid == "shifted":
            return samplers.shifted_grid(self.steps, self.shift)
        return samplers.uniform_grid(self.steps)

    def build_guide(self, negative: Cond | None = None, *more: guidance.Guide) -> guidance.Guide:
        """Classifier-free guidance, then `more`, then thresholding."""
        guides = [
            guidance.classifier_free(
                self.guidance,
                negative,
                interval=self.guidance_interval,
                rescale=self.guidance_rescale,
            ),
            *more,
        ]
        if self.threshold == "static":
            guides.append(guidance.static_threshold())
        if self.threshold == "dynamic":
            guides.append(guidance.dynamic_threshold(self.threshold_quantile))
        return guidance.compose(*guides)

    def sample(
        self,
        model: Model,
        eps: Data,
        cond: Cond = NULL,
        *,
        negative: Cond | None = None,
        guides: Sequence[guidance.Guide] = (),
        noise: samplers.Noise = torch.randn_like,
    ) -> Data:
        """x0 of `model` from standard normal `eps`; `noise` serves the stochastic kinds alone.

        `guides` wrap the model besides classifier-free guidance.
        """
        denoise: Denoiser = model
        learned = None
        if self.kind == "ddim" and self.variance == "learned":
            denoise, learned = samplers.learned(model)
        denoise = self.build_guide(negative, *guides)(denoise)
        grid = self.build_grid(model.path)
        start: Tensor = samplers.prior(model.path, eps, grid[0])
        step, corrector = self.build_step(model.path, learned), self.build_corrector(model.path)
        return samplers.sample(denoise, step, start, grid, cond, corrector=corrector, noise=noise)


def _check_names(config: DiffusionConfig | SamplerConfig) -> None:
    """Literal fields hold one of their names: a dataclass alone does not look."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        names, got = get_args(hints[field.name]), getattr(config, field.name)
        if isinstance(got, str) and got not in names:
            raise ValueError(f"{field.name}: got {got!r}, wanted one of {', '.join(names)}")
