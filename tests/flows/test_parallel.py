"""Which stages may begin beside each other; that they do is tests/end_to_end/test_parallel.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from flows import parallel
from flows.parallel import startable
from flows.presets import PRESETS
from flows.recipe import Recipe, RecipeError, load
from pipeline.execute import cpus


def waves(recipe: Recipe) -> list[list[str]]:
    """What begins when all that runs ends at once, time and again."""
    done: list[str] = []
    found: list[list[str]] = []
    while now := startable(recipe, done, ()):
        found.append(now)
        done += now
    assert sorted(done) == sorted(recipe.stages)
    return found


def test_a_stage_that_hears_nothing_begins_with_the_first_of_all():
    recipe = load("shapes-unclip", ["parallel=8"])
    assert waves(recipe) == [["clip", "t5", "sr1"], ["prior", "base"]]
    silent = ["sr1.config.listens=[]", "sr2.config.listens=[]"]
    assert waves(load("shapes-cdm", ["parallel=8", *silent])) == [
        ["clip", "t5", "sr1", "sr2"],
        ["base"],
    ]


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("room", [1, 2, 9])
def test_nothing_begins_before_what_it_learns_from(name, room):
    recipe = load(name, [f"parallel={room}"])
    done: set[str] = set()
    for now in waves(recipe):
        assert len(now) <= room
        assert all(set(recipe.inputs(it)) <= done for it in now)
        done |= {*now}


def test_a_stage_begins_as_soon_as_there_is_room_and_its_own_inputs_are_there():
    recipe = load("shapes-unclip", ["parallel=2"])
    assert startable(recipe, (), ()) == ["clip", "t5"]
    assert startable(recipe, (), ("clip", "t5")) == []
    # clip is there: the prior hears it alone, and t5 is still at it
    assert startable(recipe, ("clip",), ("t5",)) == ["prior"]
    assert startable(recipe, ("t5",), ("clip",)) == ["sr1"]
    # what is encoded for the prior does not keep sr1 waiting
    assert startable(recipe, ("clip",), ()) == ["t5", "prior"]
    assert startable(recipe, ("clip", "t5"), ()) == ["prior", "base"]
    assert startable(recipe, ("clip", "t5", "base"), ()) == ["sr1", "prior"]
    edit = load("shapes-diffusionclip", ["parallel=9"])
    assert "edit" not in startable(edit, ("clip", "t5", "noisy_clip"), ())
    assert startable(edit, ("clip", "t5", "noisy_clip", "base"), ()) == ["edit"]


def test_there_is_room_for_one_or_more():
    with pytest.raises(RecipeError, match="parallel"):
        load("shapes-cdm", ["parallel=0"])


def test_stages_share_the_cores_and_take_turns_at_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    recipe = load("shapes-unclip", ["parallel=3", "base.training.workers=2"])
    given = [parallel._environment(recipe, name, slot) for slot, name in enumerate(recipe.stages)]
    devices = {
        it: found["CUDA_VISIBLE_DEVICES"] for it, found in zip(recipe.stages, given, strict=True)
    }
    # Two workers are Ray's to place: its driver must see what there is.
    wanted = {"clip": "3", "t5": "5", "prior": "3", "base": "3,5", "sr1": "3"}
    assert devices == wanted
    assert {it["OMP_NUM_THREADS"] for it in given} == {str(max(1, cpus() // 3))}
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert parallel._environment(recipe, "clip", 0)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize("heard", [False, True])
def test_a_process_that_lost_its_signal_is_told_again(heard):
    """As where Prefect's handler raises in a `__del__`; but not while a checkpoint is written."""
    script = f"""
import signal, sys, threading, time
from flows import parallel
from training import supervision

parallel.AGAIN_SECONDS, parallel.ENDING_SECONDS, told = 0.1, 1.0, []

def lose(*_):
    told.append(1)
    {"supervision.HEARD.set()" if heard else "len(told) > 2 and sys.exit(7)"}

signal.signal(signal.SIGTERM, lose)
threading.Thread(target=parallel._end_with_the_caller, daemon=True).start()
time.sleep(0.7)
sys.exit(len(told))
"""
    done = subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, timeout=60)
    assert done.returncode == (1 if heard else 7)
