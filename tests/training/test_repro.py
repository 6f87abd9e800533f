"""What diverged can be run again: the same update, from the same state, with the same draws."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from training import health, repro, results
from training.job import Job, World, run
from training.loop import Diverged
from training.stage import Stage


@dataclass(frozen=True)
class RootConfig:
    kind: str = "root"


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


class Roots(Stage):
    """Its loss is no number where a row's first value is negative."""

    kind = "root"

    def __init__(self, config: RootConfig):
        super().__init__(config)
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.root = Root()

    def forward(self, batch):
        y = self.net(batch["x"])[:, 0] + self.root(batch["x"][:, 0])
        return {"loss": (y - batch["y"]).square()}


class Rows:
    def __init__(self, bad: dict[int, int]):
        self.bad = bad

    def batches(self, start_step: int = 0, prefetch: int = 2):
        while True:
            x = np.random.default_rng(start_step).uniform(size=(4, 3)).astype(np.float32)
            if start_step in self.bad:
                x[self.bad[start_step], 0] = -1
            keys = [f"{start_step}/{row}" for row in range(4)]
            yield {"x": x, "y": x.sum(1), "key": keys}
            start_step += 1


def made(output: Path) -> Job:
    training = {"images": 200, "batch": 4, "max_skipped": 2, "threads": 1, "log_images": 40}
    training |= {"checkpoint_images": 40, "learning_rate": 1e-2}
    return Job(kind="root", fingerprint="f", config={}, training=training, output=str(output))


def builder(bad: dict[int, int], seen: list[torch.Tensor] | None = None):
    def build(job: Job, world: World):
        stage = Roots(RootConfig())
        if seen is not None:
            stage.net[1].register_forward_hook(lambda m, given, out: seen.append(out.detach()))
        return stage, Rows(bad), "d"

    return build


@pytest.mark.parametrize(("every", "looked"), [(1, 29), (16, 32)])
def test_the_update_that_diverged_is_run_again(tmp_path, monkeypatch, every, looked):
    """Also where nobody looks before others, which were finite, would have been applied."""
    monkeypatch.setattr(health, "looks_every", lambda _: every)
    seen: list[torch.Tensor] = []
    bad = {27: 1, 28: 3, 29: 0}
    with pytest.raises(Diverged, match="29/0. .*To run that update again: python -m") as caught:
        run(made(tmp_path), build=builder(bad, seen))
    file = Path(str(caught.value).rpartition(" ")[2])
    assert file == tmp_path / results.REPRO / repro.FILE
    told = json.loads(file.read_text())
    assert told["step"] == 29 and told["keys"] == ["27/1", "28/3", "29/0"]

    drawn = seen[29 - looked - 1]
    seen.clear()
    found = repro.again(file, builder(bad, seen))
    assert torch.equal(seen[-1], drawn)  # weights, dropout and batch are those
    assert (found.step, found.keys, found.finite) == (29, ["29/0"], False)
    assert found.module == "root (Root)"
    assert "net.0.weight" in found.parameters
    assert "samples whose loss is not finite: 29/0" in found.text
    assert repro.again(file, builder({})).finite


class Parts:
    """The same rows, cut into so many parts."""

    def __init__(self, bad: dict[int, int], parts: int):
        self.whole, self.parts = Rows(bad), parts

    def batches(self, start_step: int = 0, prefetch: int = 2):
        for batch in self.whole.batches(start_step):
            for own in np.array_split(np.arange(len(batch["y"])), self.parts):
                yield {
                    name: [values[i] for i in own] if name == "key" else values[own]
                    for name, values in batch.items()
                }


def test_the_batch_is_cut_as_it_was(tmp_path):
    """Four rows in three parts: two, one and one; parts of two at most would be two of them."""
    seen: list[torch.Tensor] = []

    def build(job: Job, world: World):
        stage, parts = Roots(RootConfig()), job.micro_batches(world.size)
        stage.net[1].register_forward_hook(lambda m, given, out: seen.append(out.detach()))
        return stage, Parts({0: 0, 1: 0, 2: 0}, parts), "d"

    job = made(tmp_path)
    with pytest.raises(Diverged):
        run(
            replace(job, training=job.training | {"workers": 3, "min_workers": 1}),
            World(),
            None,
            build,
        )
    drawn = seen[-3:]
    assert [len(it) for it in drawn] == [2, 1, 1]
    seen.clear()
    assert repro.again(tmp_path / results.REPRO / repro.FILE, build).keys == ["2/0"]
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen, drawn, strict=True))


def test_what_diverges_at_once_leaves_where_it_began(tmp_path):
    with pytest.raises(Diverged):
        run(made(tmp_path), build=builder({0: 0, 1: 0, 2: 0}))
    found = repro.again(tmp_path / results.REPRO / repro.FILE, builder({2: 0}))
    assert (found.step, found.keys) == (2, ["2/0"])


def test_the_command_reads_the_data_set_again(line, tmp_path, monkeypatch, capsys):
    from pipeline.encode import pixels_spec

    spec = pixels_spec(16)
    job = Job(
        kind="autoencoder",
        fingerprint="f",
        config={"network": {"channels": 8, "channel_mult": [1], "latent_channels": 3}},
        training={"images": 320, "batch": 16, "learning_rate": 1e30, "threads": 1},
        dataset=line.data.dataset,
        version=line.data.version,
        encodings=({"name": spec.name, "kind": spec.kind, "fingerprint": spec.fingerprint},),
        output=str(tmp_path),
    )
    with pytest.raises(Diverged) as caught:
        run(job)
    file = str(caught.value).rpartition(" ")[2]
    monkeypatch.setattr(sys, "argv", ["repro", file])
    assert repro.main() == 1
    out = capsys.readouterr().out
    assert out.startswith(f"step {caught.value.step}: loss ")
    assert "not finite" in out
