"""What MLflow did not get while a stage was trained, it gets by the same command later."""

from __future__ import annotations

import json
import threading

import pytest

from flows import commands
from flows.build_dataset import ingest_sources
from flows.line import Line
from flows.recipe import load
from flows.settings import Settings
from flows.train_stage import train
from training import results, tracking

TINY = [
    "data.scenes=48",
    'executor={"kind": "local"}',
    't5.config={"width": 32, "layers": 1, "heads": 2, "feedforward": 64, "max_bytes": 96}',
    't5.training={"images": 96, "batch": 16, "log_images": 16, "preview_images": 48}',
]


@pytest.fixture
def hasty(monkeypatch) -> None:
    """Nobody waits a minute for a server that is away; a slow machine may take one to answer."""
    monkeypatch.setattr(tracking.Run.finish, "__defaults__", ("FINISHED", 0.5))
    monkeypatch.setattr(tracking.catch_up, "__defaults__", (120,))


def test_a_server_that_is_up_after_the_end_gets_all_of_it(tmp_path, hasty, monkeypatch, capsys):
    """F8: away from before the first update until after the last and longer."""
    from mlflow import MlflowClient

    place = tmp_path / "later"
    place.write_text("no folder: a database cannot be opened in it")
    line = Line(load("shapes", TINY), Settings(tmp_path / "home", f"sqlite:///{place}/mlflow.db"))
    monkeypatch.setenv("DARKROOM_HOME", str(line.settings.home))
    data = ingest_sources(line).manifest
    stage, reused = train(line, "t5", data)
    directory = line.stage_dir("t5", data)
    late = tracking.waiting(directory / results.TRACKING)
    assert not reused
    assert late > 6

    said = commands.status()
    assert said["stages"][directory.name] == {"done": True, "images_seen": 96, "undelivered": late}
    assert f"done; {late} entries wait for MLflow until the same command runs" in said["text"]

    assert train(line, "t5", data) == (stage, True), "still away: no reason to fail"
    assert tracking.waiting(directory / results.TRACKING) == late

    for thread in threading.enumerate():
        if thread.name == "tracking":
            thread.join(30)
    place.unlink()
    place.mkdir()
    client = MlflowClient(line.settings.mlflow_uri)
    client.search_experiments()
    assert train(line, "t5", data) == (stage, True)
    assert commands.status()["stages"][directory.name]["undelivered"] == 0
    [run] = client.search_runs([client.get_experiment_by_name("shapes").experiment_id])
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "loss")
    logged = results.history(directory)
    assert [(m.step, m.value) for m in losses] == [(r["images_seen"], r["loss"]) for r in logged]
    for name, value in stage["measured"].items():
        assert run.data.metrics[f"measured.{name}"] == pytest.approx(value)
    told = client.download_artifacts(run.info.run_id, "stage.json", str(tmp_path))
    with open(told) as file:
        assert json.load(file) == stage
