"""With a Prefect server of its own the line is deployed; it runs when asked, and when its hour
comes.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_deployment_runs_when_asked_and_when_its_hour_comes(darkroom, tmp_path):
    first = darkroom(*darkroom.run_words())
    words = darkroom.run_words(sampler__steps=5)  # to be drawn, scored and judged; not trained
    api = f"http://127.0.0.1:{(port := darkroom.free_port())}/api"
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
    deploy = darkroom.command("deploy", *words[1:], 'schedule="* * * * *"')
    with darkroom.beside(prefect, environment, server):
        darkroom.until(lambda: call("/health"), 120, server)
        with darkroom.beside(deploy, environment, serving):
            known = darkroom.until(lambda: call("/deployments/filter", {}), 120, serving)
            assert [it["name"] for it in known] == ["retrain-shapes"]
            # A server on sqlite answers 503 while it writes; its own clients ask again as well.
            run = f"/deployments/{known[0]['id']}/create_flow_run"
            darkroom.until(lambda: call(run, {"tags": ["asked"]}), 60, serving)
            darkroom.until(lambda: runs("asked"), 240, serving)
            darkroom.until(lambda: runs("auto-scheduled"), 240, serving)
            artifacts = darkroom.until(lambda: call("/artifacts/filter", {}), 60, serving)
            lines = darkroom.until(lambda: call("/logs/filter", {}), 60, serving)
            logs = [it["message"] for it in lines]
    kinds = {it["type"] for it in artifacts}
    assert {"table", "image", "markdown"} <= kinds, kinds
    assert any(it.startswith("scores ") for it in logs), logs
    again = darkroom(*words, code=None)
    assert again["model"] != first["model"]
    assert {"base", "scores", "verdict"} <= set(again["reused"])
