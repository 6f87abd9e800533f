"""What MLflow has in the end, whether or not it could be reached meanwhile."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from training import tracking
from training.tracking import FINGERPRINT, Run, deliver, flatten


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """An MLflow database: to make one takes seconds, to copy it nothing."""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    tracking.client(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(template, tmp_path) -> str:
    shutil.copyfile(template, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def client(uri):
    from mlflow import MlflowClient

    return MlflowClient(uri)


@pytest.fixture
def nowhere(monkeypatch) -> str:
    """The address of a server that is away."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def begin(tmp_path: Path, uri: str, spool: str = "spool", **more) -> Run:
    more = {"artifact_location": str(tmp_path / "artifacts"), **more}
    return Run.start("shapes", "base", uri=uri, spool=tmp_path / spool, **more)


def history(client, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def pictures(info) -> dict[str, list[int]]:
    """Name -> the steps that MLflow's slider has, of the names that it gives a run's pictures."""
    found: dict[str, list[int]] = {}
    for path in Path(info.artifact_uri, "images").glob("*.png"):
        name, _, step, *_ = path.stem.split("+")
        found[name] = sorted([*found.get(name, []), int(step)])
        with Image.open(path) as shown:
            assert shown.size[0] == shown.size[1]
    return found


def test_a_run_holds_all_that_was_logged(tmp_path, uri, client):
    params = {"images": 1000, "optimizer": {"kind": "adamw", "beta1": 0.9}}
    picture = np.zeros((8, 8, 3), np.uint8)
    with begin(tmp_path, uri, parent_run_id="p" * 32, tags={"stage": "base"}, params=params) as run:
        for images_seen in (100, 200, 300):
            run.log({"loss": 1 / images_seen, "skipped": None, "nan": float("nan")}, images_seen)
        run.log({"score": {"kid": 0.5}}, 300)
        run.image("preview", picture, 300)
        run.text("notes/read me.txt", "ü")
        run.dict("card.json", {"b": 1})
        (tmp_path / "report.html").write_text("<p>")
        run.file("report/page.html", tmp_path / "report.html")
        run.tag({"done": True})
        run_id = run.id()

    found = client.get_run(run_id)
    assert found.info.run_name == "base"
    assert found.info.status == "FINISHED"
    assert found.data.params == {
        "images": "1000",
        "optimizer.kind": "adamw",
        "optimizer.beta1": "0.9",
    }
    tags = {"stage": "base", "done": "True", "mlflow.parentRunId": "p" * 32}
    assert tags.items() <= found.data.tags.items()
    assert history(client, run_id, "loss") == [(n, 1 / n) for n in (100, 200, 300)]
    assert history(client, run_id, "score.kid") == [(300, 0.5)]
    assert set(found.data.metrics) == {"loss", "score.kid"}
    folder = Path(found.info.artifact_uri)
    assert (folder / "notes" / "read me.txt").read_text(encoding="utf-8") == "ü"
    assert json.loads((folder / "card.json").read_text()) == {"b": 1}
    assert (folder / "report" / "page.html").read_text() == "<p>"
    assert [p for p in (folder / "images").iterdir() if p.suffix == ".png"]
    left = [p for p in (tmp_path / "spool" / "files").iterdir() if p.is_file()]
    assert left == []


def test_a_figure_is_kept_as_its_suffix_says(tmp_path, uri, client):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.subplots().plot([1, 2])
    with begin(tmp_path, uri) as run:
        run.figure("curves/loss.png", figure)
    stored = Path(client.get_run(run.id()).info.artifact_uri, "curves", "loss.png")
    assert stored.read_bytes().startswith(b"\x89PNG")


def test_a_server_that_is_away_stops_nothing_and_gets_all_of_it_later(
    tmp_path, uri, client, nowhere, caplog
):
    """F8."""
    run = begin(tmp_path, nowhere, tags={FINGERPRINT: "abc"})
    started = time.perf_counter()
    for images_seen in range(100, 2100, 100):
        run.log({"loss": 1 / images_seen}, images_seen)
    run.text("a.txt", "kept")
    assert time.perf_counter() - started < 1
    assert run.id(timeout_seconds=0.1) is None
    with caplog.at_level(logging.WARNING):
        assert run.finish(timeout_seconds=0.5) is False
    assert "not all was delivered" in caplog.text

    deliver(tmp_path / "spool", uri)
    experiment = client.get_experiment_by_name("shapes").experiment_id
    [found] = client.search_runs([experiment])
    assert history(client, found.info.run_id, "loss") == [(n, 1 / n) for n in range(100, 2100, 100)]
    assert Path(found.info.artifact_uri, "a.txt").read_text() == "kept"
    assert found.info.status == "FINISHED"
    deliver(tmp_path / "spool", uri)
    assert len(history(client, found.info.run_id, "loss")) == 20


def test_a_server_that_comes_back_gets_it_while_the_run_goes_on(tmp_path, template, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setattr(tracking, "_BATCH_SECONDS", 0.05)
    uri = f"sqlite:///{tmp_path}/later/mlflow.db"
    (tmp_path / "later").write_text("no folder: a database cannot be opened in it")
    run = begin(tmp_path, uri)
    run.log({"loss": 1.0}, 100)
    assert run.id(timeout_seconds=1) is None
    (tmp_path / "later").unlink()
    (tmp_path / "later").mkdir()
    shutil.copyfile(template, tmp_path / "later" / "mlflow.db")
    run_id = run.id(timeout_seconds=60)
    assert run_id is not None
    run.log({"loss": 0.5}, 200)
    assert run.finish()
    assert history(MlflowClient(uri), run_id, "loss") == [(100, 1.0), (200, 0.5)]


@pytest.mark.parametrize("spool", ["spool", "another"])
def test_a_resumed_training_goes_on_with_its_run(tmp_path, uri, client, spool):
    tags = {FINGERPRINT: "abc"}
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((8, 8, 3), 99, np.uint8)).save(picture)
    first = begin(tmp_path, uri, tags=tags, params={"a": 1})
    with pytest.raises(KeyboardInterrupt), first:  # noqa: PT012
        first.log({"loss": 3.0}, 100)
        first.log({"loss": 2.0}, 200)
        first.image("preview", picture, 200)
        raise KeyboardInterrupt
    assert client.get_run(first.id()).info.status == "KILLED"
    with begin(tmp_path, uri, spool=spool, tags=tags, params={"a": 1}) as second:
        if spool == "spool":  # done again since the checkpoint
            second.log({"loss": 2.0}, 200)
            second.image("preview", picture, 200)
        second.image("preview", picture, 300)
        second.log({"loss": 1.0}, 300)
    assert second.id() == first.id()
    assert history(client, first.id(), "loss") == [(100, 3.0), (200, 2.0), (300, 1.0)]
    found = client.get_run(first.id()).info
    assert found.status == "FINISHED"
    assert pictures(found) == {"preview": [200, 300]}
    with begin(tmp_path, uri, spool="third", tags={FINGERPRINT: "def"}) as other:
        pass
    assert other.id() != first.id()


@pytest.mark.parametrize("spool", ["spool", "another"])
def test_a_training_that_goes_on_otherwise_says_so(tmp_path, uri, client, spool, caplog):
    """MLflow refuses another value of a parameter; nothing else of the run may be lost by that."""
    tags, changed = {FINGERPRINT: "abc"}, f"{tracking.CHANGED}training.workers"
    told = {"training": {"workers": 1, "batch": 8}}
    with begin(tmp_path, uri, tags=tags, params=told) as run:
        run.log({"loss": 2.0}, 100)
    assert changed not in client.get_run(run.id()).data.tags
    for seen, workers in ((200, 4), (300, 1)):
        told = {"training": {"workers": workers, "batch": 8, "threads": 2}}
        with begin(tmp_path, uri, spool=spool, tags=tags | {"seen": seen}, params=told) as again:
            again.log({"loss": 1.0}, seen)
        found = client.get_run(again.id())
        assert found.info.run_id == run.id()
        assert (found.info.status, found.data.tags["seen"]) == ("FINISHED", str(seen))
        assert found.data.params == {
            "training.workers": "1",
            "training.batch": "8",
            "training.threads": "2",
        }
        said = {k: v for k, v in found.data.tags.items() if k.startswith(tracking.CHANGED)}
        assert said == {changed: str(workers)}
    assert [step for step, _ in history(client, run.id(), "loss")] == [100, 200, 300]
    assert "refused" not in caplog.text


def test_a_parameter_that_mlflow_refuses_costs_nothing_else(tmp_path, uri, client, caplog):
    with begin(tmp_path, uri, params={"p" * 300: 1}, tags={"t": 1}) as run:
        run.log({"loss": 1.0}, 100)
    assert "refused start" in caplog.text
    found = client.get_run(run.id())
    assert (found.data.tags["t"], found.data.metrics) == ("1", {"loss": 1.0})


def test_a_torn_line_is_forgotten(tmp_path, uri, client):
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / tracking.SPOOL).write_text('{"do": "metr')
    with begin(tmp_path, uri) as run:
        run.log({"loss": 1.0}, 100)
    assert history(client, run.id(), "loss") == [(100, 1.0)]


