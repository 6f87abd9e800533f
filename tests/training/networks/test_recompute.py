"""Blocks computed again on the way back: the same bits for less memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from training.networks import DiTConfig, EfficientUNetConfig, UNetConfig, build


class Live(TorchDispatchMode):
    """Counts the bytes of what was computed and is still held; `peak` is the most at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place not in self.known:
            self.known.add(place)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def step(network, *args):
    """(loss, output, gradients) of a training step, dropout included."""
    torch.manual_seed(3)
    network.zero_grad()
    out = network(*args)
    loss = out.square().mean()
    loss.backward()
    return loss, out, {name: p.grad for name, p in network.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("unet", {"dropout": 0.3, "learned_variance": True}),
        ("dit", {}),
        ("mmdit", {}),
        ("efficient_unet", {"dropout": 0.3}),
    ],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit(tiny, awake, cond, kind, changes, precision):
    plain = awake(tiny(kind, **changes)).train()
    thrifty = build(replace(plain.config, recompute=True))
    thrifty.load_state_dict(plain.state_dict())
    args = torch.randn(3, 4, 8, 8), torch.rand(3), cond
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        (loss, out, kept), (again, other, computed) = (step(n, *args) for n in (plain, thrifty))
    assert torch.equal(loss, again)
    assert torch.equal(out, other)
    assert kept.keys() == computed.keys()
    for name, slope in kept.items():
        assert torch.equal(slope, computed[name]), name


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(channels=32, channel_mult=(1,), attention=(1,), blocks=6),
        DiTConfig(width=64, depth=12, head_width=16),
        EfficientUNetConfig(
            in_channels=4,
            low_channels=0,
            channels=32,
            channel_mult=(1,),
            blocks=(8,),
            attention=(0,),
        ),
    ],
    ids=lambda config: config.kind,
)
def test_recomputing_lowers_the_peak(config):
    """Of everything that a step holds at once: activations, gradients and what is computed anew."""
    peaks = []
    for recompute in (False, True):
        torch.manual_seed(0)
        network = build(replace(config, recompute=recompute))
        args = torch.randn(8, 4, 16, 16), torch.rand(8)
        with Live() as live:
            step(network, *args)
        peaks.append(live.peak)
    assert peaks[1] < 0.6 * peaks[0]


def test_without_gradients_nothing_is_kept_anyway(tiny, awake, cond, monkeypatch):
    from training.networks import layers

    monkeypatch.setattr(layers, "checkpoint", None)
    network = awake(tiny("dit", recompute=True))
    with torch.no_grad():
        assert network(torch.randn(3, 4, 8, 8), torch.rand(3), cond).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "dit", "mmdit", "efficient_unet"])
def test_it_compiles(tiny, awake, cond, kind):
    network = awake(tiny(kind, recompute=True)).train()
    args = torch.randn(3, 4, 8, 8), torch.rand(3), cond
    _, out, slopes = step(network, *args)
    _, other, again = step(torch.compile(network, backend="aot_eager"), *args)
    torch.testing.assert_close(other, out, rtol=1e-4, atol=1e-5)
    for name, slope in slopes.items():
        torch.testing.assert_close(again[f"_orig_mod.{name}"], slope, rtol=1e-3, atol=1e-4)
