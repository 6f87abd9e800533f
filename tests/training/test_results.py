"""What is done can be asked without torch."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time

import pytest

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