def test_a_disk_that_fills_up_in_a_line_of_the_spool_is_told(
    tmp_path, uri, client, nowhere, monkeypatch
):
    monkeypatch.setattr(tracking, "LAST_SECONDS", 0.5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    spool, tags = tmp_path / "spool" / tracking.SPOOL, {FINGERPRINT: "abc"}
    with (  # noqa: PT012
        pytest.raises(storage.NoRoom, match="make room") as told,
        begin(tmp_path, nowhere, tags=tags) as run,
    ):
        run.log({"loss": 2.0}, 100)
        size = spool.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            run.log({"loss": 1.0}, 200)
        finally:
            assert spool.stat().st_size == size
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.filename == str(spool)
    monkeypatch.undo()
    with begin(tmp_path, uri, tags=tags) as run:
        run.log({"loss": 1.0}, 200)
    assert history(client, run.id(), "loss") == [(100, 2.0), (200, 1.0)]


def test_who_cannot_write_that_it_failed_tells_why_it_failed(tmp_path, nowhere, monkeypatch):
    monkeypatch.setattr(tracking, "LAST_SECONDS", 0.5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(ZeroDivisionError), begin(tmp_path, nowhere) as run:  # noqa: PT012
        size = (tmp_path / "spool" / tracking.SPOOL).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        raise ZeroDivisionError
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run._file.closed
    assert run._given_up.is_set()


@pytest.mark.parametrize("last", [False, True])
def test_a_line_of_the_spool_that_is_not_json_costs_only_itself(
    tmp_path, uri, client, nowhere, caplog, last
):
    run = begin(tmp_path, nowhere)
    run.log({"loss": 2.0}, 100)
    run.log({"loss": 1.5}, 200)
    run.log({"loss": 1.0}, 300)
    run.finish(timeout_seconds=0.5)
    path = tmp_path / "spool" / tracking.SPOOL
    lines = path.read_bytes().splitlines(keepends=True)
    bad = -1 if last else 2
    lines[bad] = lines[bad][:9] + lines[bad]
    path.write_bytes(b"".join(lines))
    caplog.clear()
    deliver(tmp_path / "spool", uri)
    assert "left out, no JSON" in caplog.text
    assert tracking.waiting(tmp_path / "spool") == 0
    [found] = client.search_runs([client.get_experiment_by_name("shapes").experiment_id])
    steps = [step for step, _ in history(client, found.info.run_id, "loss")]
    assert steps == [100, 200, 300] if last else [100, 300]


def test_what_waits_is_delivered_late_and_once(tmp_path, uri, client, nowhere, caplog):
    """Two that are at it at the same time do not show a picture twice."""
    spool = tmp_path / "spool"
    run = begin(tmp_path, nowhere)
    run.log({"loss": 1.0}, 100)
    run.image("preview", np.zeros((8, 8, 3), np.uint8), 100)
    assert not run.finish(timeout_seconds=0.5)
    assert tracking.waiting(spool) == 4  # start, metrics, image, finish
    caplog.clear()
    started = time.perf_counter()
    assert not tracking.catch_up([spool, tmp_path / "none"], nowhere, timeout_seconds=5)
    assert time.perf_counter() - started < 10
    assert f"MLflow at {nowhere} has not all yet" in caplog.text
    assert str(spool) in caplog.text
    both = [threading.Thread(target=deliver, args=(spool, uri)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert tracking.waiting(spool) == 0
    assert tracking.catch_up([spool], nowhere), "nothing waits: nobody is asked"
    [found] = client.search_runs([client.get_experiment_by_name("shapes").experiment_id])
    assert pictures(found.info) == {"preview": [100]}
    assert found.info.status == "FINISHED"


def test_what_mlflow_refuses_does_not_hold_up_the_rest(tmp_path, uri, client, caplog):
    with caplog.at_level(logging.WARNING), begin(tmp_path, uri, params={"a": 1}) as run:
        run.tag({"t" * 300: 1})
        run.log({"what?!": 2.0}, 100)
    assert "refused tags" in caplog.text
    assert client.get_run(run.id()).data.metrics == {"what__": 2.0}


def test_many_metrics_arrive_in_batches(tmp_path, uri, client):
    with begin(tmp_path, uri) as run:
        for step in range(1, 301):
            run.log({f"m{n}": step + n for n in range(5)}, step)
    assert len(history(client, run.id(), "m4")) == 300


def test_a_failure_is_told(tmp_path, uri, client):
    with pytest.raises(ZeroDivisionError), begin(tmp_path, uri) as run:
        raise ZeroDivisionError
    assert client.get_run(run.id()).info.status == "FAILED"


def test_names_are_those_of_the_command_line():
    nested = {"network": {"channels": 64, "levels": [1, 2]}, "seed": 0}
    assert flatten(nested) == {"network.channels": 64, "network.levels": [1, 2], "seed": 0}


def test_mlflow_is_imported_only_when_something_is_delivered():
    code = "import sys, training.tracking; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_dies_during_a_training_has_all_of_it_in_the_end(
    tmp_path, template, line, nowhere, monkeypatch
):
    """Killed after a quarter of a real training, started again after three quarters."""
    from mlflow import MlflowClient

    from pipeline.encode import pixels_spec
    from training import results
    from training.job import Job
    from training.job import run as train

    monkeypatch.setattr(tracking, "_BATCH_SECONDS", 0.1)
    shutil.copyfile(template, tmp_path / "mlflow.db")
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", nowhere.rpartition(":")[2]]
    command += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db"]
    command += ["--artifacts-destination", str(tmp_path / "artifacts")]

    def server():
        with (tmp_path / "server.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def up() -> bool:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(f"{nowhere}/health", timeout=5).status == 200
        return False

    def wait(what, seconds: float = 120.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, (tmp_path / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    spec, output = pixels_spec(16), tmp_path / "stage"
    job = Job(
        kind="autoencoder",
        fingerprint="f",
        config={"network": {"channels": 8, "channel_mult": [1], "latent_channels": 3}},
        training={
            "images": 1600,
            "batch": 16,
            "log_images": 16,
            "preview_images": 160,
            "heldout_pictures": 16,
            "heldout_images": 80,
            "threads": 1,
        },
        dataset=line.data.dataset,
        version=line.data.version,
        encodings=({"name": spec.name, "kind": spec.kind, "fingerprint": spec.fingerprint},),
        output=str(output),
    )
    running = server()
    wait(up)
    with begin(tmp_path, nowhere, artifact_location=None) as run:

        def show(record):
            nonlocal running
            seen = record["images_seen"]
            run.log(record, seen)
            for path in sorted((output / results.PREVIEWS).glob("*.png")):
                run.image("preview", path, int(path.stem))
            if seen == 400:
                run_id = run.id()
                wait(lambda: history(MlflowClient(nowhere), run_id, "loss"))
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
                assert not up()
            if seen == 1200:
                assert not run._courier.done()
                running = server()

        try:
            train(job, None, show)
            show({"images_seen": 1600})
            assert run.finish(timeout_seconds=120)
            client = MlflowClient(nowhere)
            found = client.get_run(run.id())
            assert found.info.status == "FINISHED"
            steps = [step for step, _ in history(client, found.info.run_id, "loss")]
            assert steps == list(range(16, 1601, 16))
            unseen = history(client, found.info.run_id, "heldout_loss")
            assert [step for step, _ in unseen] == list(range(80, 1601, 80))
            names = [it.path for it in client.list_artifacts(found.info.run_id, "images")]
            shown = sorted(int(it.split("+")[2]) for it in names if it.endswith(".png"))
            # The one that was on its way when the server died may have arrived, unheard, and again.
            assert sorted(set(shown)) == list(range(160, 1601, 160))
            assert len(shown) <= len(set(shown)) + 1
        finally:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()


MAKE = """
import sys

from training import tracking

tracking.client(sys.argv[1]).create_experiment(sys.argv[2])
"""


def _maker(uri: str, name: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", MAKE, uri, name])


def test_two_processes_may_make_the_database_at_once(tmp_path):
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    both = [_maker(uri, name) for name in ("a", "b")]
    for it in both:
        assert it.wait(120) == 0
    names = {it.name for it in tracking.client(uri).search_experiments()}
    assert names == {"Default", "a", "b"}


def test_beside_a_database_that_is_there_nothing_is_written(uri, tmp_path):
    before = sorted(it.name for it in tmp_path.iterdir())
    assert tracking.client(uri).search_experiments()
    assert sorted(it.name for it in tmp_path.iterdir()) == before


def test_a_process_killed_while_it_makes_the_database_leaves_none(tmp_path):
    """MLflow makes its tables one by one, and refuses for good what a killed process left."""
    path = tmp_path / "mlflow.db"
    uri = f"sqlite:///{path}"
    it = _maker(uri, "a")
    while not any(draft.stat().st_size for draft in tmp_path.rglob("draft")):
        assert it.poll() is None
    it.kill()
    it.wait()
    assert not path.exists()
    assert [e.name for e in tracking.client(uri).search_experiments()] == ["Default"]
