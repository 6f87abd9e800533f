"""Updates against torch's own, and against nothing at all where they are skipped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from training.networks import (
    AutoencoderConfig,
    DiTConfig,
    PriorConfig,
    UNetConfig,
    build,
)
from training.networks.conditioning import ContextConfig
from training.optimizer import AdamWConfig, MuonConfig, Optimizer, gradient_norm, orthogonal

CONFIGS = [AdamWConfig(weight_decay=0.1), MuonConfig(weight_decay=0.1)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 24, 3, padding=1),
        nn.Flatten(),
        nn.Linear(24 * 16, 4),
    )


def gradients(module: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.grad = size * torch.randn(p.shape, generator=generator)


def grads(module: nn.Module) -> list[Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


def step(
    optimizer: Optimizer, rate: float = 1e-2, max_norm: float = 1.0, skip: bool = False
) -> None:
    norm = gradient_norm(optimizer.parameters)
    optimizer.step(rate, norm, max_norm, torch.tensor(skip))
    optimizer.zero_grad()


def state(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    named = {**dict(module.named_parameters()), **optimizer.tensors()}
    return {n: t.detach().clone() for n, t in named.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(t.equal(b[n]) for n, t in a.items())


@pytest.mark.parametrize("size", [0.001, 30.0])
def test_adamw_is_torchs_with_clipping(size):
    ours, theirs = network(), network()
    optimizer = Optimizer(AdamWConfig(beta2=0.95, weight_decay=0.1), ours)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    for seed, rate in enumerate([1e-2, 3e-3, 1e-3]):
        gradients(ours, seed, size)
        gradients(theirs, seed, size)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        step(optimizer, rate)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_the_norm_is_that_of_all_gradients_together():
    module = network()
    gradients(module, 0)
    expected = torch.cat([g.flatten() for g in grads(module)]).norm()
    torch.testing.assert_close(gradient_norm(dict(module.named_parameters())), expected)
    grads(module)[0][0, 0, 0, 0] = float("inf")
    assert gradient_norm(dict(module.named_parameters())).isinf()


def test_a_loss_that_depends_on_nothing_trained_is_refused():
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        gradient_norm(dict(network().named_parameters()))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_a_skipped_update_changes_no_bit(config):
    module = network()
    optimizer = Optimizer(config, module)
    gradients(module, 0)
    step(optimizer)
    before = state(module, optimizer)
    gradients(module, 1)
    grads(module)[0][0] = float("nan")
    step(optimizer, skip=True)
    assert equal(before, state(module, optimizer))
    gradients(module, 2)
    step(optimizer)
    assert not equal(before, state(module, optimizer))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_a_loaded_state_goes_on_bit_for_bit(config):
    module = network()
    optimizer = Optimizer(config, module)
    gradients(module, 0)
    step(optimizer)
    other = copy.deepcopy(module)
    resumed = Optimizer(config, other)
    resumed.load({n: t.clone() for n, t in optimizer.tensors().items()})
    for one, its in ((module, optimizer), (other, resumed)):
        gradients(one, 1)
        step(its)
    assert equal(state(module, optimizer), state(other, resumed))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.kind)
def test_clipping_bounds_what_an_update_sees(config):
    """Gradients a thousand times as large, clipped to the same norm, make the same update."""
    ends = []
    for size in (10.0, 10_000.0):
        module = network()
        optimizer = Optimizer(config, module)
        gradients(module, 0, size)
        step(optimizer, max_norm=1.0)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


def test_frozen_parameters_are_left_alone():
    module = network()
    module[0].requires_grad_(False)
    optimizer = Optimizer(AdamWConfig(weight_decay=0.1), module)
    before = module.state_dict()["0.weight"].clone()
    gradients(module, 0)
    step(optimizer)
    assert module.state_dict()["0.weight"].equal(before)


def test_muon_takes_the_inner_matrices_only():
    module = network()
    optimizer = Optimizer(MuonConfig(), module)
    gradients(module, 0)
    step(optimizer)
    fields = {key: name for name, _, key in (k.rpartition(":") for k in optimizer.tensors())}
    assert fields["momentum"] == "1.weight"  # 0 reads 3 channels, 3 writes 4
    moved = module.state_dict()["1.weight"] - network().state_dict()["1.weight"]
    singular = torch.linalg.svdvals(moved.reshape(24, -1) / (1e-2 * 0.2 * 144**0.5))
    assert singular.min() > 0.6 and singular.max() < 1.3


CLIP = ContextConfig(name="clip", width=24, pooled_width=20)
LATENT = {"in_channels": 4, "patch": 2, "contexts": (CLIP,)}
"""16 numbers to a square, as wide as what is inside."""


@pytest.mark.parametrize(
    ("config", "inner"),
    [
        (DiTConfig(width=32, depth=2, head_width=8, **LATENT), ("blocks.", "modulation")),
        (UNetConfig(channels=16, head_width=16, **LATENT), ("down.levels", "down.shrink",
         "down.middle", "up.")),
        (PriorConfig(vector=24, width=32, depth=1, head_width=8), ("blocks.",)),
        (AutoencoderConfig(channels=16, in_channels=4, patch=2, latent_channels=16),
         ("encoder.", "decoder.")),
    ],
    ids=lambda it: getattr(it, "kind", ""),
)  # fmt: skip
def test_muon_takes_no_layer_that_takes_in_or_gives_out_however_wide(config, inner):
    module = build(config)
    optimizer = Optimizer(MuonConfig(), module)
    gradients(module, 0)
    step(optimizer)
    fields = (key.rpartition(":") for key in optimizer.tensors())
    taken = {name for name, _, field in fields if field == "momentum"}
    matrices = {n for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    wanted = {f"{name}.weight" for name in matrices if name.startswith(inner)}
    if isinstance(config, AutoencoderConfig):
        for way in ("encoder", "decoder"):
            last = len(list(module.get_submodule(way).children())) - 1
            wanted -= {f"{way}.0.weight", f"{way}.{last}.weight"}
    assert taken == wanted


def test_a_state_of_another_division_is_refused():
    module = network()
    optimizer = Optimizer(MuonConfig(), module)
    gradients(module, 0)
    step(optimizer)
    with pytest.raises(ValueError, match="has 'momentum' for 1.weight, which is updated otherwise"):
        Optimizer(AdamWConfig(), module).load(optimizer.tensors())


@pytest.mark.parametrize("shape", [(2, 32, 64), (3, 64, 32), (1, 40, 40)])
def test_newton_schulz_makes_matrices_orthogonal_and_keeps_their_directions(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    got = orthogonal(matrices)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    singular = torch.linalg.svdvals(got)
    assert singular.min() > 0.4 and singular.max() < 1.3
    diagonal = (u.mT @ got @ v.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(diagonal.sort().values, singular.sort().values, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamWConfig(beta1=1.0), "beta1"),
        (lambda: AdamWConfig(weight_decay=-1), "weight_decay"),
        (lambda: MuonConfig(momentum=1.0), "momentum"),
        (lambda: MuonConfig(newton_schulz_steps=0), "newton_schulz_steps"),
    ],
)
def test_configs_refuse_what_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()
