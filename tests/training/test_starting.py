"""What a start took adds up, and is that of the newest one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from training import results, starting
from training.starting import Start


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    it = SimpleNamespace(now=1000.0, time=lambda: it.now)
    monkeypatch.setattr(starting, "time", it)
    return it


def test_phases_of_who_asks_and_of_who_trains_are_told_together(tmp_path, clock):
    asking = Start(began=997.0)
    asking.done("imports")
    clock.now += 2
    training = Start(tmp_path)
    clock.now += 0.5
    training.done("stage")
    training.done("nothing")
    clock.now += 1.25
    training.over("t5")
    clock.now += 60
    training.over("t5")
    phases = [["stage", 0.5], ["nothing", 0.0], ["first update", 1.25]]
    found = json.loads((tmp_path / results.STARTED).read_text())
    assert found == {"began": 1002.0, "phases": phases}
    told = "started in 6.8 s: imports 3.0, Ray 2.0, stage 0.5, first update 1.2"
    assert asking.told(tmp_path, "Ray") == told


def test_an_earlier_start_is_not_told(tmp_path):
    asking = Start()
    assert asking.told(tmp_path, "workers") is None
    Start(tmp_path, began=asking.began - 60).over("t5")
    assert asking.told(tmp_path, "workers") is None


def test_it_counts_from_the_start_of_the_process():
    """Elsewhere than on Linux, where a process is not asked for its age, from when it is told."""
    slept = 1 if sys.platform == "linux" else 0
    code = (
        "import time; time.sleep(1); from training.starting import Start; "
        "start = Start.of_process(); start.done('all'); "
        "print(time.time() - start.phases['all'], start.phases['all'])"
    )
    before = time.time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    began, took = map(float, done.stdout.split())
    assert before - 0.2 <= began <= before + 10
    assert slept <= took <= time.time() - before + 0.2
