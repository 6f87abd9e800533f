"""A stage directory after kills, signals and second starts is that of an undisturbed run, byte for
byte.

Run as a script, this file is the process that is disturbed: `test_job.py SPEC.json`.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.plan import BatchPlan
from training import checkpoint, job, results
from training.job import Job, run
from training.resuming import differences
from training.stage import Stage, to_tensors
from training.supervision import Stopped

STEPS_OF_A_PREVIEW = 4


@dataclass(frozen=True)
class TinyConfig:
    kind: str = "tiny"
    width: int = 16


class Tiny(Stage):
    """Denoises vectors: noise from (seed, position), dropout from torch's generator, a measured
    buffer."""

    kind = "tiny"
    fails_to_finish = False

    def __init__(self, config: TinyConfig):
        super().__init__(config)
        width = config.width
        self.net = nn.Sequential(
            nn.Linear(4, width), nn.SiLU(), nn.Dropout(0.1), nn.Linear(width, 4)
        )
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(4))

    def prepare(self, loader):
        self.mean.copy_(to_tensors(loader.batch(0))["x"].mean(0))

    def forward(self, batch):
        x = batch["x"] - self.mean
        phase = batch["position"][:, None] * torch.tensor([1.0, 2.0, 3.0, 5.0]) + self.seed
        loss = (self.net(x + torch.sin(phase)) - x).square().mean(1)
        return {"loss": loss, "size": x.abs().mean()}

    def finish(self, loader):
        if self.fails_to_finish:
            raise RuntimeError("no room")
        assert not self.training
        with torch.no_grad():
            return {"final": self(to_tensors(loader.batch(0)))["loss"].mean().item()}

    def preview(self, loader, seed, beat):
        for _ in range(STEPS_OF_A_PREVIEW):
            beat()
        return np.full((5, 8, 6, 3), 128, np.uint8)


class TinyLoader:
    """Real plan, made-up samples; `pause` seconds for each batch."""

    def __init__(self, batch: int, seed: int, worker: int, workers: int, pause: float):
        self.plan, self.worker, self.workers = (
            BatchPlan((40, 60), "d", seed, batch),
            worker,
            workers,
        )
        self.data = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float16)
        self.pause = pause

    def batch(self, step: int):
        rows, indices = self.plan.slice(step, self.worker, self.workers)
        position = step * self.plan.global_batch + rows
        keys = [f"k{i}" for i in indices.tolist()]
        return {"x": self.data[indices], "position": position, "key": keys}

    def batches(self, start_step: int = 0, prefetch: int = 2):
        while True:
            time.sleep(self.pause)
            yield self.batch(start_step)
            start_step += 1


def build(job: Job, world):
    loader = TinyLoader(
        job.training["batch"], job.seed, world.rank, world.size, job.meta.get("pause", 0)
    )
    stage = Tiny(TinyConfig(**job.config))
    stage.fails_to_finish = job.meta.get("fails_to_finish", False)
    return stage, loader, "the data"


def tiny(output: Path, **changes) -> Job:
    training = {
        "images": 8 * 150,
        "batch": 8,
        "learning_rate": 1e-2,
        "warmup_images": 80,
        "schedule": "linear",
        "checkpoint_images": 160,
        "log_images": 56,  # no divisor of the former: a window is open at most checkpoints
        "ema_halflife_images": 200,
        "threads": 1,
    }
    training |= changes.pop("training", {})
    made = Job(
        kind="tiny", fingerprint="f1", config={}, training=training, output=str(output), seed=3
    )
    return replace(made, **changes)


CLOCKS = (
    "seconds",
    "images_per_second",
    "data_wait_share",
    "flops_per_second",
    "peak_memory_bytes",
)


def lines(stage_dir: Path) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in CLOCKS} for r in results.history(stage_dir)]


def reached(stage_dir: Path) -> int:
    state = checkpoint.newest(stage_dir / results.CHECKPOINTS)
    return state.images_seen if state else 0


def finished(stage_dir: Path) -> dict:
    done = results.committed(stage_dir)
    assert done is not None
    return done


def assert_same(stage_dir: Path, undisturbed: Path) -> None:
    for name in (results.WEIGHTS, results.PREVIEW, results.CONFIG):
        assert (stage_dir / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert lines(stage_dir) == lines(undisturbed)
    one, other = finished(stage_dir), finished(undisturbed)
    assert {**one, "seconds": 0, "meta": {}} == {**other, "seconds": 0, "meta": {}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed")
    run(tiny(output), build=build)
    return output


def test_a_finished_directory_holds_what_is_promised(undisturbed):
    done = finished(undisturbed)
    stage, loader, _ = build(tiny(undisturbed), job.World())
    stage.seed = 3
    stage.load_state_dict(checkpoint.load_file(undisturbed / results.WEIGHTS))
    assert stage.eval().finish(loader) == pytest.approx(done["measured"], rel=1e-6)
    assert done["measured"]["final"] < 0.8 * lines(undisturbed)[0]["loss"]
    wanted = {"kind": "tiny", "fingerprint": "f1", "data_digest": "the data", "images_seen": 1200}
    assert wanted.items() <= done.items()
    assert done["config"] == {"kind": "tiny", "width": 16}
    assert done["weights_sha256"] == job.storage.sha256(undisturbed / results.WEIGHTS)
    assert done["parameters"] == 4 * 16 + 16 + 16 * 4 + 4
    assert json.loads((undisturbed / results.CONFIG).read_text())["kind"] == "tiny"
    seen = [line["images_seen"] for line in lines(undisturbed)]
    assert seen == [*range(56, 1200, 56), 1200]
    assert {"loss", "size", "grad_norm", "learning_rate", "skipped", "step"} < set(
        lines(undisturbed)[0]
    )
    with Image.open(undisturbed / results.PREVIEW) as sheet:
        assert sheet.size == (2 + 3 * 8, 2 + 2 * 10)


def never(job, world):
    raise AssertionError("built")


def test_what_is_finished_is_not_trained_again(undisturbed):
    again = run(tiny(undisturbed), build=never)
    assert again == results.committed(undisturbed)


def test_a_directory_belongs_to_one_training(undisturbed, tmp_path):
    with pytest.raises(ValueError, match=r"stage.json is of training f1, but this is training f2"):
        run(tiny(undisturbed, fingerprint="f2"), build=build)
    run(tiny(tmp_path), build=build)
    (tmp_path / results.STAGE).unlink()
    with pytest.raises(ValueError, match=r"job.json is of training f1, but this is training f2"):
        run(tiny(tmp_path, fingerprint="f2"), build=build)


MUONS = {"kind": "muon"}


@pytest.mark.parametrize(
    ("training", "more", "named"),
    [
        ({"learning_rate": 5.0}, {}, r"training.learning_rate: begun with 0.01, asked 5.0"),
        ({"batch": 16}, {}, r"training.batch: begun with 8, asked 16"),
        ({"images": 2400}, {}, r"training.images: begun with 1200, asked 2400"),
        ({"optimizer": MUONS}, {}, r'training.optimizer.kind: begun with "adamw", asked "muon"'),
        ({"ema_ramp": 0.5}, {}, r"training.ema_ramp: begun with 0.05, asked 0.5"),
        ({}, {"seed": 4}, r"seed: begun with 3, asked 4"),
        ({}, {"config": {"width": 8}}, r"config.width: begun with nothing, asked 8"),
        ({}, {"version": 2}, r"version: begun with 0, asked 2"),
        ({}, {"parent": "p"}, r'parent: begun with null, asked "p"'),
    ],
)  # fmt: skip
def test_what_may_not_change_on_resume_is_named(tmp_path, undisturbed, training, more, named):
    """Also where the fingerprint is the same, begun or finished; nothing is written then."""
    with pytest.raises(Stopped):
        run(tiny(tmp_path), job.World(stop=lambda: True), build=build)
    before = (tmp_path / results.JOB).read_bytes()
    for output in (tmp_path, undisturbed):
        with pytest.raises(ValueError, match=rf"job.json: {named}(;.*)? ask for what it was begun"):
            run(tiny(output, training=training, **more), build=never)
    assert (tmp_path / results.JOB).read_bytes() == before
    fields = {"fingerprint": "f2"} | more
    told = rf"job.json is of training f1, but this is training f2 \(.*{named}"
    with pytest.raises(ValueError, match=told):
        run(tiny(tmp_path, training=training, **fields), build=never)


def test_what_changes_no_result_may_change_on_resume(tmp_path, undisturbed):
    """A value that is left out is its default."""
    with pytest.raises(Stopped):
        run(tiny(tmp_path), job.World(stop=lambda: True), build=build)
    free = {"stall_seconds": 60.0, "max_skipped": 9, "preview_images": 400, "keep_images": 400}
    same = {"ema_ramp": 0.05, "optimizer": {"kind": "adamw"}, "log_images": 56}
    run(tiny(tmp_path, training=free | same | {"checkpoint_images": 320}), build=build)
    assert lines(tmp_path) == lines(undisturbed)
    weights = [(d / results.WEIGHTS).read_bytes() for d in (tmp_path, undisturbed)]
    assert weights[0] == weights[1]


def test_another_kind_of_device_is_taken_when_it_is_asked_for(tmp_path, undisturbed):
    """What a checkpoint says of a GPU that is not here any more."""
    with pytest.raises(Stopped):
        run(tiny(tmp_path), job.World(stop=lambda: True), build=build)
    state = checkpoint.newest(tmp_path / results.CHECKPOINTS)
    assert state is not None and state.numbers[checkpoint.DEVICE] == "cpu"
    state.numbers[checkpoint.DEVICE] = "cuda"
    checkpoint.save(tmp_path / results.CHECKPOINTS, state, "f1")
    wanted = r"trained on cuda so far, and would go on on cpu: .*training.device=cpu to go on there"
    for _ in range(2):
        with pytest.raises(ValueError, match=wanted):
            run(tiny(tmp_path), job.World(), build=build)
    assert reached(tmp_path) == 8
    with pytest.raises(Stopped):
        run(tiny(tmp_path, training={"device": "cpu"}), job.World(stop=lambda: True), build=build)
    run(tiny(tmp_path), job.World(), build=build)  # by now it is a training on a CPU
    assert_same(tmp_path, undisturbed)


def test_a_gpu_that_is_asked_for_and_not_here_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="training.device is cuda, and torch finds no GPU here"):
        run(tiny(tmp_path, training={"device": "cuda"}), build=never)


def test_a_home_that_moved_as_a_whole_changes_nothing(tmp_path):
    begun, moved = (
        tiny(
            tmp_path,
            dataset=f"{home}/datasets/shapes",
            inputs={"clip": f"{home}/stages/clip-1"},
            parent=f"{home}/stages/base-0",
        ).to_json()
        for home in ("/old", "s3://bucket/new")
    )
    assert differences(begun, moved) == []
    moved["inputs"]["clip"] = "/old/stages/clip-2"
    assert differences(begun, moved) == ['inputs.clip: begun with "clip-1", asked "clip-2"']


def test_each_line_is_handed_over_as_it_is_written(tmp_path):
    records = []
    run(tiny(tmp_path), on_progress=records.append, build=build)
    assert records == results.history(tmp_path)


def test_what_fails_at_the_end_goes_on_from_the_end(tmp_path, undisturbed):
    broken = tiny(tmp_path, meta={"fails_to_finish": True})
    with pytest.raises(RuntimeError, match="no room"):
        run(broken, build=build)
    assert results.committed(tmp_path) is None
    records = []
    run(tiny(tmp_path), on_progress=records.append, build=build)
    assert records == []
    assert_same(tmp_path, undisturbed)


def test_a_damaged_checkpoint_costs_an_interval_and_no_bit(tmp_path, undisturbed, caplog):
    broken = tiny(tmp_path, meta={"fails_to_finish": True})
    with pytest.raises(RuntimeError):
        run(broken, build=build)
    newest = checkpoint.visible(tmp_path / results.CHECKPOINTS)[-1]
    os.truncate(newest / checkpoint.TENSORS, 100)
    records = []
    with caplog.at_level(logging.WARNING):
        run(tiny(tmp_path), on_progress=records.append, build=build)
    assert "going back to the one before" in caplog.text
    assert [r["images_seen"] for r in records] == [1176, 1200]
    assert_same(tmp_path, undisturbed)


def test_a_training_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path, undisturbed):
    """Until somebody takes them away."""
    with pytest.raises(RuntimeError):
        run(tiny(tmp_path, meta={"fails_to_finish": True}), build=build)
    paths = checkpoint.visible(tmp_path / results.CHECKPOINTS)
    for path in paths:
        os.truncate(path / checkpoint.TENSORS, 100)
    before = lines(tmp_path)
    with pytest.raises(checkpoint.Damaged, match="none of its checkpoints can be loaded"):
        run(tiny(tmp_path), build=build)
    assert checkpoint.visible(tmp_path / results.CHECKPOINTS) == paths
    assert lines(tmp_path) == before
    for path in paths:
        shutil.rmtree(path)
    run(tiny(tmp_path), build=build)
    assert_same(tmp_path, undisturbed)


def test_a_warm_start_begins_with_the_parent(tmp_path, undisturbed):
    child = tiny(tmp_path / "child", parent=str(undisturbed), training={"learning_rate": 1e-9})
    done = run(child, build=build)
    before, after = (
        checkpoint.load_file(d / results.WEIGHTS) for d in (undisturbed, tmp_path / "child")
    )
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-4, atol=1e-5)
    assert done["parent"] == str(undisturbed)


def test_a_parent_that_was_changed_is_refused(tmp_path):
    run(tiny(tmp_path / "parent", training={"images": 80}), build=build)
    weights = tmp_path / "parent" / results.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(ValueError, match=r"weights.safetensors: sha256 .* it was changed"):
        run(tiny(tmp_path / "child", parent=str(tmp_path / "parent")), build=build)
    with pytest.raises(ValueError, match="no finished stage"):
        run(tiny(tmp_path / "orphan", parent=str(tmp_path / "child")), build=build)


def test_previews_on_the_way_change_nothing(tmp_path, undisturbed):
    run(tiny(tmp_path, training={"preview_images": 240}), build=build)
    drawn = sorted(path.name for path in (tmp_path / results.PREVIEWS).iterdir())
    assert drawn == [f"{images:012d}.png" for images in range(240, 1201, 240)]
    weights = [(d / results.WEIGHTS).read_bytes() for d in (tmp_path, undisturbed)]
    assert weights[0] == weights[1]


def test_each_step_of_a_preview_is_a_sign_of_life(tmp_path, monkeypatch):
    """The whole of it may take longer than the watchdog bears silence."""
    beats = []

    class Counting(job.Watchdog):
        def beat(self):
            beats[-1] += 1
            super().beat()

    monkeypatch.setattr(job, "Watchdog", Counting)
    for name, preview in (("with", {"preview_images": 16}), ("without", {})):
        beats.append(0)
        run(tiny(tmp_path / name, training={"images": 24, **preview}), build=build)
    assert beats == [3 + STEPS_OF_A_PREVIEW + 1, 3]


def test_who_trains_in_his_own_process_is_told_that_it_hangs_and_no_more(
    tmp_path, undisturbed, monkeypatch, caplog
):
    """Twice while it does, with the stacks, and what it makes is the same; `on_hang` hears it from
    another thread."""
    batches, heard = TinyLoader.batches, []

    def hangs(self, start_step=0, prefetch=2):
        for step, batch in enumerate(batches(self, start_step, prefetch), start_step):
            time.sleep(1.3 if step == 70 else 0)
            yield batch

    def on_hang():
        heard.append(threading.current_thread().name)

    monkeypatch.setattr(TinyLoader, "batches", hangs)
    for name, asked in (("told", None), ("asked", on_hang)):
        stage = tmp_path / name
        run(tiny(stage, training={"stall_seconds": 0.5}), build=build, on_hang=asked)
        weights = [(it / results.WEIGHTS).read_bytes() for it in (stage, undisturbed)]
        assert weights[0] == weights[1]
        assert lines(stage) == lines(undisturbed)
        stacks = (stage / results.STACKS / "0.txt").read_text()
        assert "in hangs" in stacks
        assert stacks.count("no update for") >= 2
    assert set(heard) == {"watchdog"}
    assert len([it for it in caplog.messages if it.startswith("no update for")]) >= 4


def measured_on(monkeypatch, loader) -> None:
    """Let some batches of a loader be the held-out ones."""
    monkeypatch.setattr(job.measuring, "heldout", lambda _: loader)

    def shares(loader, count: int, batch: int):
        return [partial(loader.batch, step) for step in range(100, 100 + count // batch)]

    monkeypatch.setattr(job.measuring, "fixed_shares", shares)


def test_the_best_and_every_so_many_images_are_kept(tmp_path, undisturbed, monkeypatch):
    measured_on(monkeypatch, TinyLoader(8, 3, 0, 1, 0))
    keep = {"keep_last": 1, "keep_best": True, "keep_images": 500, "heldout_pictures": 32}
    run(tiny(tmp_path, training=keep), build=build)
    told = {it["images_seen"]: it["heldout_loss"] for it in lines(tmp_path) if "heldout_loss" in it}
    assert list(told) == [*range(160, 1200, 160), 1200]
    weights = [(d / results.WEIGHTS).read_bytes() for d in (tmp_path, undisturbed)]
    assert weights[0] == weights[1]
    paths = checkpoint.visible(tmp_path / results.CHECKPOINTS)
    best = checkpoint.best(tmp_path / results.CHECKPOINTS)
    assert best is not None
    assert {int(p.name) for p in paths} == {640, 1120, 1200, int(best.name)}
    for path in paths:
        state = checkpoint.load(path)
        stage, loader, _ = build(tiny(tmp_path), job.World())
        stage.seed = 3
        stage.load_state_dict(state.averaged())
        with torch.no_grad():
            losses = [
                stage.eval()(to_tensors(loader.batch(step)))["loss"] for step in range(100, 104)
            ]
        wanted = torch.cat(losses).mean().item()
        assert state.numbers[checkpoint.HELDOUT_LOSS] == pytest.approx(wanted, rel=1e-5)
        assert state.numbers[checkpoint.HELDOUT_LOSS] == told[state.images_seen]


PATIENT = {
    "heldout_pictures": 32,
    "heldout_images": 80,
    "patience_images": 320,
    "patience_margin": 0.2,
}


def test_a_loss_that_no_longer_falls_ends_a_training_for_good(tmp_path, undisturbed, monkeypatch):
    """Stopped, resumed, and failing at its end, it ends at the same update with the same bits; also
    stopped at that update, before the loss that ends it is taken."""
    measured_on(monkeypatch, TinyLoader(8, 3, 0, 1, 0))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = run(tiny(whole, training=PATIENT), build=build)
    losses = {it["images_seen"]: it["heldout_loss"] for it in lines(whole) if "heldout_loss" in it}
    least, at = float("inf"), 0
    for images, loss in losses.items():
        if loss < 0.8 * least or least == float("inf"):
            least, at = loss, images
    assert list(losses) == list(range(80, at + 321, 80))
    assert done["images_seen"] == at + 320 < 1200
    assert done["stopped_early"] and not finished(undisturbed)["stopped_early"]
    assert run(tiny(whole, training=PATIENT), build=never) == done

    for stops in range(2):
        requests = iter([*[False] * (27 + 14 * stops), True])
        with pytest.raises(Stopped):
            run(
                tiny(broken, training=PATIENT),
                job.World(stop=lambda it=requests: next(it)),
                build=build,
            )
    with pytest.raises(RuntimeError, match="no room"):
        run(tiny(broken, training=PATIENT, meta={"fails_to_finish": True}), build=build)
    assert reached(broken) == at + 320
    run(tiny(broken, training=PATIENT), build=build)
    assert_same(broken, whole)

    stopped, requests = tmp_path / "stopped", iter([*[False] * ((at + 320) // 8 - 1), True])
    with pytest.raises(Stopped):
        run(tiny(stopped, training=PATIENT), job.World(stop=lambda: next(requests)), build=build)
    run(tiny(stopped, training=PATIENT), build=build)
    assert_same(stopped, whole)


def test_who_was_told_to_stop_measures_nothing(tmp_path, monkeypatch):
    measured_on(monkeypatch, TinyLoader(8, 3, 0, 1, 0))
    world = job.World(stop=lambda: True)
    with pytest.raises(Stopped):
        run(tiny(tmp_path, training={"heldout_pictures": 32}), world, build=build)
    state = checkpoint.newest(tmp_path / results.CHECKPOINTS)
    assert state is not None and checkpoint.HELDOUT_LOSS not in state.numbers


class Struck(Tiny):
    """Draws its weights, in steps; at one of its looks at held-out rows, or of those steps, it is
    told to end."""

    calls: ClassVar[list[str]] = []
    strike: ClassVar[tuple[str, int]] = ("", 0)

    def called(self, what: str) -> None:
        self.calls.append(what)
        if self.strike == (what, self.calls.count(what)):
            os.kill(os.getpid(), signal.SIGTERM)

    def heldout_loss(self, batch):
        self.called("measure")
        return super().heldout_loss(batch)

    def preview(self, loader, seed, beat):
        for _ in range(STEPS_OF_A_PREVIEW):
            self.called("draw")
            beat()
        pixels = self.net[0].weight.detach().numpy().tobytes()
        return np.frombuffer(pixels, np.uint8)[:192].reshape(1, 8, 8, 3)


def struck(output: Path, world=None, strike=("", 0)) -> None:
    """A training that is measured every 160 images and drawn every 240."""
    Struck.calls, Struck.strike = [], strike
    training = {"heldout_pictures": 32, "heldout_images": 160, "keep_best": True, "keep_images": 80}
    made = tiny(output, training=training | {"preview_images": 240})
    run(made, world, build=lambda *it: (Struck(TinyConfig()), *build(*it)[1:]))


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> Path:
    """What the undisturbed one leaves."""
    with pytest.MonkeyPatch.context() as patched:
        measured_on(patched, TinyLoader(8, 3, 0, 1, 0))
        struck(output := tmp_path_factory.mktemp("series"))
    return output


def shown(stage_dir: Path) -> tuple:
    """The series that a training leaves, and what its checkpoints say of it."""
    paths = (stage_dir / results.PREVIEWS).iterdir()
    told = {}
    for path in checkpoint.visible(stage_dir / results.CHECKPOINTS):
        numbers = json.loads((path / checkpoint.DESCRIPTION).read_bytes())["numbers"]
        told[path.name] = numbers.get(checkpoint.HELDOUT_LOSS), numbers.get("validation")
    best = checkpoint.best(stage_dir / results.CHECKPOINTS)
    return {it.name: it.read_bytes() for it in paths}, lines(stage_dir), told, best and best.name


@pytest.mark.parametrize(
    ("strike", "images", "extra"),
    [
        (("measure", 10), 480, 0),  # the second of four batches
        (("draw", 6), 480, 0),  # the second of four steps
        (("draw", 2), 240, 1),  # where no checkpoint is due
    ],
)
def test_what_is_told_to_end_while_it_measures_or_draws_saves_and_makes_up(
    tmp_path, series, monkeypatch, strike, images, extra
):
    measured_on(monkeypatch, TinyLoader(8, 3, 0, 1, 0))
    what, call = strike
    with pytest.raises(SystemExit):
        struck(tmp_path, strike=strike)
    assert Struck.calls.count(what) == call  # the others were not begun
    assert reached(tmp_path) == images
    struck(tmp_path)
    found, wanted = shown(tmp_path), shown(series)
    assert found[:2] == wanted[:2]
    assert wanted[2].items() <= found[2].items()
    assert len(found[2]) == len(wanted[2]) + extra
    assert found[3] == wanted[3]
    assert (tmp_path / results.WEIGHTS).read_bytes() == (series / results.WEIGHTS).read_bytes()


def test_what_was_due_when_a_training_was_stopped_or_killed_is_made_up(
    tmp_path, series, monkeypatch
):
    """Asked to stop after the very update at which it would have measured and drawn; and killed
    between a checkpoint and the pictures of it; and once more while it makes up for that."""
    measured_on(monkeypatch, TinyLoader(8, 3, 0, 1, 0))
    asked = iter([*[False] * 59, True])
    with pytest.raises(Stopped, match="480 images"):
        struck(tmp_path, job.World(stop=lambda: next(asked)))
    assert "heldout_loss" not in results.history(tmp_path)[-1]
    assert not (tmp_path / results.PREVIEWS / "000000000480.png").exists()
    with pytest.raises(SystemExit):
        struck(tmp_path, strike=("draw", 2))
    assert Struck.calls == ["measure"] * 4 + ["draw"] * 2
    assert "heldout_loss" in results.history(tmp_path)[-1]
    assert reached(tmp_path) == 480
    draw = job._draw

    def dies(*given):
        if given[3] == 960:
            raise MemoryError
        draw(*given)

    with monkeypatch.context() as killed:
        killed.setattr(job, "_draw", dies)
        with pytest.raises(MemoryError):
            struck(tmp_path)
    assert reached(tmp_path) == 960
    struck(tmp_path)
    assert shown(tmp_path) == shown(series)


def test_a_heldout_loss_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="heldout_pictures is 8, but .* has none"):
        run(tiny(tmp_path, training={"heldout_pictures": 8}), build=build)


def test_stopping_on_request_goes_on_from_there(tmp_path, undisturbed):
    requests = iter([*[False] * 20, True])
    world = job.World(stop=lambda: next(requests))
    with pytest.raises(Stopped, match="168 images"):
        run(tiny(tmp_path), world, build=build)
    assert reached(tmp_path) == 168
    run(tiny(tmp_path), build=build)
    assert_same(tmp_path, undisturbed)


@pytest.mark.gpu
def test_a_gpus_answer_is_read_two_updates_later():
    stopping = job._Stopping()
    answers = [torch.tensor(float(step == 3), device="cuda") for step in range(6)]
    told = [stopping.after(SimpleNamespace(stop=answer)) for answer in answers]
    assert told == [False] * 5 + [True]


def test_jobs_are_json(tmp_path):
    made = tiny(tmp_path, encodings=({"name": "clip", "kind": "text", "fingerprint": "ab"},))
    assert Job.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_wrong_key_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"learning_rat.*learning_rate"):
        run(tiny(tmp_path, training={"learning_rat": 1}), build=build)


class Taken(BaseException):
    """What an orchestrator's handler raises."""


