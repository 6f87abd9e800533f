"""The tests' ground truth: a Gaussian mixture, whose denoiser is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from training.diffusion.path import Path
from training.diffusion.prediction import Cond, Denoiser

torch.set_num_threads(1)


@dataclass(frozen=True)
class Mixture:
    """sum_k share_k N(mean_k, width_k^2 I) in d dimensions; "y" in a condition names the
    component."""

    shares: Tensor
    means: Tensor
    widths: Tensor

    def draw(self, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Samples [rows, d] and their components."""
        random = torch.Generator().manual_seed(seed)
        y = torch.multinomial(self.shares, rows, replacement=True, generator=random)
        eps = torch.randn(rows, self.means.shape[1], generator=random, dtype=torch.float64)
        return self.means[y] + self.widths[y, None] * eps, y

    def log_joint(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """log p(x_t, y) [rows, K] at the level (a, s), each [] or [rows]."""
        a, s = a.reshape(-1, 1), s.reshape(-1, 1)
        variance = (a * self.widths) ** 2 + s**2
        squares = (x[:, None] - a[..., None] * self.means).square().sum(-1)
        log_scale = self.means.shape[1] / 2 * (2 * torch.pi * variance).log()
        return self.shares.log() - squares / (2 * variance) - log_scale

    def log_prob(self, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=x.dtype)
        return self.log_joint(x, one, 0 * one).logsumexp(1)

    def denoiser(self, path: Path) -> Denoiser:
        """E[x0 | x_t], given the component in rows that have and keep a "y"."""

        def denoise(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            a, s = path(t)
            logits = self.log_joint(x, a, s)
            if "y" in cond:
                keep = cond.get("keep", torch.ones(len(x), dtype=torch.bool))
                only = torch.nn.functional.one_hot(cond["y"], len(self.shares)).bool()
                logits = logits.masked_fill(keep[:, None] & ~only, -torch.inf)
            a, s = a.reshape(-1, 1, 1), s.reshape(-1, 1, 1)
            gain = a * self.widths[:, None] ** 2 / ((a * self.widths[:, None]) ** 2 + s**2)
            each = self.means + gain * (x[:, None] - a * self.means)
            return (logits.softmax(1)[..., None] * each).sum(1)

        return denoise

    def component(self, x: Tensor) -> Tensor:
        one = torch.ones((), dtype=x.dtype)
        return self.log_joint(x, one, 0 * one).argmax(1)

    def errors(self, x: Tensor) -> tuple[float, float, float]:
        """Largest errors of the samples' mean, covariance and shares of the components."""
        mean = self.shares @ self.means
        spread = torch.diag_embed((self.widths**2)[:, None].expand_as(self.means))
        covariance = torch.einsum("k,kij->ij", self.shares, spread) + torch.cov(
            self.means.T, correction=0, aweights=self.shares
        )
        shares = torch.bincount(self.component(x), minlength=len(self.shares)) / len(x)
        return (
            (x.mean(0) - mean).abs().max().item(),
            (torch.cov(x.T) - covariance).abs().max().item(),
            (shares - self.shares).abs().max().item(),
        )


@pytest.fixture
def mixture() -> Mixture:
    """Three components in the plane, apart enough to have shares and near enough to overlap in
    noise."""
    return Mixture(
        torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
        torch.tensor([[-1.5, 0.5], [1.0, 1.5], [0.5, -1.0]], dtype=torch.float64),
        torch.tensor([0.3, 0.4, 0.25], dtype=torch.float64),
    )


@pytest.fixture
def gaussian() -> Mixture:
    """One component: the probability-flow ODE has a closed form too."""
    return Mixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[0.7, -0.4]], dtype=torch.float64),
        torch.tensor([0.6], dtype=torch.float64),
    )
