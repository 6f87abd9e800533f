"""A training of one worker that stands still, in the process of a command, of a stage beside
another, and of a deployment's run: it goes on by itself, or ends and says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from flows import recipe as recipes
from flows.hanging import TRIES
from flows.line import Line
from flows.settings import settings
from tests.training.test_job import lines
from training import results, tracking

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HANGS = """
import os, time
from pathlib import Path
from pipeline.load import Loader

batches = Loader.batches

def until_it_hangs(self, start_step=0, **options):
    for step, batch in enumerate(batches(self, start_step, **options), start_step):
        for fate in Path(os.environ["FATES"]).glob(f"{step}.*"):
            if fate.suffix == ".once":
                fate.unlink()
            Path(os.environ["FATES"], "hanging").touch()
            time.sleep(600)
        yield batch

Loader.batches = until_it_hangs
"""
"""What every Python process of a command imports first: the loader stands still before a step that
a file is named after."""
TINY = {
    "data.scenes": 300,
    "data.ingest.shard_samples": 100,
    "executor.kind": "local",
    "autoencoder.config.network.channels": 16,
    "autoencoder.training.images": 1600,
    "autoencoder.training.checkpoint_images": 320,
    "autoencoder.training.stall_seconds": 10,
}
BATCH = 32
WORDS = ("train", "shapes", "autoencoder", *(f"{k}={json.dumps(v)}" for k, v in TINY.items()))


class Fated:
    """The command line on a home of its own, whose loaders stand still where `fate` says."""

    def __init__(self, darkroom: Any, directory: Path):
        self.home = type(darkroom)(directory / "home")
        self.fates, self.log = directory / "fates", directory / "log"
        self.fates.mkdir()
        (directory / "first").mkdir()
        (directory / "first" / "sitecustomize.py").write_text(HANGS)
        paths = (directory / "first", Path(__file__).parents[2])
        self.home.environment |= {
            "FATES": str(self.fates),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }

    def fate(self, step: int, how: str) -> Path:
        (path := self.fates / f"{step}.{how}").touch()
        return path

    def start(self, *words: str) -> subprocess.Popen[str]:
        with self.log.open("w") as err:
            return subprocess.Popen(
                self.home.command(*words, "--json"), env=self.home.environment, text=True,
                stdout=subprocess.PIPE, stderr=err,
            )  # fmt: skip

    def __call__(self, *words: str) -> tuple[int, dict[str, Any], str]:
        """(exit code, the only line of its stdout, its stderr)."""
        with self.start(*words) as it:
            try:
                (said,) = it.communicate(timeout=600)[0].splitlines()
            finally:
                it.kill()
        return it.returncode, json.loads(said), self.log.read_text()

    @property
    def stage(self) -> Path:
        (it,) = (p for p in (self.home.home / "stages").glob("autoencoder-*") if not p.suffix)
        return it


@pytest.fixture(scope="module")
def fated(darkroom, tmp_path_factory) -> Fated:
    it = Fated(darkroom, tmp_path_factory.mktemp("hanging"))
    code, _, said = it(*WORDS)
    assert code == 0, said
    it.stage.rename(it.stage.with_name("calm"))
    return it


def mlflow_status(fated: Fated) -> str:
    """Of the newest run of the stage."""
    client = tracking.client(f"sqlite:///{fated.home.home}/mlflow.db")
    experiment = client.get_experiment_by_name("shapes")
    run, *_ = client.search_runs([experiment.experiment_id], order_by=["start_time DESC"])
    return run.info.status


def assert_as_undisturbed(fated: Fated) -> None:
    calm = fated.stage.with_name("calm")
    for name in (results.WEIGHTS, results.PREVIEW):
        assert (fated.stage / name).read_bytes() == (calm / name).read_bytes()
    assert lines(fated.stage) == lines(calm)


def test_a_command_that_hangs_begins_again_and_changes_no_bit(fated):
    """And what --fresh has set aside once is not all that it did since."""
    once, began = fated.fate(20, "once"), time.monotonic()
    code, answer, said = fated(*WORDS, "--fresh")
    took = time.monotonic() - began
    assert code == 0, said
    assert not once.exists()
    assert (answer["stage"], Path(answer["directory"])) == ("autoencoder", fated.stage)
    assert said.count("hangs: starting again from its newest checkpoint") == 1
    (start,) = re.findall(r"started in ([\d.]+) s", said)  # the second, and counted from there
    assert float(start) < took - TINY["autoencoder.training.stall_seconds"]
    assert "in until_it_hangs" in (fated.stage / results.STACKS / "0.txt").read_text()
    assert_as_undisturbed(fated)
    # From the checkpoint before it, not from the beginning.
    phases = json.loads((fated.stage / results.STARTED).read_text())["phases"]
    assert "checkpoint" in dict(phases)
    assert not list(fated.stage.parent.glob("*.old*"))


def test_a_command_that_hangs_wherever_it_begins_ends_and_says_where(fated):
    always = fated.fate(25, "always")
    code, answer, said = fated(*WORDS, "--fresh")
    assert code == 1, said
    stacks = fated.stage / results.STACKS
    assert answer["error"] == (
        f"Hung: the training in {fated.stage} hung {TRIES} times in a row without a new "
        f"checkpoint: find in {stacks} what hangs; the same command goes on"
    )
    assert f"darkroom: {answer['error']}" in said
    assert said.count("hangs: starting again") == TRIES - 1
    assert (stacks / "0.txt").read_text().count("no update for") == TRIES
    assert mlflow_status(fated) == "FAILED"
    always.unlink()
    code, _, said = fated(*WORDS)
    assert code == 0, said
    assert mlflow_status(fated) == "FINISHED"
    assert_as_undisturbed(fated)


def test_who_is_told_to_end_while_it_hangs_does_not_begin_again(fated):
    always, hanging = fated.fate(5, "always"), fated.fates / "hanging"
    hanging.unlink(missing_ok=True)
    with fated.start(*WORDS, "--fresh") as it:
        try:
            fated.home.until(hanging.exists, 120, fated.log)
            it.send_signal(signal.SIGTERM)
            (said,) = it.communicate(timeout=60)[0].splitlines()
        finally:
            it.kill()
    always.unlink()
    assert it.returncode == 128 + signal.SIGTERM, fated.log.read_text()
    assert json.loads(said) == {"error": "stopped; the same command goes on from here"}
    assert "starting again" not in fated.log.read_text()


@pytest.mark.parametrize("parallel", [1, 2])
def test_a_line_in_which_a_stage_hangs_goes_on_and_leaves_nothing_running(
    darkroom, tmp_path, parallel
):
    """Prefect's own server has ended with the command that began again, and knows what crashed."""
    fated = Fated(darkroom, tmp_path)
    fated.home.environment["PREFECT_HOME"] = str(tmp_path / "prefect")
    fated.home.environment.pop("PREFECT_API_URL", None)
    words = fated.home.run_words(parallel=parallel, **TINY)
    once = fated.fate(30, "once")  # the autoencoder's alone: the others have fewer steps
    code, answer, said = fated(*words)
    assert code in (0, 3), said
    assert not once.exists()
    assert answer["model"]
    assert said.count("hangs: starting again from its newest checkpoint") == 1
    assert not left_of(tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "prefect" / "prefect.db")) as base:
        runs = base.execute("select name, state_type from flow_run").fetchall()
    crashed = sorted(name for name, state in runs if state == "CRASHED")
    assert crashed == ["retrain shapes"] * (parallel == 1) + ["train autoencoder"]
    assert {state for _, state in runs} == {"CRASHED", "COMPLETED"}


