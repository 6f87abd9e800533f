"""Guidance: Denoiser -> Denoiser. Compose by nesting; samplers never hear of it.

What adds g to log p(x_t) adds (s^2/a) dg/dx to the estimate (Tweedie). So guidance acts on x0, and
is the same in every gauge, for every prediction and for any number of steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from .path import Data, Path, Time, like
from .prediction import Cond, Denoiser

Guide = Callable[[Denoiser], Denoiser]
LogProb = Callable[[Tensor, Tensor, Cond], Tensor]
"""(x, t, cond) -> log p(y | x_t = x) [batch], differentiable in x."""


def compose(*guides: Guide) -> Guide:
    """The guides in order, the last one outermost."""

    def guide(denoise: Denoiser) -> Denoiser:
        for wrap in guides:
            denoise = wrap(denoise)
        return denoise

    return guide


def classifier_free(
    scale: float,
    negative: Cond | None = None,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Guide:
    """D_u + scale (D_c - D_u), both from one call (Ho & Salimans 2021, whose w is scale - 1).

    D_u has the null condition (every row's "keep" False), or that of `negative`, whose entries
    replace those of the condition; a "keep" of its own may leave rows null. Scale 0 is D_u and
    scale 1 is D_c, exactly and at a call of single width; so is D_c at times outside `interval`
    (Kynkaanniemi et al. 2024). `rescale` in [0, 1] pulls each row's deviation back to that of D_c
    (Lin et al. 2024, eq. 15).
    """

    def guide(denoise: Denoiser) -> Denoiser:
        def guided(x: Data, t: Time, cond: Cond) -> Data:
            if _off(scale, t, interval):
                return denoise(x, t, cond)
            base_cond = null(cond, x) if negative is None else {**cond, **negative}
            if scale == 0 and _within(t, interval).all():
                return denoise(x, t, base_cond)
            twice = t if t.ndim == 0 else torch.cat([t, t])
            both = denoise(torch.cat([x, x]), twice, stack(base_cond, cond, x))
            base, wanted = both.chunk(2)
            return _mix(base, wanted, x, t, scale, interval, rescale)

        return guided

    return guide


def autoguidance(
    scale: float,
    weak: Denoiser,
    *,
    interval: tuple[float, float] = (0.0, 1.0),
    rescale: float = 0.0,
) -> Guide:
    """The same with a worse model of the same condition for D_u (Karras et al. 2024)."""

    def guide(denoise: Denoiser) -> Denoiser:
        def guided(x: Data, t: Time, cond: Cond) -> Data:
            wanted = denoise(x, t, cond)
            if _off(scale, t, interval):
                return wanted
            return _mix(weak(x, t, cond), wanted, x, t, scale, interval, rescale)

        return guided

    return guide


def _mix(
    base: Tensor,
    wanted: Tensor,
    x: Tensor,
    t: Tensor,
    scale: float,
    interval: tuple[float, float],
    rescale: float,
) -> Tensor:
    mixed = torch.lerp(base, wanted, scale)
    if rescale:
        shrink = wanted.flatten(1).std(1) / mixed.flatten(1).std(1)
        mixed = torch.lerp(mixed, mixed * like(shrink, x), rescale)
    inside = _within(t, interval)
    return mixed if inside.all() else torch.where(like(inside.to(x.device), x), mixed, wanted)


def _off(scale: float, t: Tensor, interval: tuple[float, float]) -> bool:
    return scale == 1 or not _within(t, interval).any()


def _within(t: Tensor, interval: tuple[float, float]) -> Tensor:
    return (interval[0] <= t) & (t <= interval[1])


def null(cond: Cond, x: Data) -> Cond:
    """The condition with every row's caption dropped."""
    return {**cond, "keep": torch.zeros(len(x), dtype=torch.bool, device=x.device)}


def stack(first: Cond, second: Cond, x: Data) -> Cond:
    """Two conditions of x's rows as one of twice as many. A missing "keep" keeps all rows;
    sequences are padded to one length with zeros, which a mask reads as False."""
    kept = {"keep": torch.ones(len(x), dtype=torch.bool, device=x.device)}
    first, second = {**kept, **first}, {**kept, **second}
    if first.keys() != second.keys():
        raise ValueError(
            f"guidance: the conditions differ in {sorted(first.keys() ^ second.keys())}; "
            "wanted the same keys in both (keep = False says that a row is null)"
        )
    return {key: _stacked(key, first[key], second[key]) for key in first}


def _stacked(key: str, first: Tensor, second: Tensor) -> Tensor:
    if len(first) != len(second) or first.shape[2:] != second.shape[2:]:
        raise ValueError(
            f"guidance: {key!r} is {tuple(first.shape)} in one condition and {tuple(second.shape)} "
            "in the other; only the length of a sequence (axis 1) may differ"
        )
    if first.ndim > 1:
        length = max(first.shape[1], second.shape[1])
        first, second = _padded(first, length), _padded(second, length)
    return torch.cat([first, second])


def _padded(x: Tensor, length: int) -> Tensor:
    missing = length - x.shape[1]
    return functional.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x


def classifier(path: Path, log_prob: LogProb, scale: float = 1.0) -> Guide:
    """D += scale (s^2/a) d log p(y | x_t)/dx (Dhariwal & Nichol 2021, algorithms 1 and 2 in one).

    Scale 1 on an unconditional model is Bayes' rule. At a = 0 x says nothing of y: D is left alone.
    """

    def guide(denoise: Denoiser) -> Denoiser:
        if not scale:
            return denoise

        def guided(x: Data, t: Time, cond: Cond) -> Data:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                gradient = torch.autograd.grad(log_prob(leaf, t, cond).sum(), leaf)[0]
            return denoise(x, t, cond) + scale * _pull(path, t, gradient)

        return guided

    return guide


def reconstruction(path: Path, log_prob: LogProb, scale: float = 1.0) -> Guide:
    """The same with log p(y | x0 = D(x_t)), the gradient taken through the denoiser (Ho et al.
    2022, video diffusion, sec. 3.1): for judges that know clean data alone."""

    def guide(denoise: Denoiser) -> Denoiser:
        if not scale:
            return denoise

        def guided(x: Data, t: Time, cond: Cond) -> Data:
            nested = x.requires_grad  # another one around this one: its gradient goes through x0
            with torch.enable_grad():
                leaf = x if nested else x.detach().requires_grad_()
                x0 = denoise(leaf, t, cond)
                log_p = log_prob(x0, t, cond).sum()
                gradient = torch.autograd.grad(log_p, leaf, retain_graph=nested)[0]
            return (x0 if nested else x0.detach()) + scale * _pull(path, t, gradient)

        return guided

    return guide


def _pull(path: Path, t: Tensor, gradient: Tensor) -> Tensor:
    """(s^2/a) gradient."""
    a, s = path.at(t, gradient)
    return torch.where(a == 0, 0, s**2 / a).to(gradient) * gradient


def clip_log_prob(
    image_features: Callable[[Tensor, Tensor], Tensor],
    text_features: Float[Tensor, "batch width"],
    temperature: float = 100.0,
) -> LogProb:
    """temperature <text, image(x_t, t)> of unit vectors: GLIDE's guidance by a noise-aware CLIP."""
    text = functional.normalize(text_features, dim=-1)

    def log_prob(x: Data, t: Time, cond: Cond) -> Tensor:
        return temperature * (functional.normalize(image_features(x, t), dim=-1) * text).sum(-1)

    return log_prob


def clip_loss(
    image: Float[Tensor, "batch width"],
    source_image: Float[Tensor, "batch width"],
    text: Float[Tensor, "batch width"],
    source_text: Float[Tensor, "batch width"],
) -> Float[Tensor, " batch"]:
    """1 - cos(change of picture, change of text): what DiffusionCLIP (Kim et al. 2022)
    minimises."""
    return 1 - functional.cosine_similarity(image - source_image, text - source_text, dim=-1)


def linear_inverse(
    path: Path,
    operator: Callable[[Tensor], Tensor],
    measured: Tensor,
    noise_std: float,
    *,
    gram: float = 1.0,
    data_std: float = 1.0,
) -> Guide:
    """Samples of p(x0 | y) for y = H x0 + noise, without retraining (PiGDM, Song et al. 2023).

    `operator` is a linear H with H H^T = gram I: 1 for a mask, 1/k^2 for k x k average pooling.
    Exact for data N(m, data_std^2 I), of which `spread` is the variance given x_t; else an
    approximation.
    """

    def log_prob(x0: Data, t: Time, cond: Cond) -> Tensor:
        a, s = path(t)
        spread = (s * data_std) ** 2 / (s**2 + (a * data_std) ** 2)
        miss = (measured - operator(x0)).flatten(1).square().sum(1)
        return -miss / (2 * (noise_std**2 + gram * spread).to(miss))

    return reconstruction(path, log_prob)


def static_threshold(limit: float = 1.0) -> Guide:
    """D clipped to [-limit, limit]."""
    return _after(lambda x0: x0.clamp(-limit, limit))


def dynamic_threshold(quantile: float = 0.995, ceiling: float | None = None) -> Guide:
    """clip(D, +-s)/s, s = max(1, each row's quantile of |D|) (Saharia et al. 2022, sec. 2.3).

    For data in [-1, 1], after all other guidance. A `ceiling` bounds s; 1 would make it static.
    """

    def threshold(x0: Tensor) -> Tensor:
        size = like(torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(1, ceiling), x0)
        return x0.clamp(-size, size) / size

    return _after(threshold)


def _after(change: Callable[[Tensor], Tensor]) -> Guide:
    return lambda denoise: lambda x, t, cond: change(denoise(x, t, cond))
