"""The whole line, made tiny: every part is the real one, only smaller and trained for seconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

TINY = {
    "data.scenes": 700,
    "data.ingest.shard_samples": 200,
    "autoencoder.config.network.channels": 16,
    "autoencoder.training.images": 1600,
    "clip.training.images": 1024,
    "t5.training.images": 640,
    "base.config.network.channels": 32,
    "base.training.images": 1280,
    "base.warm_images": 640,
    "sampler.steps": 4,
    "evaluation.prompts": 32,
    "evaluation.sweep_prompts": 8,
    "evaluation.reference_count": 64,
    "evaluation.train_count": 128,
    "evaluation.kid_block": 16,
    "evaluation.guidance_scales": [2.0],
    "gate.absolute": {},
    "gate.non_inferior": {"correct": 0.9},
    "gate.min_samples": 16,
}


class Darkroom:
    """The command line, on a home of its own."""

    def __init__(self, home: Path):
        self.home = home
        self.environment = os.environ | {"DARKROOM_HOME": str(home), "PYTHONUNBUFFERED": "1"}
        self.environment.pop("MLFLOW_TRACKING_URI", None)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "flows", *words]

    def run_words(self, **changes: Any) -> list[str]:
        values = TINY | {key.replace("__", "."): value for key, value in changes.items()}
        return ["run", "shapes", *(f"{k}={json.dumps(v)}" for k, v in values.items())]

    def __call__(self, *words: str, code: int | None = 0) -> dict[str, Any]:
        """What it answers; `code`: the exit code it must have, None: any."""
        done = subprocess.run(
            self.command(*words, "--json"),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=1200,
            check=False,
        )
        assert code in (None, done.returncode), done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    def killed(self, words: list[str], when: Callable[[], bool], poll: float = 0.05) -> bool:
        """Run until `when`, then SIGKILL the whole process tree; False: it ended before."""
        process = subprocess.Popen(
            self.command(*words),
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while process.poll() is None:
            if when():
                kill_tree(process.pid)
                process.wait()
                return True
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(poll)
        return False

    @staticmethod
    def free_port() -> int:
        with socket.socket() as it:
            it.bind(("127.0.0.1", 0))
            return it.getsockname()[1]

    @staticmethod
    def until(what: Callable[[], Any], seconds: float, log: Path) -> Any:
        """The first true answer of `what`."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError, ValueError):
                if found := what():
                    return found
            time.sleep(1)
        raise AssertionError(f"not within {seconds} s:\n{log.read_text()[-3000:]}")

    @staticmethod
    @contextlib.contextmanager
    def beside(
        words: list[str], environment: Mapping[str, str], log: Path
    ) -> Iterator[Callable[[], None]]:
        """A process that runs as long as the block, and is killed with all that it started: at the
        block's end, or when what is given is called.
        """
        with log.open("wb") as out:
            it = subprocess.Popen(
                words, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

            def kill() -> None:
                if it.poll() is None:
                    kill_tree(it.pid)
                    it.wait()

            try:
                yield kill
            finally:
                kill()


def kill_tree(root: int) -> None:
    """SIGKILL a process and all that it started, however deep (Ray opens sessions)."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, rest = stat.read_text().split(" ", 1)
            parents[int(pid)] = int(rest.rsplit(")", 1)[1].split()[1])
    tree = {root}
    while found := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= found
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def prefect_api(tmp_path_factory) -> Iterator[str]:
    """The address of a Prefect server for all commands: one of its own takes each of them 20 s to
    start. That it starts one where none is named, other tests and the demo show."""
    folder, port = tmp_path_factory.mktemp("prefect"), Darkroom.free_port()
    api, log = f"http://127.0.0.1:{port}/api", folder / "server.log"
    environment = os.environ | {
        "PREFECT_HOME": str(folder),
        "PREFECT_API_URL": api,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    words = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]

    def healthy() -> bool:
        with urllib.request.urlopen(f"{api}/health", timeout=5) as answer:
            return answer.status == 200

    with Darkroom.beside(words, environment, log):
        Darkroom.until(healthy, 120, log)
        yield api


@pytest.fixture(scope="session")
def darkroom(tmp_path_factory, prefect_api) -> Darkroom:
    made = Darkroom(tmp_path_factory.mktemp("home"))
    made.environment["PREFECT_API_URL"] = prefect_api
    return made
