"""Who computes does not change what is computed: workers of torch's process groups, and of Ray.

Run as a script, this file forks the workers of groups: `test_distributed.py DIRECTORY`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pipeline import storage
from pipeline.plan import BatchPlan, dealt
from training import checkpoint, distributed, measuring, repro, results
from training.diffusion import normal
from training.distributed import fit, of_process_group
from training.job import Job, run
from training.loop import Diverged, World
from training.stage import Stage
from training.supervision import Stopped

BATCH, STEPS = 10, 60


@dataclass(frozen=True)
class LineConfig:
    kind: str = "line"
    dropout: float = 0.0


class Line(Stage):
    """A network whose noise comes from the position; `first` and `sometimes` are used by few rows.

    `log` is told of each row what was drawn for it. A preview takes so many steps, of so many
    seconds.
    """

    kind = "line"

    def __init__(
        self, config: LineConfig, log: Path | None = None, drawing: tuple[int, float] = (0, 0)
    ):
        super().__init__(config)
        self.drawing = drawing
        self.before, self.after = nn.Linear(4, 24), nn.Linear(24, 4)
        self.dropout = nn.Dropout(config.dropout)
        self.first = nn.Parameter(torch.zeros(4))
        self.sometimes = nn.Parameter(torch.zeros(4))
        self.log = log

    def forward(self, batch):
        x, position = batch["x"], batch["position"]
        noise, mask = normal(self.seed, "noise", position, (4,)), self.dropout(torch.ones(24))
        out = self.after(nn.functional.silu(self.before(x + 0.1 * noise)) * mask)
        for row, parameter in ((0, self.first), (9, self.sometimes)):
            if (rare := position % BATCH == row).any():
                out = out + rare[:, None] * parameter
        loss = (out - x.flip(1)).square().mean(1)
        if self.log and self.training:
            drawn = zip(position.tolist(), batch["key"], noise.tolist(), strict=True)
            with self.log.open("a") as file:
                file.writelines(json.dumps([*row, mask.tolist()]) + "\n" for row in drawn)
        return {"loss": loss, "size": out.detach().abs().mean()}

    def preview(self, loader, seed, beat):
        steps, seconds = self.drawing
        for _ in range(steps):
            time.sleep(seconds)
            beat()
        return np.full((1, 8, 8, 3), 128, np.uint8) if steps else None


class Lines:
    def __init__(self, job: Job, world: World):
        self.plan, self.world, self.meta = BatchPlan((30, 41), "d", 5, BATCH), world, job.meta
        self.parts = job.training_config().micro_batches(world.size)
        self.data = np.random.default_rng(0).normal(size=(71, 4)).astype(np.float32)
        if starts := job.meta.get("starts"):
            with open(starts, "a") as file:
                print(world.rank, file=file)

    samples = 71

    def rows(self, indices):
        """What is measured."""
        indices = np.asarray(indices)
        keys = [f"k{i}" for i in indices.tolist()]
        return {"x": self.data[indices], "position": indices, "key": keys}

    def batches(self, start_step: int = 0, prefetch: int = 2):
        step = start_step
        while True:
            self._misfortune(step)
            for part in dealt(self.parts, self.world.rank, self.world.size):
                rows, indices = self.plan.slice(step, part, self.parts)
                keys = [f"k{i}" for i in indices.tolist()]
                x = self.data[indices]
                if step in self.meta.get("poison", ()):
                    x = np.where((rows == self.meta.get("poisoned_row", rows))[:, None], np.nan, x)
                yield {"x": x, "position": step * BATCH + rows, "key": keys}
            step += 1

    def _misfortune(self, step: int) -> None:
        time.sleep(self.meta.get("pause", 0))
        ballast = Path(self.meta.get("fills", "/nowhere"))
        if step == 25 and self.world.rank == 0 and ballast.exists() and not ballast.stat().st_size:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if step == 35 and self.world.rank == self.world.size - 1:
            for name in ("SIGKILL", "SIGSTOP", "SIGTERM"):
                once = Path(self.meta.get(name, "/nowhere"))
                if once.exists():
                    once.unlink()
                    os.kill(os.getpid(), getattr(signal, name))
            once = Path(self.meta.get("sleep", "/nowhere"))
            if once.exists():
                once.unlink()
                time.sleep(self.meta["seconds"])


def build(job: Job, world: World):
    log = Path(f"{job.output}.{world.size}.{world.rank}") if job.meta.get("log") else None
    drawing = job.meta.get("drawing", (0, 0))
    return Line(LineConfig(**job.config), log, drawing), Lines(job, world), "d"


def job(
    output: Path,
    workers: int = 1,
    micro_batch: int = 0,
    dropout: float = 0,
    training: dict | None = None,
    **meta,
) -> Job:
    training = {
        "images": BATCH * STEPS,
        "batch": BATCH,
        "learning_rate": 1e-2,
        "checkpoint_images": BATCH * 10,
        "log_images": BATCH * 4,
        "ema_halflife_images": 100,
        "workers": workers,
        "threads": 1,
        "micro_batch": micro_batch,
        **(training or {}),
    }
    config = {"dropout": dropout}
    return Job(
        kind="line",
        fingerprint="f",
        config=config,
        training=training,
        output=str(output),
        meta=meta,
    )


def reached(stage_dir: Path) -> int:
    state = checkpoint.newest(stage_dir / results.CHECKPOINTS)
    return state.images_seen if state else 0


def assert_close(one: Path, other: Path) -> None:
    """Promise 3: losses differ by at most 1e-5 of their value, and so do weights of theirs."""
    for a, b in zip(results.history(one), results.history(other), strict=True):
        for name in ("loss", "size", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert (a["images_seen"], a["step"]) == (b["images_seen"], b["step"])
    first, second = (load_file(d / results.WEIGHTS) for d in (one, other))
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-5 * tensor.norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    fit(job(output), build=build)
    return output


def test_one_worker_is_this_process(alone, tmp_path):
    records = []
    done = fit(job(tmp_path), records.append, build=build)
    assert done == results.committed(tmp_path)
    assert records == results.history(tmp_path)
    assert (tmp_path / results.WEIGHTS).read_bytes() == (alone / results.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("log_updates", "where"), [(1, results.HISTORY), (STEPS, f"{results.CHECKPOINTS}/000000000400")]
)
def test_a_disk_that_fills_up_costs_no_more_than_the_last_interval(tmp_path, log_updates, where):
    """F3: in a line of the history, or in a checkpoint; the same command goes on bit for bit."""
    from tests.pipeline.test_faults import small_disk
    from tests.training.test_job import CLOCKS

    def lines(stage_dir: Path) -> list[dict]:
        records = results.history(stage_dir)
        return [{k: v for k, v in it.items() if k not in CLOCKS} for it in records]

    often = {"log_images": BATCH * log_updates, "checkpoint_images": BATCH * 20}
    fit(job(tmp_path / "calm", training=often, dropout=0.2), build=build)
    with small_disk(tmp_path / "disk", 1024):
        output, ballast = tmp_path / "disk" / "stage", tmp_path / "disk" / "ballast"
        ballast.touch()
        disturbed = job(output, training=often, dropout=0.2, fills=str(ballast))
        for again in (False, True):
            with pytest.raises(OSError, match=r"(?i)no space left.* make room") as caught:
                fit(disturbed, build=build)
            assert storage.is_full(caught.value)
            assert str(output if again else output / where) in str(caught.value)
            wanted = re.search(r"\d bytes were to be written|\(\d+\.\d MiB\)", str(caught.value))
            assert wanted or again
            directory = output / results.CHECKPOINTS
            assert [it.name for it in directory.iterdir()] == ["000000000200"]
            seen = [it["images_seen"] for it in results.history(output)]
            assert seen == [BATCH * n for n in range(log_updates, len(seen) + 1, log_updates)]
        ballast.unlink()
        done = fit(disturbed, build=build)
        assert done["images_seen"] == BATCH * STEPS
        assert lines(output) == lines(tmp_path / "calm")
        weights = [it / results.WEIGHTS for it in (output, tmp_path / "calm")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


CUT = {"micro_batch": 3, "dropout": 0.2, "log": True}
"""Micro-batches of 2, 3, 2 and 3 rows: no number of workers but 1, 2 and 4 divides them."""
PATIENT = {
    "heldout_pictures": 20,
    "heldout_images": 30,
    "patience_images": 120,
    "patience_margin": 0.2,
}
HANGS = {"training": {"stall_seconds": 4.0}}
RARELY = {"training": {"log_images": BATCH * STEPS, "checkpoint_images": BATCH * STEPS}}
ONCE = ("sleep", "SIGTERM")
"""What befalls a group's last worker before its first checkpoint."""
GROUPS: dict[str, tuple[dict, list[tuple[int, int | None]]]] = {
    "uneven": ({}, [(3, 12), (2, None)]),
    "elastic": (CUT, [(4, 12), (2, 12), (4, None)]),
    "three": (CUT, [(3, None)]),
    "lost": (
        {**CUT, "micro_batch": 0, "training": {"workers": 4, "min_workers": 2}},
        [(4, 12), (2, None)],
    ),
    "poisoned": ({**CUT, "poison": list(range(20, 30)), "poisoned_row": 9}, [(3, None)]),
    "patient": ({"training": PATIENT}, [(3, 9), (2, None)]),
    "asked": (RARELY, [(3, 7), (2, None)]),
    "signalled": ({"SIGTERM": "once", **RARELY}, [(3, None), (3, None)]),
    "hung": ({"sleep": "sleep", "seconds": 600, **HANGS}, [(2, None), (2, None)]),
    "drawn": (
        {"drawing": (6, 0.8), "training": {"stall_seconds": 4.0, "preview_images": 300}},
        [(2, None)],
    ),
}
"""Name -> (how `job` is made, (workers, the update after which they are stopped) in turn)."""


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> tuple[Path, dict]:
    """(the directory that holds a stage per group, what happened)."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    directory = tmp_path_factory.mktemp("groups")
    command = [sys.executable, __file__, str(directory)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return directory, json.loads(done.stdout)


@pytest.fixture(scope="module")
def cut_alone(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("cut") / "alone"
    fit(job(output, **CUT), build=build)
    return output


def test_three_workers_with_uneven_shares_do_what_one_does(alone, groups):
    """Interrupted after 12 updates as three, and finished as two: the global sequence goes on."""
    directory, told = groups
    assert told["uneven"] == [120, 600]
    assert_close(directory / "uneven", alone)


def test_four_two_and_four_workers_do_what_one_does(cut_alone, groups):
    """F16, promise 3: samples, noise and dropout are the same; losses within 1e-5 of theirs."""
    directory, told = groups
    assert told["elastic"] == [120, 240, 600]
    assert_close(directory / "elastic", cut_alone)
    assert drawn(directory, "elastic", 4).keys() >= set(range(120)) | set(range(240, 600))
    assert drawn(directory, "elastic", 2).keys() == set(range(120, 240))
    both = drawn(directory, "elastic", 4) | drawn(directory, "elastic", 2)
    assert both == drawn(cut_alone.parent, "alone", 1)
    masks = {str(row[-1]) for row in both.values()}
    assert len(masks) > 0.9 * 4 * STEPS  # of each micro-batch its own


def test_three_workers_at_four_micro_batches_do_what_one_does(cut_alone, groups):
    """Two of them repeat a micro-batch with weight 0."""
    directory, _ = groups
    assert_close(directory / "three", cut_alone)
    assert drawn(directory, "three", 3) == drawn(cut_alone.parent, "alone", 1)


def test_two_that_are_left_of_four_do_what_the_four_did(cut_alone, groups):
    """Nobody asked for micro-batches: they are the shares of the four."""
    directory, _ = groups
    assert_close(directory / "lost", cut_alone)
    both = drawn(directory, "lost", 4) | drawn(directory, "lost", 2)
    assert both == drawn(cut_alone.parent, "alone", 1)


def test_cutting_a_batch_changes_nothing_that_is_computed(alone, tmp_path):
    fit(job(tmp_path, micro_batch=3), build=build)
    assert_close(tmp_path, alone)


def test_every_worker_names_the_samples_of_all(groups):
    """Row 9 is bad, and only the last worker has seen it."""
    directory, told = groups
    plan = BatchPlan((30, 41), "d", 5, BATCH)
    culprits = [f"k{plan.batch(step)[9]}" for step in range(20, 24)]
    assert told["poisoned"] == [culprits] * 3
    found = repro.again(directory / "poisoned" / results.REPRO / repro.FILE, build)
    assert (found.step, found.keys) == (23, culprits[-1:])


def test_workers_that_measure_together_end_together(tmp_path, groups, monkeypatch):
    """As one alone does: stopped as three, and ended as two."""
    directory, told = groups
    monkeypatch.setattr(measuring, "heldout", lambda loader: loader)
    done = fit(job(tmp_path, training=PATIENT), build=build)
    assert told["patient"] == [90, done["images_seen"]]
    assert done["stopped_early"] and done["images_seen"] < BATCH * STEPS
    assert_close(directory / "patient", tmp_path)
    losses = [
        [it["heldout_loss"] for it in results.history(where) if "heldout_loss" in it]
        for where in (tmp_path, directory / "patient")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == done["images_seen"] // 30


@pytest.mark.parametrize(("name", "stopped"), [("asked", 70), ("signalled", 360)])
def test_all_stop_after_the_update_at_which_one_is_asked_to(alone, groups, name, stopped):
    """By another, or by a SIGTERM while the batch of step 35 is read; there is no log point before
    the end."""
    directory, told = groups
    assert told[name] == [stopped, 600]
    said = [Path(f"{directory}/{name}.stopped.{rank}").read_text() for rank in range(3)]
    others = [f"Stopped: stopped at {stopped} images, as asked"] * 3
    assert said == (others if name == "asked" else [*others[:2], "SystemExit: 143"])
    first, second = (load_file(d / results.WEIGHTS) for d in (directory / name, alone))
    for key, tensor in first.items():
        assert (tensor - second[key]).norm() <= 1e-5 * tensor.norm(), key


def test_who_waits_in_vain_says_where_and_ends(alone, groups):
    """The loader of one stands still, and so does the other in a collective: both end by their
    watchdogs, with the stacks of their threads, and started again they go on."""
    directory, told = groups
    assert told["hung"] == [300, 600]
    assert json.loads((directory / "hung.codes").read_text()) == [[70, 70], [0, 0]]
    waits, hangs = ((directory / f"hung.stderr.{rank}").read_text() for rank in (0, 1))
    for stacks in (waits, hangs):
        assert stacks.count("no update for 4 s; the stacks of all threads follow") == 1
    assert "in _misfortune" in hangs  # the loader's
    assert "in backward" in waits  # which sums the gradients of all
    assert_close(directory / "hung", alone)


def test_who_waits_for_what_the_first_one_draws_is_alive(alone, groups):
    """A preview takes longer than `stall_seconds`, after which both would have been ended."""
    directory, told = groups
    assert json.loads((directory / "drawn.codes").read_text()) == [[0, 0]]
    assert told["drawn"] == [600]
    shown = directory / "drawn" / results.PREVIEWS
    assert sorted(it.name for it in shown.iterdir()) == ["000000000300.png", "000000000600.png"]
    assert_close(directory / "drawn", alone)


def drawn(directory: Path, name: str, workers: int) -> dict[int, list]:
    """Position -> [key, noise, dropout], by all workers of a group; none may differ in it."""
    found: dict[int, list] = {}
    for rank in range(workers):
        for line in (directory / f"{name}.{workers}.{rank}").read_text().splitlines():
            position, *row = json.loads(line)
            assert found.setdefault(position, row) == row
    return found


def work(rank: int, size: int, output: Path, stop_after: int | None, made: dict) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{output}.group.{reached(output)}", rank=rank, world_size=size
    )
    measuring.heldout = lambda loader: loader
    asked = []

    def stop() -> bool:
        asked.append(rank)
        return rank == 1 and len(asked) == stop_after

    world = of_process_group(rank, size, torch.device("cpu"), stop)
    try:
        run(job(output, size, **made), world, None, build)
    except Diverged as error:
        Path(f"{output}.diverged.{rank}").write_text(json.dumps(error.keys))
    except (Stopped, SystemExit) as error:
        Path(f"{output}.stopped.{rank}").write_text(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()


def group(size: int, output: Path, stop_after: int | None, made: dict) -> list[int]:
    """How each worker ended."""
    for name in made.keys() & set(ONCE):
        made = made | {name: f"{output}.{name}"}
        if not reached(output):
            Path(made[name]).touch()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            try:
                if HANGS.items() <= made.items():
                    # Of its own: stacks are written piece by piece, and would mix with another's.
                    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
                    error = os.open(f"{output}.stderr.{rank}", flags)
                    os.dup2(error, 2)
                work(rank, size, output, stop_after, made)
            except BaseException as error:
                print(type(error).__name__, error, file=sys.stderr)
            finally:
                os._exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def rays(test):
    """Minutes on a busy machine, and Ray has warnings of its own."""
    for mark in (pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore")):
        test = mark(test)
    return test


@rays
def test_rays_workers_do_what_one_does_even_when_one_dies(alone, tmp_path, ray):
    """F5: rank 1 is killed at step 35; both start again from the checkpoint at step 30."""
    (tmp_path / "die").touch()
    records, output = [], tmp_path / "stage"
    done = fit(job(output, 2, SIGKILL=str(tmp_path / "die")), records.append, build=build)
    assert not (tmp_path / "die").exists()
    assert done == results.committed(output)
    assert_close(output, alone)
    assert [r["images_seen"] for r in records] == [r["images_seen"] for r in results.history(alone)]
    assert not (output / "ray").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_what_may_not_change_is_refused_before_any_worker_starts(tmp_path, monkeypatch, finished):
    begun = job(tmp_path, 2)
    if finished:
        fit(replace(begun, training={**begun.training, "workers": 1}), build=build)
    else:
        storage.publish_json(str(tmp_path / results.JOB), begun.to_json())
    monkeypatch.setattr(distributed, "_ray", lambda config: pytest.fail("Ray was started"))
    with pytest.raises(ValueError, match=r"training.learning_rate: begun with 0.01, asked 0.02"):
        fit(job(tmp_path, 2, training={"learning_rate": 0.02}), build=build)


@pytest.mark.parametrize(
    ("device", "gpus", "began", "found"),
    [
        ("auto", 0, None, False),
        ("auto", 2, None, True),
        ("auto", 1, None, False),  # which is said
        ("auto", 2, "cuda", True),
        ("auto", 0, "cpu", False),
        ("cpu", 2, "cuda", False),
        ("cuda", 2, "cpu", True),
        ("auto", 1, "cuda", r"trained on cuda, and 2 workers need as many GPUs, .* has 1: add"),
        ("cuda", 0, None, r"device is cuda, and 2 workers need as many GPUs, .* has 0: add"),
        ("cuda", 1, "cpu", r"device is cuda, and 2 workers need as many GPUs, .* has 1: add"),
        ("auto", 2, "cpu", r"trained on cpu so far, .* on cuda: .*device=cpu to stay"),
    ],
)
def test_workers_compute_on_what_the_training_was_begun_on(device, gpus, began, found, caplog):
    """Nobody goes on by CPUs because GPUs are gone."""
    config = job(Path("it"), 2, training={"device": device}).training_config()
    if isinstance(found, str):
        with pytest.raises(ValueError, match=found):
            distributed._by_gpus(config, gpus, began, "it")
        return
    assert distributed._by_gpus(config, gpus, began, "it") == found
    assert ("has only 1 GPUs" in caplog.text) == (gpus == 1)


@pytest.mark.parametrize(("seconds", "every"), [(0.001, 16), (0.1, 3), (0.4, 1), (30.0, 1)])
def test_workers_ask_at_the_same_updates_about_once_a_second(monkeypatch, seconds, every):
    """By the slowest one's time, which takes three times as long as this one."""
    clock, asked, answers = [0.0], [], []
    monkeypatch.setattr(distributed, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def ask() -> bool:
        asked.append(len(answers))
        return len(answers) > 100

    poll = distributed._Polled(ask, lambda mine: [mine, 3 * mine])
    for _ in range(150):
        clock[0] += seconds
        answers.append(poll())
    gaps = {b - a for a, b in pairwise(asked[2:])}
    assert gaps == {every}
    assert answers == [update >= asked[-1] for update in range(150)]
    assert 100 < asked[-1] <= 100 + every


@rays
def test_gpus_that_a_cluster_has_not_are_no_reason_to_start_workers(tmp_path, ray):
    starts = tmp_path / "starts"
    wrong = job(tmp_path / "stage", 2, training={"device": "cuda"}, starts=str(starts))
    with pytest.raises(ValueError, match="2 workers need as many GPUs, but the Ray cluster has 0"):
        fit(wrong, build=build)
    assert not starts.exists()


@rays
def test_what_is_refused_is_no_reason_for_ray_to_try_again(tmp_path, ray):
    """Of data without held-out pictures none can be measured, however often it is tried."""
    starts = tmp_path / "starts"
    wrong = job(tmp_path / "stage", 2, training={"heldout_pictures": 8}, starts=str(starts))
    with pytest.raises(ValueError, match="heldout_pictures is 8"):
        fit(wrong, build=build)
    assert sorted(starts.read_text().split()) == ["0", "1"]


@rays
def test_a_full_disk_is_no_reason_for_ray_to_try_again(alone, tmp_path, ray):
    """F3: the workers are started once, and again by the same command when there is room."""
    from tests.pipeline.test_faults import small_disk

    with small_disk(tmp_path / "disk", 4096):
        output, ballast = tmp_path / "disk" / "stage", tmp_path / "disk" / "ballast"
        ballast.touch()
        starts = tmp_path / "starts"
        disturbed = job(output, 2, fills=str(ballast), starts=str(starts))
        with pytest.raises(OSError, match=r"(?i)no space left.* make room") as caught:
            fit(disturbed, build=build)
        assert storage.is_full(caught.value)
        assert str(output) in str(caught.value)
        assert sorted(starts.read_text().split()) == ["0", "1"]
        assert reached(output) == 200
        ballast.unlink()
        fit(disturbed, build=build)
        assert sorted(starts.read_text().split()) == ["0", "0", "1", "1"]
        assert_close(output, alone)


@rays
def test_rays_workers_are_started_again_when_one_stands_still(alone, tmp_path, ray, caplog):
    """Promise 5: the other hangs in a collective, until its watchdog or gloo gives up. It says so,
    where it hung, and the driver passes on what it and the one who goes on said."""
    (tmp_path / "once").touch()
    output, hangs = tmp_path / "stage", {"SIGSTOP": str(tmp_path / "once")}
    asked = iter([*[False] * 9, True])
    with pytest.raises(Stopped):
        run(job(output), World(stop=lambda: next(asked)), None, build)
    damaged = checkpoint.save(output / results.CHECKPOINTS, checkpoint.TrainState({}, 11, 110), "f")
    (damaged / checkpoint.TENSORS).write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        done = fit(job(output, 2, training={"stall_seconds": 15.0}, **hangs), build=build)
    assert not (tmp_path / "once").exists()
    assert done["images_seen"] == BATCH * STEPS
    assert_close(output, alone)
    told, _ = results.events(output)
    assert [it["message"] for it in told if "000000000110 is damaged" in it["message"]]
    hung = [it for it in told if it["message"].startswith("no update for 1")]
    assert (0, "ERROR") in [(it["rank"], it["level"]) for it in hung]
    for it in told:
        assert f"worker {it['rank']}: {it['message']}" in caplog.messages
    stacks = (output / results.STACKS / "0.txt").read_text()
    assert "no update for 1" in stacks
    # In the gradients' exchange, or in the one before: who was stopped may not have sent its part.
    assert "in backward" in stacks or "distributed_c10d.py" in stacks


@rays
def test_a_signal_makes_rays_workers_write_a_checkpoint(alone, tmp_path, ray):
    """F2 with several workers: it is obeyed after the next update."""

    sent = []

    def terminate(record):
        if record["images_seen"] == 80:
            sent.append(time.time())
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            fit(job(tmp_path, 2, pause=0.2), terminate, build=build)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert results.committed(tmp_path) is None
    assert 80 < reached(tmp_path) < BATCH * STEPS
    newest = checkpoint.visible(tmp_path / results.CHECKPOINTS)[-1]
    written = json.loads((newest / checkpoint.DESCRIPTION).read_bytes())["written"]
    assert 0 < written - sent[0] < 30
    run(replace(job(tmp_path), meta={}), build=build)
    assert_close(tmp_path, alone)


@rays
def test_what_would_diverge_again_is_not_tried_again(tmp_path, ray):
    poisoned = job(tmp_path, 1, poison=list(range(20, 30)))
    with pytest.raises(Diverged, match="step 23") as caught:
        fit(poisoned, force_ray=True, build=build)
    assert len(caught.value.keys) == 4 * BATCH


if __name__ == "__main__":
    import torch._dynamo  # DistributedDataParallel imports it; once is enough

    torch.set_num_threads(1)
    told: dict[str, list] = {}
    for name, (made, sizes) in GROUPS.items():
        output = Path(sys.argv[1], name)
        codes = []
        for size, stop_after in sizes:
            codes.append(group(size, output, stop_after, made))
            told.setdefault(name, []).append(reached(output))
        Path(f"{output}.codes").write_text(json.dumps(codes))
        if failures := sorted(output.parent.glob(f"{name}.diverged.*")):
            told[name] = [json.loads(path.read_text()) for path in failures]
    print(json.dumps(told))
