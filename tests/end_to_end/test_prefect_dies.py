"""Prefect's worker dies in the middle of an ingest, then its server: what is committed stays."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flows import recipe as recipes
from flows.line import Line
from flows.settings import settings
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import ingest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROWS, UNIT = 320, 32
SERVES = """
import json, sys
from flows.settings import prepare_environment
prepare_environment()
from flows.steps import build_dataset
build_dataset.serve("data", parameters=json.loads(sys.argv[1]), limit=1)
"""


def tree(path: str | Path) -> dict[str, bytes]:
    """Relative path -> bytes of everything below, hidden files and all."""
    root = Path(path)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_a_run_goes_on_after_the_worker_and_the_server_died(darkroom, gallery, tmp_path):
    home = type(darkroom)(tmp_path / "home")
    table = gallery.table(tmp_path / "table.jsonl", ROWS)
    recipe = recipes.load(
        "pictures",
        [
            f"data.sources={json.dumps([table])}",
            f"data.ingest.download.private_hosts={json.dumps([gallery.host])}",
            "data.ingest.shard_samples=64",
            "data.side=32",
            "executor.kind=local",
        ],
    )
    line = Line(recipe, settings(home.environment))
    calm = ingest([table], str(tmp_path / "calm"), line.rules).manifest
    encode(calm, [pixels_spec(recipe.data.side)], None, Executor())
    assert gallery.taken() == [*range(ROWS)]

    api = f"http://127.0.0.1:{(port := home.free_port())}/api"
    environment = home.environment | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    }
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    parameters = {"line": line.to_json(), "name": recipe.name}
    serve = [sys.executable, "-c", SERVES, json.dumps(parameters)]
    logs = {name: tmp_path / f"{name}.log" for name in ("server", "again", "one", "two", "three")}

    def call(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(api + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def ask(log: Path) -> str:
        """Ask for a run of the deployment; its id."""
        (it,) = home.until(lambda: call("/deployments/filter", {}), 90, log)
        run = home.until(lambda: call(f"/deployments/{it['id']}/create_flow_run", {}), 90, log)
        return run["id"]

    def committed() -> int:
        return len([*Path(line.dataset, "staging").glob("*.jsonl")])

    gallery.hold_after(3 * UNIT - 8)
    with home.beside(prefect, environment, logs["server"]) as kill_server:
        home.until(lambda: call("/health"), 120, logs["server"])
        with home.beside(serve, environment, logs["one"]):
            ask(logs["one"])
            gallery.wait_until_held(90)
        assert committed() == 2
        gallery.hold_after(3 * UNIT - 8)
        with home.beside(serve, environment, logs["two"]):
            ask(logs["two"])
            gallery.wait_until_held(90)
            assert committed() == 4
            kill_server()
            gallery.release()
            with home.beside(prefect, environment, logs["again"]):
                home.until(lambda: call("/health"), 120, logs["again"])
                # The run whose server died may still be at it: this one finds its work, or waits.
                with home.beside(serve, environment, logs["three"]):
                    run = f"/flow_runs/{ask(logs['three'])}"
                    ended = lambda: call(run)["state_type"] in ("COMPLETED", "FAILED", "CRASHED")
                    home.until(ended, 180, logs["three"])
                    assert call(run)["state_type"] == "COMPLETED", logs["three"].read_text()[-3000:]
    times = Counter(gallery.taken())
    committed_before_a_kill = [*range(2 * UNIT), *range(3 * UNIT, 4 * UNIT)]
    assert {times[number] for number in committed_before_a_kill} == {1}
    assert {times[number] for number in range(ROWS)} == {1, 2}
    assert times.total() <= ROWS + 2 * UNIT, "only the unit under way is read again"
    assert tree(line.dataset) == tree(tmp_path / "calm")