def left_of(directory: Path) -> list[str]:
    """The command lines of processes whose Prefect is in a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(directory).encode() in (path / "environ").read_bytes():
                found.append((path / "cmdline").read_text())
    return found


SERVES = """
import json, sys
from flows.settings import prepare_environment
prepare_environment()
from flows.steps import train_stage
train_stage.serve("stage", parameters=json.loads(sys.argv[1]), limit=1)
"""


def test_a_run_of_a_deployment_that_hangs_crashes_and_the_next_goes_on(
    fated, prefect_api, tmp_path
):
    line = Line(recipes.load(WORDS[1], list(WORDS[3:])), settings(fated.home.environment))
    parameters = {"line": line.to_json(), "name": "autoencoder"}
    environment = fated.home.environment | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": prefect_api,
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    log = tmp_path / "log"
    for it in (fated.home.home / "stages").glob("autoencoder-*"):
        it.rename(it.with_name(f"before.{it.name}"))
    fated.fate(20, "once")

    def call(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            prefect_api + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def ended() -> str:
        """How a new run of the deployment ends."""
        named = {"deployments": {"name": {"any_": ["stage"]}}}
        (it,) = fated.home.until(lambda: call("/deployments/filter", named), 90, log)
        run = call(f"/deployments/{it['id']}/create_flow_run", {})["id"]
        final = ("COMPLETED", "FAILED", "CRASHED")
        fated.home.until(lambda: call(f"/flow_runs/{run}")["state_type"] in final, 180, log)
        return call(f"/flow_runs/{run}")["state_type"]

    serve = [sys.executable, "-c", SERVES, json.dumps(parameters)]
    with fated.home.beside(serve, environment, log):
        assert ended() == "CRASHED", log.read_text()
        assert ended() == "COMPLETED", log.read_text()
    assert_as_undisturbed(fated)
