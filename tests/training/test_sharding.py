"""Weights that no worker has all of: the same losses, and checkpoints for any number of workers.

Run as a script, this file forks the workers of groups, `test_sharding.py DIRECTORY [slow]`, or of
the jobs in a file, `test_sharding.py DIRECTORY JOBS`, or kills some while they save,
`test_sharding.py DIRECTORY KILLS`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pipeline.plan import BatchPlan, dealt
from training import checkpoint, measuring, posthoc, results, sharding, stages
from training.distributed import fit, of_process_group
from training.job import Build, Job, run
from training.job import build as usual
from training.loop import World
from training.stage import Stage
from training.supervision import Stopped

BATCH, STEPS = 10, 16


@dataclass(frozen=True)
class TowerConfig:
    kind: str = "tower"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(18), nn.Dropout(0.2)
        self.widen, self.narrow = nn.Linear(18, 37), nn.Linear(37, 18)

    def forward(self, x):
        return x + self.dropout(self.narrow(nn.functional.silu(self.widen(self.norm(x)))))


class Tower(Stage):
    """Blocks, rows that no number of workers divides, one parameter of a single row, one of none,
    one that few rows use, one that is frozen, and a mean that is measured."""

    kind = "tower"

    def __init__(self, config: TowerConfig, look_seconds: float = 0):
        super().__init__(config)
        self.look_seconds = look_seconds
        self.before, self.after = nn.Linear(4, 18), nn.Linear(18, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.gain = nn.Parameter(torch.ones(1, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.sometimes = nn.Parameter(torch.zeros(4))
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.register_buffer("mean", torch.zeros(4))

    def prepare(self, loader):
        self.mean.copy_(torch.from_numpy(loader.data.mean(0)))

    def forward(self, batch):
        x = self.before((batch["x"] - self.mean) * self.frozen)
        for block in self.blocks:
            x = block(x)
        out = self.after(x) * self.gain * self.scale
        if (rare := batch["position"] % BATCH == 9).any():
            out = out + rare[:, None] * self.sometimes
        return {"loss": (out - batch["x"].flip(1)).square().mean(1), "size": out.abs().mean()}

    def heldout_loss(self, batch):
        time.sleep(self.look_seconds)
        return super().heldout_loss(batch)

    def finish(self, loader):
        batch = {"x": torch.from_numpy(loader.data), "position": torch.arange(len(loader.data))}
        return {"final": self(batch)["loss"].mean().item()}

    def preview(self, loader, seed, beat):
        batch = {"x": torch.from_numpy(loader.data[:64]), "position": torch.arange(64)}
        drawn = (self(batch)["loss"].clamp(0, 1) * 8).byte().reshape(1, 8, 8, 1)
        return drawn.expand(-1, -1, -1, 3).numpy()


class Rows:
    def __init__(self, job: Job, world: World):
        self.plan, self.world = BatchPlan((30, 41), "d", 5, BATCH), world
        self.parts = job.training_config().micro_batches(world.size)
        self.full_from = job.meta.get("full_from", -1)
        self.signal_at = job.meta.get("signal_at", -1)
        self.die_once = Path(job.meta.get("die_once", "/nowhere"))
        self.data = np.random.default_rng(0).normal(size=(71, 4)).astype(np.float32)

    samples = 71

    def rows(self, indices):
        """What is measured."""
        indices = np.asarray(indices)
        return {"x": self.data[indices], "position": indices}

    def batches(self, start_step: int = 0, prefetch: int = 2):
        step = start_step
        while True:
            if step == 9 and self.world.rank == 1 and self.die_once.exists():
                self.die_once.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
            if step == self.signal_at and self.world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if step == self.full_from and self.world.rank == 1:
                _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
            for part in dealt(self.parts, self.world.rank, self.world.size):
                rows, indices = self.plan.slice(step, part, self.parts)
                keys = [f"k{i}" for i in indices.tolist()]
                yield {"x": self.data[indices], "position": step * BATCH + rows, "key": keys}
            step += 1


def build(job: Job, world: World):
    return Tower(TowerConfig(), job.meta.get("look_seconds", 0)), Rows(job, world), "d"


def job(
    output: Path,
    workers: int = 1,
    fsdp: bool = True,
    optimizer: str = "adamw",
    training: dict | None = None,
    **meta,
) -> Job:
    training = {
        "images": BATCH * STEPS,
        "batch": BATCH,
        "micro_batch": 3,
        "learning_rate": 1e-2,
        "optimizer": {"kind": optimizer, "weight_decay": 0.01},
        "checkpoint_images": BATCH * 4,
        "log_images": BATCH * 2,
        "preview_images": BATCH * 6,
        "ema_halflife_images": 100,
        "ema_sigma_rel": [0.05, 0.1],
        "ema_snapshot_images": BATCH * 8,
        "workers": workers,
        "threads": 1,
        "fsdp": fsdp,
        **(training or {}),
    }
    return Job(
        kind="tower",
        fingerprint="f",
        config={},
        training=training,
        output=str(output),
        meta=meta,
    )


Made = dict[str, Any]
LONG = {
    "look_seconds": 0.6,
    "training": {"heldout_pictures": 20, "heldout_images": BATCH * STEPS, "stall_seconds": 3.0},
}
"""Seven looks at held-out rows, longer together than a worker may be silent."""
GROUPS: dict[str, tuple[Made, list[tuple[int, int | None]]]] = {
    "ddp": ({"fsdp": False}, [(2, None)]),
    "fsdp": ({}, [(2, None)]),
    "muon-ddp": ({"fsdp": False, "optimizer": "muon"}, [(2, None)]),
    "muon": ({"optimizer": "muon"}, [(2, None)]),
    "fewer": ({}, [(4, 6), (2, 6), (1, None)]),
    "more": ({}, [(1, 6), (4, 4)]),
    "stopped": ({}, [(2, 10)]),
    "signalled": ({"signal_at": 6, "training": {"log_images": BATCH * STEPS}}, [(2, None)]),
    "full": ({"full_from": 9}, [(2, None)]),
    "four": ({}, [(4, None)]),
    "two": ({}, [(2, None)]),
    "long": (LONG, [(2, None)]),
}
"""Name -> (how `job` is made, (workers, the update after which they are stopped) in turn)."""
SLOW = ("muon-ddp", "muon", "more")
COPIES = {"two": "four"}
"""What begins as a copy of another's checkpoints."""


