"""With a Prefect server and a Ray cluster of their own: the line is deployed, runs when it is asked
to and when its hour comes, and its results are those of one machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def free_port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def until(what: Any, seconds: float, log: Path) -> Any:
    """The first true answer of `what`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if found := what():
                return found
        time.sleep(1)
    raise AssertionError(f"not within {seconds} s:\n{log.read_text()[-3000:]}")


def test_a_deployment_runs_when_asked_and_when_its_hour_comes(darkroom, tmp_path):
    first = darkroom(*darkroom.run_words())
    api = f"http://127.0.0.1:{(port := free_port())}/api"
    environment = darkroom.environment | {
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }

    def call(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(api + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def runs(kind: str) -> list[dict[str, Any]]:
        found = call("/flow_runs/filter", {"sort": "START_TIME_ASC"})
        mine = [run for run in found if run.get("deployment_id")]
        return [run for run in mine if run["state_type"] == "COMPLETED" and kind in run["tags"]]

    server, serving = tmp_path / "server.log", tmp_path / "deploy.log"
    prefect = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    deploy = darkroom.command("deploy", *darkroom.run_words()[1:], 'schedule="* * * * *"')
    with darkroom.beside(prefect, environment, server):
        until(lambda: call("/health"), 120, server)
        with darkroom.beside(deploy, environment, serving):
            known = until(lambda: call("/deployments/filter", {}), 120, serving)
            assert [it["name"] for it in known] == ["retrain-shapes"]
            call(f"/deployments/{known[0]['id']}/create_flow_run", {"tags": ["asked"]})
            until(lambda: runs("asked"), 240, serving)
            until(lambda: runs("auto-scheduled"), 240, serving)
            artifacts = call("/artifacts/filter", {})
    kinds = {it["type"] for it in artifacts}
    assert {"table", "image", "markdown"} <= kinds, kinds
    assert darkroom("status")["models"]["shapes"]["champion"] == first["model"][8:]


def test_another_cluster_gives_the_same_result(darkroom, tmp_path):
    first = darkroom(*darkroom.run_words())
    port, log = free_port(), tmp_path / "ray.log"
    away = type(darkroom)(tmp_path / "home")
    environment = dict(os.environ) | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": os.getcwd()}
    away.environment |= {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    head = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
        f"--port={port}", "--num-cpus=4", "--include-dashboard=false",
        "--object-store-memory=300000000", f"--temp-dir={tmp_path / 'r'}",
    ]  # fmt: skip
    with darkroom.beside(head, environment, log):
        until(lambda: "Ray runtime started" in log.read_text(), 90, log)
        there = away(*away.run_words())
    assert there["data"]["digest"] == first["data"]["digest"]
    names = ("correct", "heldout_loss", "kid")
    assert {n: there["scorecard"][n] for n in names} == {n: first["scorecard"][n] for n in names}
