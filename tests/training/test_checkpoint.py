"""Whole or invisible: round trips, damage, a full disk, and kills."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import checkpoint, distributed
from training.checkpoint import HELDOUT_LOSS, Damaged, Retention, Saver, TrainState


def state(images_seen: int = 64, size: int = 100) -> TrainState:
    """Its numbers say when it was made, so that a mixture of two would show."""
    return TrainState(
        {
            "weights/a": torch.full((size, 3), float(images_seen)),
            "weights/b.c": torch.arange(5) + images_seen,
            "ema/a": torch.full((size, 3), images_seen / 7, dtype=torch.float64),
            "optimizer/a:step": torch.tensor(float(images_seen)),
        },
        step=images_seen // 8,
        images_seen=images_seen,
        numbers={"window": {"loss": [0.1, 1 / 3, None]}, "skipped": 2},
    )


def latest(directory, fingerprint: str = "") -> TrainState:
    found = checkpoint.newest(directory, fingerprint)
    assert found is not None
    return found


def same(a: TrainState, b: TrainState) -> bool:
    return (
        (a.step, a.images_seen, a.numbers) == (b.step, b.images_seen, b.numbers)
        and a.tensors.keys() == b.tensors.keys()
        and all(
            t.equal(b.tensors[n]) and t.dtype == b.tensors[n].dtype for n, t in a.tensors.items()
        )
    )


def test_what_is_loaded_is_what_was_saved(tmp_path):
    saved = state()
    saved.tensors |= {
        "weights/half": torch.randn(3).half(),
        "weights/brain": torch.randn(3).bfloat16(),
        "weights/bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "weights/flag": torch.tensor(True),
        "weights/strided": torch.randn(4, 6).T,
        "weights/empty": torch.empty(0, 3),
    }
    path = checkpoint.save(tmp_path, saved, "f")
    assert same(checkpoint.load(path, "f"), saved)
    assert same(latest(tmp_path, "f"), saved)
    assert load_file(path / "state.safetensors").keys() == saved.tensors.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["000000000064"]


def test_the_last_two_are_kept_and_what_killed_writers_left_is_not(tmp_path):
    (tmp_path / ".000000000008.dead").mkdir()
    for images_seen in (64, 128, 1024, 256):
        checkpoint.save(tmp_path, state(images_seen))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000000256", "000000001024"]


def images_of(paths) -> list[int]:
    return [int(path.name) for path in paths]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (Retention(), [960, 1024]),
        (Retention(last=1), [1024]),
        (Retention(last=4), [832, 896, 960, 1024]),
        (Retention(last=1, images=300), [320, 640, 960, 1024]),
        (Retention(images=128), [*range(128, 1025, 128), 960]),
        (Retention(best=True), [448, 960, 1024]),
        (Retention(last=1, best=True, images=512), [448, 512, 1024]),
        (None, list(range(64, 1025, 64))),
    ],
)
def test_what_is_to_be_kept_is_kept_as_checkpoints_come(tmp_path, keep, kept):
    for images_seen in range(64, 1025, 64):
        saved = state(images_seen)
        if images_seen != 192:  # one that was not measured
            saved.numbers[HELDOUT_LOSS] = 1 + abs(images_seen - 448)
        checkpoint.save(tmp_path, saved, keep=keep)
    assert images_of(checkpoint.visible(tmp_path)) == sorted(kept)


def test_the_best_is_that_of_the_least_heldout_loss(tmp_path):
    assert checkpoint.best(tmp_path / "missing") is None
    for images_seen, loss in ((64, 0.5), (128, 0.3), (192, 0.3), (256, None), (320, 0.4)):
        saved = state(images_seen)
        saved.numbers[HELDOUT_LOSS] = loss
        checkpoint.save(tmp_path, saved, keep=None)
    assert checkpoint.best(tmp_path) == tmp_path / "000000000192"  # the newer of two
    lose_the_description(tmp_path / "000000000192")
    empty_the_description(tmp_path / "000000000128")
    assert checkpoint.best(tmp_path) == tmp_path / "000000000320"


def test_a_damaged_newest_gives_way_to_one_that_was_kept_for_its_images(tmp_path, caplog):
    for images_seen in (64, 128, 192, 256):
        newest = checkpoint.save(tmp_path, state(images_seen), keep=Retention(last=1, images=100))
    assert images_of(checkpoint.visible(tmp_path)) == [128, 256]
    cut(newest)
    with caplog.at_level(logging.WARNING):
        assert same(latest(tmp_path), state(128))
    assert "000000000256 is damaged, going back to the one before" in caplog.text


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "missing") is None


def flip_a_byte(path: Path) -> None:
    data = bytearray((path / "state.safetensors").read_bytes())
    data[-5] ^= 1
    (path / "state.safetensors").write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path / "state.safetensors", 200)


def lie_in_the_header(path: Path) -> None:
    file = path / "state.safetensors"
    data = file.read_bytes()
    file.write_bytes((2**40).to_bytes(8, "little") + data[8:])
    described = json.loads((path / "checkpoint.json").read_bytes())
    described["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(described))


def lose_the_description(path: Path) -> None:
    (path / "checkpoint.json").unlink()


def garble_the_description(path: Path) -> None:
    (path / "checkpoint.json").write_text('{"bytes": 3')


def empty_the_description(path: Path) -> None:
    (path / "checkpoint.json").write_text("{}")


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_byte,
        cut,
        lie_in_the_header,
        lose_the_description,
        garble_the_description,
        empty_the_description,
    ],
)
def test_a_damaged_newest_gives_way_to_the_one_before_and_says_so(tmp_path, caplog, damage):
    checkpoint.save(tmp_path, state(64))
    newest = checkpoint.save(tmp_path, state(128))
    damage(newest)
    with pytest.raises(Damaged):
        checkpoint.load(newest)
    with caplog.at_level(logging.WARNING):
        assert same(latest(tmp_path), state(64))
    assert str(newest) in caplog.text
    assert "the one before" in caplog.text


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def pickled(thing: object) -> bytes:
    return pickle.dumps(thing)


def saved_by_torch(thing: object) -> bytes:
    out = io.BytesIO()
    torch.save(thing, out)
    return out.getvalue()


def run_it(data: bytes, folder: Path) -> None:
    """What a careless reader would have done: it is hostile indeed."""
    assert not folder.exists(), "it was run"
    reader = torch.load if data.startswith(b"PK") else pickle.load
    reader(io.BytesIO(data), **({"weights_only": False} if reader is torch.load else {}))
    assert folder.exists()


@pytest.mark.parametrize("made", [pickled, saved_by_torch])
def test_a_pickle_in_place_of_the_tensors_is_refused_and_not_run(tmp_path, caplog, made):
    """Whoever put it there has signed it as well."""
    checkpoint.save(tmp_path / "run", state(64))
    newest = checkpoint.save(tmp_path / "run", state(128))
    data = made(Hostile(tmp_path / "owned"))
    (newest / "state.safetensors").write_bytes(data)
    described = json.loads((newest / "checkpoint.json").read_bytes())
    described |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (newest / "checkpoint.json").write_text(json.dumps(described))
    with pytest.raises(Damaged, match="SafetensorError"):
        checkpoint.load(newest)
    with caplog.at_level(logging.WARNING):
        assert same(latest(tmp_path / "run"), state(64))
    assert str(newest) in caplog.text
    run_it(data, tmp_path / "owned")


@pytest.mark.parametrize("made", [pickled, saved_by_torch])
def test_pickles_beside_the_tensors_are_left_alone(tmp_path, made):
    newest = checkpoint.save(tmp_path / "run", state(64))
    data = made(Hostile(tmp_path / "owned"))
    for name in ("state.pt", "state.pkl", "optimizer.pth", "data.pkl", ".metadata"):
        (newest / name).write_bytes(data)
        (newest.parent / name).write_bytes(data)
    (newest.parent / "000000000128").mkdir()  # a newer one of nothing else
    (newest.parent / "000000000128" / "state.pt").write_bytes(data)
    assert same(latest(tmp_path / "run"), state(64))
    checkpoint.save(tmp_path / "run", state(256))
    assert same(latest(tmp_path / "run"), state(256))
    run_it(data, tmp_path / "owned")


def test_a_damaged_one_is_set_aside_when_training_comes_there_again(tmp_path, caplog):
    """It is tried once, and what is kept is kept of the others."""
    checkpoint.save(tmp_path, state(64))
    for number in (1, 2):
        flip_a_byte(checkpoint.save(tmp_path, state(128)))
        caplog.clear()
        for _ in range(2):
            assert same(latest(tmp_path), state(64))
        assert caplog.text.count("is damaged") == 1
        aside = tmp_path / f"000000000128.damaged{'-2' if number > 1 else ''}"
        assert f"it stays as {aside.name}" in caplog.text
        assert (aside / "state.safetensors").exists()
    for images_seen in (128, 192, 256):
        checkpoint.save(tmp_path, state(images_seen))
        assert same(latest(tmp_path), state(images_seen))
    assert images_of(checkpoint.visible(tmp_path)) == [192, 256]
    assert {it.name for it in tmp_path.glob("*.damaged*")} == {
        "000000000128.damaged", "000000000128.damaged-2"
    }  # fmt: skip


def test_where_none_can_be_loaded_nothing_begins_anew(tmp_path):
    """They stay as they are until somebody takes them away."""
    for images_seen in (64, 128):
        flip_a_byte(checkpoint.save(tmp_path, state(images_seen)))
    told = r"none of its checkpoints can be loaded \(000000000128, 000000000064; .*delete them"
    for _ in range(2):
        with pytest.raises(Damaged, match=told):
            checkpoint.newest(tmp_path)
    assert images_of(checkpoint.visible(tmp_path)) == [64, 128]
    for path in checkpoint.visible(tmp_path):
        shutil.rmtree(path)
    assert checkpoint.newest(tmp_path) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, number):
    """Who starts it again finds it."""
    for images_seen in (64, 128):
        checkpoint.save(tmp_path, state(images_seen))

    def fails(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as away:
        away.setattr(checkpoint.hashlib, "file_digest", fails)
        with pytest.raises(OSError, match=os.strerror(number)) as caught:
            checkpoint.newest(tmp_path)
    assert caught.value.errno == number
    assert same(latest(tmp_path), state(128))


def together(*directories: Path) -> list[TrainState | BaseException | None]:
    """What each of several workers goes on from, each with a view of its own of one directory."""
    count = len(directories)
    meet, told = threading.Barrier(count), [None] * count

    def worker(rank: int) -> TrainState | None:
        def gather(value):
            told[rank] = value
            meet.wait(60)
            everyone = list(told)
            meet.wait(60)
            return everyone

        return checkpoint.agreed(directories[rank], "f", rank == 0, gather)

    with ThreadPoolExecutor(count) as pool:
        working = [pool.submit(worker, rank) for rank in range(count)]
        return [it.exception() or it.result() for it in working]


def test_workers_go_on_from_what_the_first_one_chooses(tmp_path):
    assert together(tmp_path, tmp_path / "none") == [None, None]
    checkpoint.save(tmp_path, state(64), "f")
    flip_a_byte(checkpoint.save(tmp_path, state(128), "f"))
    found = together(tmp_path, tmp_path, tmp_path)
    assert [isinstance(it, TrainState) and same(it, state(64)) for it in found] == [True] * 3
    assert (tmp_path / "000000000128.damaged").exists()


@pytest.mark.parametrize("late", [0, 1])
def test_a_checkpoint_that_one_does_not_see_yet_is_waited_for(tmp_path, monkeypatch, late):
    """Should it not come, that is no reason to give up for good, as a ValueError is."""
    views = [tmp_path / "one", tmp_path / "other"]
    for view in views:
        checkpoint.save(view, state(64), "f")
    newest = checkpoint.save(views[1 - late], state(128), "f")
    monkeypatch.setattr(checkpoint, "_VISIBLE_SECONDS", 0.0)
    for error in together(*views):
        assert isinstance(error, OSError)
        assert not distributed._is_final(error)
        assert f"000000000128 is seen by some workers, and not by [{late}]" in str(error)

    waited = time.sleep

    def appear(seconds):
        if not (views[late] / newest.name).exists():
            shutil.copytree(newest, views[late] / "hidden")
            os.rename(views[late] / "hidden", views[late] / newest.name)
        waited(seconds)

    monkeypatch.setattr(checkpoint, "_VISIBLE_SECONDS", 60.0)
    monkeypatch.setattr(checkpoint.time, "sleep", appear)
    for found in together(*views):
        assert isinstance(found, TrainState)
        assert same(found, state(128))


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    checkpoint.save(tmp_path, state(), "abc")
    with pytest.raises(ValueError, match="checkpoint of training abc, but this is training def"):
        checkpoint.newest(tmp_path, "def")


def test_a_full_disk_is_told_and_nothing_partial_shows(tmp_path):
    checkpoint.save(tmp_path, state(64))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"128 \(.* MiB\) could not be written.*Make room"):
            checkpoint.save(tmp_path, state(128, size=50_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["000000000064"]
    checkpoint.save(tmp_path, state(128, size=50_000))
    assert latest(tmp_path).images_seen == 128


BIG = 500_000


def test_saving_in_the_background_keeps_what_was(tmp_path):
    with Saver(tmp_path, "f") as saver:
        for images_seen in (64, 128):
            live = state(images_seen, size=BIG)
            saver.save(live)
            for tensor in live.tensors.values():
                tensor.zero_()
    assert same(latest(tmp_path, "f"), state(128, size=BIG))
    assert same(checkpoint.load(tmp_path / "000000000064"), state(64, size=BIG))


def test_saving_twice_at_the_same_place_writes_once(tmp_path):
    with Saver(tmp_path) as saver:
        saver.save(state())
        written = (tmp_path / "000000000064" / "checkpoint.json").stat().st_mtime_ns
        saver.save(state(), wait=True)
    assert (tmp_path / "000000000064" / "checkpoint.json").stat().st_mtime_ns == written


def test_a_failure_in_the_background_is_raised_by_the_next_call(tmp_path):
    (tmp_path / "file").write_text("not a directory")
    saver = Saver(tmp_path / "file")
    saver.save(state(64, size=BIG))
    with pytest.raises(OSError, match="could not be written"):
        saver.save(state(128, size=BIG))


SIZES = (20_000, BIG)
"""Of states that are written at once, and behind the training's back."""