def history(stage_dir: Path) -> list[tuple[float, float]]:
    return [(r["loss"], r["grad_norm"]) for r in results.history(stage_dir)]


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    """Losses and gradient norms differ by at most that share of their values, averaged weights by
    1e-5 of theirs (Muon's directions are less certain than its losses)."""
    assert len(history(one)) == STEPS // 2
    for a, b in zip(history(one), history(other), strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    first, second = (load_file(d / results.WEIGHTS) for d in (one, other))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert (tensor - second[name]).norm() <= 1e-5 * tensor.norm(), name


@pytest.fixture(scope="module")
def groups(tmp_path_factory) -> Path:
    """The directory that holds a stage per group."""
    directory = tmp_path_factory.mktemp("groups")
    script(directory)
    return directory


@pytest.fixture(scope="module")
def slow_groups(groups) -> Path:
    script(groups, "slow")
    return groups


def script(*arguments: object) -> str:
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("alone")
    fit(job(output), build=build)
    return output


def test_who_is_alone_shares_with_nobody():
    """An elastic training may come down to one worker, whose checkpoints are whole."""
    assert not of_process_group(0, 1, torch.device("cpu"), fsdp=True).sharded
    assert of_process_group(0, 2, torch.device("cpu"), fsdp=True).sharded


def test_sharded_workers_do_what_those_do_that_have_everything(groups):
    """Over 16 updates of four micro-batches: 1e-6 of their value; what is measured and drawn is
    that of the averages."""
    assert_close(groups / "fsdp", groups / "ddp", 1e-6)
    one, other = (results.committed(groups / name) for name in ("fsdp", "ddp"))
    assert one is not None
    assert other is not None
    assert one["measured"]["final"] == pytest.approx(other["measured"]["final"], rel=1e-6)
    assert one["parameters"] == other["parameters"]
    drawn, wanted = (
        np.asarray(Image.open(groups / name / results.PREVIEW)) for name in ("fsdp", "ddp")
    )
    assert (drawn != wanted).mean() < 0.05  # a loss at the edge of a grey level
    assert len(np.unique(drawn)) > 3


@pytest.mark.slow
def test_muon_takes_its_directions_from_whole_matrices(slow_groups):
    assert_close(slow_groups / "muon", slow_groups / "muon-ddp", 1e-6)


def test_what_is_sharded_is_the_same_updates_and_not_the_same_code(groups):
    """Each of the workers has written its rows, and nobody has written all."""
    (path,) = checkpoint.visible(groups / "four" / results.CHECKPOINTS)
    parts = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    state = checkpoint.load(path, "f")
    assert len(parts) == 4
    kinds = ("weights", "ema", "power/0.05", "power/0.1")
    names = [f"{kind}/blocks.0.widen.weight" for kind in kinds]
    names += [f"optimizer/blocks.0.widen.weight:{field}" for field in ("exp_avg", "exp_avg_sq")]
    for name in names:  # 37 rows among four
        assert [len(part[name]) for part in parts] == [10, 10, 10, 7]
        assert torch.cat([part[name] for part in parts]).equal(state.tensors[name])
        assert state.tensors[name].shape == (37, 18)
    for name in ("weights/gain", "weights/frozen", "weights/mean", "optimizer/gain:step"):
        assert [name in part for part in parts] == [True, False, False, False]
    sizes = [sum(t.nbytes for t in part.values()) for part in parts]
    assert max(sizes) < 0.4 * sum(sizes)


def test_four_two_and_one_worker_go_on_from_each_others_checkpoints(groups, alone):
    """Issue 5: losses within 1e-5 of the undisturbed run."""
    assert_close(groups / "fewer", alone, 1e-5)


@pytest.mark.slow
def test_what_one_worker_saved_goes_on_sharded_and_then_unsharded(slow_groups, alone, tmp_path):
    shutil.copytree(slow_groups / "more", tmp_path / "more")
    assert reached(tmp_path / "more") == BATCH * 10
    run(job(tmp_path / "more", fsdp=False), None, None, build)
    assert_close(tmp_path / "more", alone, 1e-5)


def test_the_export_is_the_same_by_any_number_of_workers(groups, tmp_path):
    """Byte for byte: by the four that trained, and by two and one from their checkpoint."""
    uncommitted(groups / "four", tmp_path / "one")
    run(job(tmp_path / "one"), None, None, build)
    stages = [groups / "four", groups / "two", tmp_path / "one"]
    for name in (results.WEIGHTS, results.CONFIG, results.PREVIEW):
        four, two, one = ((stage / name).read_bytes() for stage in stages)
        assert four == two == one
    measured = [json.loads((s / results.STAGE).read_bytes())["measured"] for s in stages]
    assert measured[0] == measured[1] == measured[2]


def test_who_waits_for_what_the_first_one_measures_is_alive(groups):
    """Longer than `stall_seconds`, after which a worker would have been ended."""
    measured = [
        it["heldout_loss"] for it in results.history(groups / "long") if "heldout_loss" in it
    ]
    assert len(measured) == 1
    data = Rows(job(groups), World()).rows(np.linspace(0, 70, 20).round().astype(int))
    averages = Tower(TowerConfig()).eval()
    averages.load_state_dict(load_file(groups / "long" / results.WEIGHTS))
    batch = {name: torch.from_numpy(rows) for name, rows in data.items()}
    assert measured[0] == pytest.approx(averages(batch)["loss"].mean().item(), rel=1e-5)


def test_a_signal_to_one_makes_all_write_their_part(groups):
    """After the update for which it was reading when it came."""
    said = [Path(f"{groups}/signalled.stopped.{rank}").read_text() for rank in (0, 1)]
    assert said == [f"Stopped: stopped at {BATCH * 7} images, as asked", "SystemExit: 143"]
    path = checkpoint.visible(groups / "signalled" / results.CHECKPOINTS)[-1]
    assert checkpoint.load(path, "f").step == 7
    assert len(list(path.glob("state-*-of-00002.safetensors"))) == 2


def test_averages_of_another_length_come_from_sharded_snapshots(groups):
    sharded, wanted = (posthoc.average(groups / name, 0.07) for name in ("four", "ddp"))
    assert sharded.snapshots == 2
    for name, tensor in wanted.weights.items():
        assert (tensor - sharded.weights[name]).norm() <= 1e-5 * tensor.norm()


def flip_a_byte(path: Path) -> None:
    file = path / "state-00002-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def lose_a_part(path: Path) -> None:
    (path / "state-00002-of-00002.safetensors").unlink()


def swap_the_parts(path: Path) -> None:
    one, other = (path / f"state-0000{n}-of-00002.safetensors" for n in (1, 2))
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def swap_them_and_sign(path: Path) -> None:
    swap_the_parts(path)
    described = json.loads((path / checkpoint.DESCRIPTION).read_bytes())
    described["parts"].reverse()
    (path / checkpoint.DESCRIPTION).write_text(json.dumps(described))


@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, lose_a_part, swap_the_parts, swap_them_and_sign],
    ids=lambda d: d.__name__,
)
def test_a_damaged_part_gives_way_to_the_checkpoint_before_and_says_so(
    groups, alone, tmp_path, caplog, damage
):
    shutil.copytree(groups / "stopped", tmp_path / "stage")
    before, newest = checkpoint.visible(tmp_path / "stage" / results.CHECKPOINTS)
    assert (int(before.name), int(newest.name)) == (BATCH * 8, BATCH * 10)
    damage(newest)
    with pytest.raises(checkpoint.Damaged, match="000000000100"):
        checkpoint.load(newest)
    with caplog.at_level(logging.WARNING):
        run(job(tmp_path / "stage"), None, None, build)
    assert f"checkpoint {newest} is damaged, going back to the one before" in caplog.text
    assert_close(tmp_path / "stage", alone, 1e-5)


