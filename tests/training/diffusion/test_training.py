"""One loss and one sampler train and sample every system, changed by their configs alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from training.diffusion import DiffusionConfig, SamplerConfig, loss, normal, uniform
from training.diffusion.draws import stream


class Toy(nn.Module):
    """A 96-wide network on the plane, told the level and the class."""

    def __init__(self, score: bool = False):
        super().__init__()
        self.score = score
        self.classes = nn.Embedding(4, 16)  # the last is the null
        self.layers = nn.Sequential(
            nn.Linear(2 + 16 + 16, 96), nn.SiLU(), nn.Linear(96, 96), nn.SiLU(),
            nn.Linear(96, 96), nn.SiLU(), nn.Linear(96, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, label: Tensor, cond) -> Tensor:
        angles = label[:, None] * math.pi / 2 * 2.0 ** torch.arange(-2, 6)
        y = self.classes(torch.where(cond["keep"], cond["y"], 3))
        out = self.layers(torch.cat([x, angles.sin(), angles.cos(), y], 1))
        # A score grows as 1/s: divided by it here, as NCSNv2 does (Song & Ermon 2020, technique 3).
        return out / (4 * label[:, None]).exp() if self.score else out


def trained(mixture, config: DiffusionConfig, steps: int, rows: int = 512):
    """A model of the mixture, half of whose rows see no class."""
    torch.manual_seed(0)
    network = Toy(score=config.prediction == "score")
    model, weight = config.build_model(network), config.build_weight()
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    data, y = mixture.draw(rows * 64)
    for step in range(steps):
        position = torch.arange(step * rows, (step + 1) * rows)
        row = position % len(data)
        x0, eps = data[row].float(), normal(0, "noise", position, (2,))
        cond = {"y": y[row], "keep": uniform(0, "drop", position) > 0.5}
        t = config.draw_times(0, position)
        loss(model, x0, t, eps, cond, weight).mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model


@torch.no_grad()
def drawn(model, sampler: SamplerConfig, rows: int, y: int = 0, keep: bool = False) -> Tensor:
    position = torch.arange(rows)
    cond = {"y": torch.full((rows,), y), "keep": torch.full((rows,), keep)}
    eps = normal(1, "start", position, (2,))
    return sampler.sample(model, eps, cond, noise=stream(1, "noise", position)).double()


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """W2 over 128 directions; between two draws of 4,000 from the mixture it is about .03."""
    angles = torch.arange(128, dtype=torch.float64) * math.pi / 128
    directions = torch.stack([angles.cos(), angles.sin()])
    gap = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return gap.square().mean().sqrt().item()


def check(mixture, config, sampler: SamplerConfig, steps: int, tolerance, rows: int = 4000):
    """`tolerance` is that of the mean, the shares of the components, and sliced W2."""
    model = trained(mixture, config, steps)
    x = drawn(model, sampler, rows)
    mean, _, shares = mixture.errors(x)
    errors = mean, shares, sliced_wasserstein(x, mixture.draw(rows, seed=5)[0])
    assert all(e < bound for e, bound in zip(errors, tolerance, strict=True)), errors
    rates = []
    for guidance in (0.0, 1.0, 3.0):
        x = drawn(model, replace(sampler, guidance=guidance), 1000, y=0, keep=True)
        rates.append((mixture.component(x) == 0).double().mean().item())
    assert abs(rates[0] - 0.2) < 0.1, rates
    assert min(rates[1:]) > 0.97, rates


def test_flow_learns_the_mixture(mixture):
    sampler = SamplerConfig(kind="dpmpp2m", steps=16)
    check(mixture, DiffusionConfig(), sampler, 300, (0.2, 0.12, 0.5), rows=1500)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sampler"),
    [
        (
            DiffusionConfig(path="vp", prediction="eps", times="uniform"),
            SamplerConfig(kind="ddim", eta=1.0, steps=200),
        ),
        (
            DiffusionConfig(path="cosine", prediction="v", weight="min_snr", times="uniform"),
            SamplerConfig(kind="ddim", steps=60),
        ),
        (
            DiffusionConfig(path="ve", prediction="score", weight="snr", times="discrete"),
            SamplerConfig(kind="ddim", eta=1.0, steps=200),
        ),
        (
            DiffusionConfig(
                path="edm", prediction="edm", times="lognormal", times_mean=-1.2, times_std=1.2
            ),
            SamplerConfig(kind="heun", grid="karras", steps=18),
        ),
        (DiffusionConfig(times="uniform"), SamplerConfig(kind="ddim", steps=60)),
        (
            DiffusionConfig(prediction="x0", weight="flow", weight_limit=400.0, times="uniform"),
            SamplerConfig(kind="ddim", steps=60),
        ),
    ],
    ids=["ddpm", "v", "ncsn", "edm", "flow", "x0"],
)
def test_every_system_learns_the_mixture(mixture, config, sampler):
    check(mixture, config, sampler, 4000, (0.1, 0.036, 0.106))
