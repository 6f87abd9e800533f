"""What every stage builds on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from training.stage import Stage, copy_exactly, distinct_tensors, evaluating, seed_of, to_tensors


def test_batches_become_tensors_with_their_values():
    half = np.array([[0.5, -2.0]], np.float16)
    half.flags.writeable = False
    batch = {
        "tokens": half,
        "mask": np.array([[True, False]]),
        "pixels": np.arange(6, dtype=np.uint8).reshape(1, 6),
        "position": np.array([7]),
        "caption": ["a red square"],
        "epoch": 3,
    }
    got = to_tensors(batch)
    assert got["tokens"].dtype == torch.float32
    assert got["tokens"].tolist() == [[0.5, -2.0]]
    assert got["mask"].dtype == torch.bool
    assert got["pixels"].dtype == torch.uint8
    assert got["position"].dtype == torch.int64
    assert got["caption"] == ["a red square"]
    assert got["epoch"] == 3


def test_a_read_only_array_is_not_written_through():
    source = np.zeros(3, np.float32)
    source.flags.writeable = False
    to_tensors({"x": source})["x"] += 1
    assert source.tolist() == [0, 0, 0]


def test_tied_weights_are_one_tensor():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 3)
            self.head = nn.Linear(3, 4, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(()))
            self.register_buffer("cache", torch.ones(()), persistent=False)

    module = Tied()
    assert list(distinct_tensors(module)) == ["scale", "embed.weight"]
    assert distinct_tensors(module)["embed.weight"] is module.embed.weight


def test_evaluating_gives_each_module_its_mode_back():
    module = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2)).train()
    module[1].eval()
    with pytest.raises(KeyError), evaluating(module):  # noqa: PT012
        assert not any(m.training for m in module.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training, module[0].training, module[1].training] == [True, True, False]


def test_copying_names_what_differs():
    target = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"a \(it has \[4\], wanted \[2\]\), b \(it has none"):
        copy_exactly({"a": torch.ones(4)}, target, "x.safetensors")
    copy_exactly({"a": torch.ones(2), "b": torch.ones(3)}, target, "x.safetensors")
    assert target["a"].tolist() == [1, 1]


def test_seeds_depend_on_every_part_and_on_nothing_else():
    seeds = {seed_of(*parts) for parts in [(0, 1), (1, 0), (0, 1, 0), ("0", "11"), ("01", "1")]}
    assert len(seeds) == 5
    assert seed_of(0, "noise", 3) == seed_of(0, "noise", 3)
    assert min(seeds) >= 0 and max(seeds) < 2**63


def test_a_stage_without_a_forward_says_so():
    with pytest.raises(TypeError, match="Stage defines no forward"):
        Stage(None)({})