def test_a_sharded_checkpoint_of_another_training_is_refused(groups):
    directory = groups / "stopped" / results.CHECKPOINTS
    with pytest.raises(ValueError, match="checkpoint of training f, but this is training g"):
        checkpoint.newest(directory, "g")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_reads_what_was_sharded(groups):
    """torch.distributed.checkpoint, in this process alone: nothing in it is a pickle."""
    import torch.distributed.checkpoint as dcp

    path = checkpoint.visible(groups / "stopped" / results.CHECKPOINTS)[-1]
    wanted = checkpoint.load(path).tensors
    found = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    dcp.load(found, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())


def test_a_workers_full_disk_is_told_by_all_and_nothing_partial_shows(groups):
    for rank in (0, 1):
        told = Path(f"{groups}/full.error.{rank}").read_text()
        assert "OSError" in told
        assert "000000000120" in told
        assert "File too large" in told
        assert "could not be written" in told
    directory = groups / "full" / results.CHECKPOINTS
    assert sorted(p.name for p in directory.iterdir()) == ["000000000040", "000000000080"]


def test_a_kill_while_saving_shows_no_part(tmp_path):
    """Of two workers, one or both are killed at random moments; what shows, loads."""
    assert int(script(tmp_path, 3)) >= 3


@pytest.mark.slow
def test_many_kills_while_saving_show_no_part(tmp_path, rounds):
    kills = rounds(60, 500)
    assert int(script(tmp_path, kills)) >= kills


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_rays_workers_share_a_model_even_when_one_dies(alone, tmp_path, ray):
    """Rank 1 is killed at step 9; both start again from the parts saved at step 8."""
    (tmp_path / "die").touch()
    records, output = [], tmp_path / "stage"
    done = fit(job(output, 2, die_once=str(tmp_path / "die")), records.append, build=build)
    assert not (tmp_path / "die").exists()
    assert done == results.committed(output)
    assert_close(output, alone, 1e-5)
    assert [r["images_seen"] for r in records] == [r["images_seen"] for r in results.history(alone)]
    (path,) = checkpoint.visible(output / results.CHECKPOINTS)
    assert len(list(path.glob("state-*-of-00002.safetensors"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_kind_of_stage_learns_the_same_sharded(line, tmp_path):
    """Real networks and data; held-out losses, measurements and pictures of the averages. Also with
    states that are drawn to a frozen tower's, with a codebook whose dead vectors begin anew, with
    transformers that text is read by or runs through, with blocks computed again, and in bf16."""
    plain = ("autoencoder", "t5", "base", "classifier", "clip", "noisy_clip")
    codebook = {"codebook": {"codes": 32, "revive_images": 16}}
    heard = stages.load(line.stages["base"]).config.network.contexts
    joint = {**DIT, "text": "joint", "contexts": [asdict(it) for it in heard]}
    made = {kind: (kind, dict[str, Any]()) for kind in plain} | {
        "aligned": ("base", {"alignment": {"block": 1, "hidden": 32}}),
        "revived": ("autoencoder", {"network": codebook}),
        "dit": ("base", {"network": DIT}),
        "joint": ("base", {"network": joint}),
        "recomputed": ("base", {"network": {"recompute": True}}),
        "bf16": ("base", {"network": joint | {"recompute": True}}),
    }
    jobs, asked_of = (
        [],
        {kind: json.loads(Path(line.stages[kind], results.JOB).read_bytes()) for kind in plain},
    )
    for name, (kind, more) in made.items():
        asked = copy.deepcopy(asked_of[kind])
        if name == "aligned":  # the tower sees the pictures
            asked["encodings"] += asked_of["autoencoder"]["encodings"]
        network = more.get("network", {})
        if "kind" not in network:
            network = asked["config"].get("network", {}) | network
        asked["config"] |= more | ({"network": network} if network else {})
        asked["training"] |= {
            "images": 96,
            # CLIP compares the rows of a batch.
            "micro_batch": 0 if "clip" in kind else 4,
            "log_images": 32,
            "checkpoint_images": 48,
            "precision": "bf16" if name == "bf16" else "fp32",
            "heldout_pictures": 16 if name == "base" else 0,
            "preview_images": 48,
            "workers": 2,
            "threads": 1,
        }
        for fsdp in (False, True):
            output = str(tmp_path / f"{name}-{'fsdp' if fsdp else 'ddp'}")
            jobs.append(asked | {"output": output, "training": asked["training"] | {"fsdp": fsdp}})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    script(tmp_path, tmp_path / "jobs.json")
    for kind in made:
        sharded, wanted = (tmp_path / f"{kind}-{how}" for how in ("fsdp", "ddp"))
        for a, b in zip(history(sharded), history(wanted), strict=True):
            assert a == pytest.approx(b, rel=1e-5), kind
        states = [
            checkpoint.load(checkpoint.visible(stage / results.CHECKPOINTS)[-1])
            for stage in (sharded, wanted)
        ]
        losses = [state.numbers.get(checkpoint.HELDOUT_LOSS) for state in states]
        assert (losses[1] is None) == (kind != "base")
        assert losses[0] == (losses[1] and pytest.approx(losses[1], rel=1e-5))
        one, other = (load_file(stage / results.WEIGHTS) for stage in (sharded, wanted))
        for name, tensor in one.items():
            found, expected = tensor.double(), other[name].double()
            if name.endswith(("in_proj_bias", "kv.bias")):
                # That of the keys moves no weight of attention: Adam makes steps of its rounding.
                parts = 2 if name.endswith(".kv.bias") else 3
                found, expected = (
                    torch.cat([*it.chunk(parts)[:-2], it.chunk(parts)[-1]])
                    for it in (found, expected)
                )
            off = (found - expected).norm()
            assert off <= 1e-3 * expected.norm().clamp(min=1e-2), (kind, name)
        assert (sharded / results.PREVIEW).exists() == (wanted / results.PREVIEW).exists()


DIT = {"kind": "dit", "width": 32, "depth": 2, "head_width": 8, "feedforward": 2}


def reached(stage_dir: Path) -> int:
    paths = checkpoint.visible(stage_dir / results.CHECKPOINTS)
    return int(paths[-1].name) if paths else 0


def uncommitted(stage_dir: Path, copy: Path) -> None:
    """A copy that is trained and not exported."""
    shutil.copytree(stage_dir, copy)
    for name in (results.STAGE, results.WEIGHTS, results.PREVIEW, results.CONFIG):
        (copy / name).unlink()


def joined(rank: int, size: int, met: object, fsdp: bool, stop: Callable[[], bool]) -> World:
    if size == 1:
        return World(stop=stop)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{met}", rank=rank, world_size=size
    )
    return of_process_group(rank, size, torch.device("cpu"), stop, fsdp)


def work(rank: int, size: int, output: Path, made: Made, stop_after: int | None) -> None:
    work_at(job(output, size, **made), rank, stop_after, build)


def work_at(mine: Job, rank: int, stop_after: int | None = None, build: Build = usual) -> None:
    output, training, asked = Path(mine.output), mine.training_config(), list[int]()
    size = training.workers

    def stop() -> bool:
        asked.append(rank)
        return rank == size - 1 and len(asked) == stop_after

    if "look_seconds" in mine.meta:
        measuring.heldout = lambda loader: loader
    met = f"{output}.group.{size}.{reached(output)}"
    world = joined(rank, size, met, training.fsdp, stop)
    try:
        run(mine, world, None, build)
    except (Stopped, SystemExit) as error:
        Path(f"{output}.stopped.{rank}").write_text(f"{type(error).__name__}: {error}")
    except OSError as error:
        Path(f"{output}.error.{rank}").write_text(f"{type(error).__name__}: {error}")


def save(rank: int, directory: Path, met: object) -> None:
    """Save forever, as one of two; each tensor says when it was made."""
    world = joined(rank, 2, met, True, lambda: False)
    stage = world.wrap(Tower(TowerConfig()))
    run = world.gather(f"{os.getpid():x}")[0]
    with checkpoint.Saver(directory, "f", part=checkpoint.Part(rank, 2, run)) as saver:
        for images in range(8, 8_000_000, 8):
            tensors = {f"weights/{n}": p.detach() for n, p in stage.named_parameters()}
            for tensor in tensors.values():
                sharding.local(tensor).fill_(images)
            saver.save(checkpoint.TrainState(tensors, images // 8, images))


def kill_savers(directory: Path, kills: int) -> None:
    chance, seen = random.Random(0), 0
    for kill in range(kills):
        before = len(checkpoint.visible(directory / "saved"))
        savers = [fork(save, rank, directory / "saved", directory / f"{kill}") for rank in (0, 1)]
        while len(checkpoint.visible(directory / "saved")) <= min(before, 1):
            time.sleep(0.002)  # they have come together and save
        time.sleep(chance.uniform(0, 0.05))
        doomed = chance.choice([savers, savers[:1], savers[1:]])
        for child in doomed:
            os.kill(child, signal.SIGKILL)
        look(directory / "saved")
        for child in savers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        seen += look(directory / "saved")
    print(seen)


def look(directory: Path) -> int:
    """Load all that shows and did not go meanwhile; how many."""
    seen = 0
    for path in checkpoint.visible(directory):
        try:
            found = checkpoint.load(path, "f")
        except checkpoint.Damaged:
            assert not path.exists(), path
            continue
        for name, tensor in found.tensors.items():
            assert (tensor == found.images_seen).all(), (path, name)
        assert len(found.tensors) == len(list(Tower(TowerConfig()).parameters()))
        seen += 1
    return seen


def fork(task: Callable[..., None], *arguments: object) -> int:
    if child := os.fork():
        return child
    try:
        task(*arguments)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def run_groups(directory: Path, slow: bool) -> None:
    for name, (made, sizes) in GROUPS.items():
        if (name in SLOW) != slow:
            continue
        output = directory / name
        if name in COPIES:
            uncommitted(directory / COPIES[name], output)
        for size, stop_after in sizes:
            children = [fork(work, rank, size, output, made, stop_after) for rank in range(size)]
            ends = [os.waitpid(child, 0)[1] for child in children]
            assert not any(ends), (name, size)


def run_jobs(path: Path) -> None:
    for values in json.loads(path.read_bytes()):
        children = [fork(work_at, Job.from_json(values), rank) for rank in (0, 1)]
        ends = [os.waitpid(child, 0)[1] for child in children]
        assert not any(ends), values["output"]


if __name__ == "__main__":
    # What each child would import again.
    import torch._dynamo
    import torch.distributed.fsdp

    torch.set_num_threads(1)
    logging.disable()
    directory, what = Path(sys.argv[1]), "".join(sys.argv[2:])
    if what in ("", "slow"):
        run_groups(directory, what == "slow")
    elif what.isdigit():
        kill_savers(directory, int(what))
    else:
        run_jobs(Path(what))
