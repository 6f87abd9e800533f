"""What is minimised: the squared error of x0, weighted by a function of the SNR alone.

E over t of w(SNR) |x0 - D(x_t, t)|^2: every published loss is a weight and a density of times. The
error is taken on the network's own output F, whose weight w o^2 (see `prediction`) follows. Times
are quantile functions: uniform draws in (0, 1) go in, so that plain, stratified and fixed draws all
work.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .path import Data, Path, Time, like
from .prediction import NULL, Cond, Model

PerRow = Float[Tensor, " batch"]
Weight = Callable[[Tensor], Tensor]
"""SNR -> weight of |x0 - D|^2. None in its place means plain squared error on F."""
Times = Callable[[Tensor], Tensor]
"""Uniform draws in (0, 1) -> times."""
Score = Callable[[Tensor], Tensor]


def loss(
    model: Model,
    x0: Data,
    t: Time,
    eps: Data,
    cond: Cond = NULL,
    weight: Weight | None = None,
    uncertainty: Callable[[Tensor], Tensor] | None = None,
) -> PerRow:
    """Weighted squared error, mean over each row's elements.

    `uncertainty` maps labels to log-variances u and makes it error / e^u + u (EDM2, Karras et al.
    2024), in which all noise levels weigh alike, whatever their scale.
    """
    error, _, _ = _squared_error(model, x0, t, eps, cond, weight)
    if uncertainty is None:
        return error
    u = uncertainty(model.labels(t, x0))
    return error / u.exp() + u


def _squared_error(
    model: Model, x0: Data, t: Time, eps: Data, cond: Cond, weight: Weight | None
) -> tuple[PerRow, Tensor, Tensor | None]:
    """The error, F and the learned variance's fraction, from one network call."""
    level = a, s = model.path.at(t, x0)
    out, fraction = model.predict(a * x0 + s * eps, t, cond)
    error = (out - model.target(x0, eps, level, cond)).square()
    if weight is not None:
        error = error * (weight((a / s) ** 2) * model.prediction.solve(level)[1] ** 2)
    return error.flatten(1).mean(1), out, fraction


class Uncertainty(nn.Module):
    """The log-variance u(label) of EDM2's loss: a linear map of Fourier features, 0 at first."""

    frequencies: Tensor
    phases: Tensor

    def __init__(self, features: int = 128):
        super().__init__()
        # Fixed and spread as a normal draw would be, so that nothing depends on a global generator.
        spread = _normal_quantile((torch.arange(features) + 0.5) / features)
        self.register_buffer("frequencies", 2 * math.pi * spread)
        self.register_buffer(
            "phases", 2 * math.pi * torch.arange(features) * 0.6180339887 % 6.2831853
        )
        self.linear = nn.Linear(features, 1, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, label: PerRow) -> PerRow:
        return self.linear((label[:, None] * self.frequencies + self.phases).cos()).squeeze(1)


def weight(
    name: str, *, limit: float | None = None, sigma_data: float = 0.5, path: Path | None = None
) -> Weight | None:
    """A published weight of the x0-error, cut at `limit`.

    none: plain error on F. x0: 1. snr: error of eps (L_simple; NCSN's sigma^2-weighted score
    error). min_snr: min(SNR, limit or 5) (Hang et al. 2023). v: SNR + 1. flow: (1 + sqrt(SNR))^2.
    edm: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2. likelihood: -d SNR/dt on `path`, which
    with uniform times makes half the loss, summed, a bound on -log p (Kingma et al. 2021).
    """
    if name == "none":
        return None
    weights: dict[str, Weight] = {
        "x0": torch.ones_like,
        "snr": lambda snr: snr,
        "v": lambda snr: snr + 1,
        "flow": lambda snr: (1 + snr.sqrt()) ** 2,
        "edm": lambda snr: snr + sigma_data**-2,
    }
    if path is not None:
        weights["likelihood"] = likelihood_weight(path)
    if name == "min_snr":
        name, limit = "snr", 5.0 if limit is None else limit
    if name not in weights:
        raise ValueError(
            f"weight: got {name!r}, wanted none, min_snr, {', '.join(weights)}, or "
            "likelihood with a path"
        )
    return weights[name] if limit is None else lambda snr: weights[name](snr).clamp(max=limit)


def likelihood_weight(path: Path) -> Weight:
    """-d SNR/dt = g^2 SNR / s^2, as a function of the SNR."""

    def weigh(snr: Tensor) -> Tensor:
        t = path.inv(snr.rsqrt())
        rate = path.rates(t)[1] * snr / path(t)[1] ** 2
        return torch.where(snr == 0, 0, rate)  # infinity times 0 at pure noise

    return weigh


def _normal_quantile(u: Tensor) -> Tensor:
    return torch.special.ndtri(u)  # pyright: ignore  (torch gives it no types)


def uniform_times(t_min: float = 1e-3) -> Times:
    """Uniform on [t_min, 1]. The network's F is not determined at t = 0, hence t_min."""
    return lambda u: t_min + (1 - t_min) * u


def discrete_times(steps: int) -> Times:
    """Uniform on 1/T, 2/T, ..., 1: the states of a beta table."""
    return lambda u: (u * steps).floor().clamp(max=steps - 1).add(1) / steps


def logit_normal_times(
    mean: float = 0.0, std: float = 1.0, *, uniform_share: float = 0.0, t_min: float = 1e-3
) -> Times:
    """sigmoid of a normal (SD3, eq. 19), with a share of uniform ones mixed in, at least t_min."""

    def times(u: Tensor) -> Tensor:
        flat = u < uniform_share
        rest = ((u - uniform_share) / (1 - uniform_share)).clamp(min=2.0**-24)
        normal = torch.sigmoid(mean + std * _normal_quantile(rest))
        return torch.where(flat, u / max(uniform_share, 2.0**-24), normal).clamp(min=t_min)

    return times