def keep_saving(directory: str, size: int, told: int) -> None:
    """Go on from the newest, as a training does; a byte is told before each save."""
    first = latest(directory, "f").images_seen
    with Saver(directory, "f") as saver:
        for images_seen in range(first + 8, 8_000_000, 8):
            os.write(told, b".")
            saver.save(state(images_seen, size=size))


def kill_savers(directory: str, size: int, kills: int) -> None:
    """Fork, kill at a moment of one of its first saves, look; each time a new process goes on from
    what the last one left. However slow the machine is, none is killed before it saves."""
    started = time.perf_counter()
    checkpoint.save(directory, state(8, size=size), "f")
    one_save = time.perf_counter() - started
    chance, seen, cut_short = random.Random(0), 0, 0
    for _ in range(kills):
        unfinished = set(Path(directory).glob(".*"))
        listening, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                keep_saving(directory, size, told)
            finally:
                os._exit(1)
        os.close(told)
        assert os.read(listening, 1), "it ended by itself"
        if chance.random() < 0.5:
            started = time.perf_counter()
            assert os.read(listening, 1), "it ended by itself"
            one_save = time.perf_counter() - started
        time.sleep(chance.uniform(0, 2 * one_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(listening)
        cut_short += bool(set(Path(directory).glob(".*")) - unfinished)
        found = [checkpoint.load(path, "f") for path in checkpoint.visible(directory)]
        assert found, "a kill took the checkpoints that were there"
        for it in found:
            assert same(it, state(it.images_seen, size=size)), it.images_seen
        seen += len(found)
    print(seen, cut_short)


@pytest.mark.parametrize(("size", "share"), [(SIZES[0], 0.8), (SIZES[1], 0.2)])
def test_a_kill_never_shows_a_part(tmp_path, rounds, size, share):
    """Promise 4: 1,000 kills in `make soak`, some of them of writes in the background. Each finds
    whole ones, and many a write is cut."""
    behind = checkpoint.Snapshot(state(size=size)).bytes > checkpoint._FOREGROUND_BYTES
    assert behind == (size == BIG)
    kills = int(share * rounds(100, 1000))
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), str(size), str(kills)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=rounds(240, 3600),
    )
    assert done.returncode == 0, done.stderr
    seen, cut_short = map(int, done.stdout.split())
    assert seen >= kills
    assert cut_short >= kills // 10


if __name__ == "__main__":
    logging.disable()
    torch.set_num_threads(1)
    kill_savers(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