def take(number, frame):
    raise Taken


@pytest.mark.parametrize(
    ("number", "handler", "ending"),
    [
        (signal.SIGTERM, signal.SIG_DFL, SystemExit),
        (signal.SIGTERM, take, Taken),
        (signal.SIGTERM, lambda number, frame: None, Stopped),
        (signal.SIGINT, signal.default_int_handler, KeyboardInterrupt),
    ],
)
def test_a_signal_waits_for_a_checkpoint(tmp_path, undisturbed, number, handler, ending):
    sent = []

    def interrupt(record):
        if record["images_seen"] == 280:
            sent.append(time.time())
            os.kill(os.getpid(), number)

    before = signal.signal(number, handler)
    try:
        with pytest.raises(ending) as caught:
            run(tiny(tmp_path), on_progress=interrupt, build=build)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    if ending is SystemExit:
        assert caught.value.code == 143
    assert reached(tmp_path) in (280, 288)
    newest = checkpoint.visible(tmp_path / results.CHECKPOINTS)[-1]
    written = json.loads((newest / checkpoint.DESCRIPTION).read_bytes())["written"]
    assert 0 <= written - sent[0] < 30
    run(tiny(tmp_path), build=build)
    assert_same(tmp_path, undisturbed)


def test_killed_at_random_steps_it_ends_bit_identical(tmp_path, undisturbed):
    """Promise 2: SIGKILL anywhere; weights and losses as if undisturbed, one interval redone."""
    made, spec = tiny(tmp_path / "killed", meta={"pause": 0.001}), tmp_path / "spec.json"
    spec.write_text(json.dumps(made.to_json()))
    done = subprocess.run(
        [sys.executable, __file__, str(spec)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({kill["resumes_at"] for kill in kills}) >= 2
    for kill in kills:
        assert kill["resumes_at"] >= kill["logged"] - 160
    assert_same(tmp_path / "killed", undisturbed)


def disturb(made: Job, kills: int) -> None:
    """Run the job in forks that are killed a little later than at a random number of images, then
    in one that is left alone. However slow the machine is, they get on."""
    run(replace(made, output=made.output + "warm"), build=build)  # imports
    chance = random.Random(7)

    def logged() -> int:
        return max((r["images_seen"] for r in results.history(made.output)), default=0)

    for _ in range(kills):
        until = reached(Path(made.output)) + chance.randrange(320)
        child = os.fork()
        if child == 0:
            run(made, build=build)
            os._exit(0)
        while logged() < until and not os.waitpid(child, os.WNOHANG)[0]:
            time.sleep(0.001)
        if results.committed(made.output):
            break
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(json.dumps({"logged": logged(), "resumes_at": reached(Path(made.output))}))
    run(made, build=build)


if __name__ == "__main__":
    torch.set_num_threads(1)
    disturb(Job.from_json(json.loads(Path(sys.argv[1]).read_text())), kills=8)