def lognormal_times(path: Path, mean: float = -1.2, std: float = 1.2) -> Times:
    """log(s/a) normal (EDM, table 1; EDM2 has mean -.4, std 1), at most the path's last level."""
    return lambda u: path.inv((mean + std * _normal_quantile(u)).exp()).clamp(max=1)


def directional(score: Score, x: Data, direction: Data) -> tuple[Data, PerRow]:
    """score(x) and v^T (d score/dx) v, for a random v of unit covariance an unbiased estimate of
    the trace (Hutchinson). Differentiable where gradients are enabled."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        s = score(x)
        product = torch.autograd.grad((s * direction).sum(), x, create_graph=graph)[0]
    return s if graph else s.detach(), (product * direction).flatten(1).sum(1)


def trace(score: Score, x: Data) -> tuple[Data, PerRow]:
    """score(x) and the exact trace of its Jacobian, at a backward pass for each element of a
    row."""
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        s = score(x)
        diagonal = [
            torch.autograd.grad(column.sum(), x, create_graph=graph, retain_graph=True)[0]
            .flatten(1)[:, i]
            for i, column in enumerate(s.flatten(1).unbind(1))
        ]  # fmt: skip
    return s if graph else s.detach(), torch.stack(diagonal).sum(0)


def explicit_score_matching(score: Score, x: Data) -> PerRow:
    """|s|^2 / 2 + tr(ds/dx) (Hyvarinen 2005): least at the score of x's density."""
    s, divergence = trace(score, x)
    return s.square().flatten(1).sum(1) / 2 + divergence


def sliced_score_matching(score: Score, x: Data, direction: Data) -> PerRow:
    """(v.s)^2 / 2 + v^T (ds/dx) v for random v (Song et al. 2019)."""
    s, curvature = directional(score, x, direction)
    return (s * direction).flatten(1).sum(1).square() / 2 + curvature


def denoising_score_matching(score: Score, x: Data, eps: Data, sigma: float) -> PerRow:
    """|s(x + sigma eps) + eps/sigma|^2 / 2 (Vincent 2011): least at the blurred density's score."""
    return (score(x + sigma * eps) + eps / sigma).square().flatten(1).sum(1) / 2


def kl(
    mean: Tensor, logvar: Tensor, mean_to: Tensor | float = 0.0, logvar_to: Tensor | float = 0.0
) -> PerRow:
    """KL(N(mean, e^logvar) || N(mean_to, e^logvar_to)) in nats, summed over each row."""
    narrower = logvar - logvar_to
    squares = (mean - mean_to) ** 2 * (narrower - logvar).exp()
    return (narrower.expm1() - narrower + squares).flatten(1).sum(1) / 2


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> PerRow:
    """log N(x; mean, e^logvar) in nats, summed over each row."""
    density = logvar + math.log(2 * math.pi) + (x - mean) ** 2 * (-logvar).exp()
    return -density.flatten(1).sum(1) / 2


def elbo(log_likelihood: PerRow, mean: Tensor, logvar: Tensor) -> PerRow:
    """log p(x | z) - KL(q(z | x) || N(0, I)), a variational autoencoder's bound on log p(x) in
    nats, z being mean + e^(logvar/2) eps (Kingma & Welling 2014, eq. 10)."""
    return log_likelihood - kl(mean, logvar)


def hybrid_loss(
    model: Model,
    x0: Data,
    t: Time,
    eps: Data,
    cond: Cond = NULL,
    weight: Weight | None = None,
    *,
    steps: int = 1000,
    share: float = 1e-3,
) -> PerRow:
    """L_simple + share L_vlb for a model of learned variance (Nichol & Dhariwal 2021, eq. 16).

    L_vlb, in nats an element, sums a bound over `steps` steps, of which that from t stands for all.
    It teaches the variance alone: its mean is detached. On the step to the data it is the negative
    log-likelihood of x0, elsewhere a KL.
    """
    error, out, fraction = _squared_error(model, x0, t, eps, cond, weight)
    assert fraction is not None, "a model without learned variance has no bound to add"
    estimate = model.read(out.detach(), model.path.noise(x0, eps, t), t, cond)
    u = t - 1 / steps
    u = torch.where(u < 0.5 / steps, 0, u)  # the chain has no state between the data and 1/steps
    return error + share * steps * variance_bound(model.path, x0, estimate, fraction, t, u)


def variance_bound(
    path: Path, x0: Data, estimate: Data, fraction: Data, t: Time, u: Time
) -> PerRow:
    """KL(q(x_u | x_t, x0) || p(x_u | x_t)), mean over a row's elements, p with D = `estimate`."""
    a_u, s_u = path.at(u, x0)
    small, large = (like(width, x0) for width in path.posterior(t, u))
    none = torch.zeros_like(x0)  # both means have the same part of x_t
    mean, mean_to = (path.back(none, data, t, u, small) for data in (x0, estimate))
    at_data = s_u == 0  # there the small width is 0, q is a point, and the large one serves alone
    floor = torch.where(at_data, large, small)
    logvar = 2 * torch.lerp(floor.log(), large.log(), fraction)
    divergence = kl(mean, 2 * floor.log().expand_as(x0), mean_to, logvar)
    surprise = -gaussian_log_prob(a_u * x0, a_u * estimate, logvar)
    return torch.where(at_data.flatten(), surprise, divergence) / x0[0].numel()
