"""What is done can be asked without torch."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline import storage
from training import results


def test_a_stage_is_done_when_its_last_file_is_there(tmp_path):
    assert results.committed(tmp_path / "missing") is None
    (tmp_path / results.WEIGHTS).write_bytes(b"")
    assert results.committed(tmp_path) is None
    (tmp_path / results.STAGE).write_text('{"kind": "base"}')
    assert results.committed(tmp_path) == {"kind": "base"}


def test_asking_imports_no_torch():
    code = "import sys, training.results; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def record(images_seen: int) -> dict:
    return {"images_seen": images_seen, "loss": 1 / images_seen}


def test_resuming_leaves_no_line_twice_and_none_torn(tmp_path):
    history = results.History(tmp_path, 0)
    for images_seen in (10, 20, 30):
        history.append(record(images_seen))
    history.close()
    with open(tmp_path / results.HISTORY, "a") as file:
        file.write('{"images_seen": 40, "lo')
    assert results.history(tmp_path) == [record(10), record(20), record(30)]
    history = results.History(tmp_path, 20)
    history.append(record(30))
    history.close()
    lines = (tmp_path / results.HISTORY).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record(10), record(20), record(30)]


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Files take so many bytes and no more: a full disk that needs no root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_in_a_line_is_told_and_leaves_no_part_of_it(tmp_path):
    history = results.History(tmp_path, 0)
    history.append(record(10))
    path = tmp_path / results.HISTORY
    whole = path.stat().st_size
    for more in (0, 1, 10):
        with (
            room_for(whole + more),
            pytest.raises(storage.NoRoom, match=r"bytes were to be written.*make room") as told,
        ):
            history.append(record(20))
        assert told.value.filename == str(path)
        assert path.stat().st_size == whole
    history.append(record(20))
    history.close()
    assert results.history(tmp_path) == [record(10), record(20)]


def test_a_line_that_is_not_json_is_left_out_and_said(tmp_path, caplog):
    lines = [json.dumps(record(images_seen)) for images_seen in (10, 20, 30, 40)]
    lines[1] = lines[1][:9] + lines[1]  # as a full disk once left it
    lines[2] = "\0" * 40  # as a machine that lost its power may
    path = tmp_path / results.HISTORY
    text = "".join(line + "\n" for line in lines)
    path.write_text(text)
    assert results.history(tmp_path) == [record(10), record(40)]
    for bad in lines[1:3]:
        assert f"{path}, byte {text.index(bad)}: left out, no JSON" in caplog.text
    results.History(tmp_path, 40).close()
    caplog.clear()
    assert results.history(tmp_path) == [record(10), record(40)]
    assert not caplog.text, "resuming leaves whole lines alone"


def test_there_is_no_history_before_training(tmp_path):
    assert results.history(tmp_path) == []


def test_numbers_that_are_none_are_not_written(tmp_path):
    history = results.History(tmp_path, 0)
    with pytest.raises(ValueError):
        history.append({"images_seen": 10, "loss": float("nan")})
    history.close()


def own(stage_dir: str, owned) -> None:
    with results.owning(stage_dir):
        owned.set()
        time.sleep(60)


def test_a_second_process_waits_for_the_first(tmp_path):
    fork = multiprocessing.get_context("fork")
    owned = [fork.Event(), fork.Event()]
    first, second = (fork.Process(target=own, args=(str(tmp_path), event)) for event in owned)
    first.start()
    assert owned[0].wait(30)
    second.start()
    assert not owned[1].wait(0.2)
    first.kill()  # the lock of a killed process is free
    assert owned[1].wait(30)
    second.kill()
    first.join()
    second.join()
