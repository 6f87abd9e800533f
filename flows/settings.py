"""Where things are: DARKROOM_HOME and the tools' own environment variables, nothing else.

Layout of the home: datasets/ stages/ models/ runs/ versions/ copies/ ledger/ mlflow.db mlartifacts/
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import hanging


@dataclass(frozen=True)
class Settings:
    """The places of one installation; every path is absolute."""

    home: Path
    mlflow_uri: str

    @property
    def artifacts(self) -> str | None:
        """Where MLflow keeps artifacts when it is our own sqlite; a server decides for itself."""
        return str(self.home / "mlartifacts") if self.mlflow_uri.startswith("sqlite:") else None

    def dataset(self, name: str) -> str:
        return str(self.home / "datasets" / name)

    def stage(self, identity: str) -> Path:
        return self.home / "stages" / identity

    def model(self, identity: str) -> Path:
        return self.home / "models" / identity

    def run_record(self, identity: str) -> Path:
        return self.home / "runs" / f"{identity}.json"

    @property
    def versions(self) -> Path:
        """Which stages each registered version is made of."""
        return self.home / "versions"

    @property
    def copies(self) -> Path:
        """Notes of what was made of data sets and lies outside them."""
        return self.home / "copies"

    @property
    def ledger(self) -> str:
        return str(self.home / "ledger")


def settings(environment: Mapping[str, str] = os.environ) -> Settings:
    home = Path(environment.get("DARKROOM_HOME", ".darkroom")).expanduser().resolve()
    uri = environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / 'mlflow.db'}"
    return Settings(home, uri)


def prepare_environment(environment: MutableMapping[str, str] = os.environ) -> Settings:
    """Set what the tools need before they are imported; what the user set stays."""
    found = settings(environment)
    found.home.mkdir(parents=True, exist_ok=True)
    defaults = {
        # An ephemeral server starts in 14 to 21 s here; its default limit of 20 s is a coin toss.
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        # What must be dropped lies in our own logs; Prefect's API is not sent torch's warnings.
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        # What a run says goes to the server; on the terminal it stands already.
        "PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL": "INFO",
        "PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL": "INFO",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",
        # Ray 2.60 turns token authentication on by itself where nothing is said.
        "RAY_AUTH_MODE": "disabled",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_DEDUP_LOGS": "0",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_TRACKING_URI": found.mlflow_uri,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)
    return found


def end_on_sigterm() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, `finally` and `atexit` included: by
    its default nothing would end what the process has started, such as Prefect's server.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


@contextmanager
def leaving_without_goodbyes() -> Iterator[None]:
    """Around what takes long in a flow: who was told to end tells Prefect so once, and does not ask
    again. Not as a decorator: Prefect finds a flow again by the file of what it decorates.

    Where a supervisor ends a whole group of processes, Prefect's server has ended too; what Prefect
    has to say at the end, five times over and longer apart each time, took two minutes and a half.
    Where the process ends because a training in it hangs, Prefect is told that the run crashed.
    """
    from prefect.context import FlowRunContext
    from prefect.settings import get_current_settings

    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None, "called outside a flow's run"
    hanging.ends_where_prefect_started_us(context.flow_run)
    why = "a training in it hung"
    try:
        with hanging.at_the_end(partial(hanging.crash, context.client, context.flow_run, why)):
            yield
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM as Prefect or we put it
        get_current_settings().client.max_retries = 0
        raise


_GUARD = """
import select, signal, sys

process, seconds = int(sys.argv[1]), float(sys.argv[2])
sys.stdin.read()
ended = select.poll()
ended.register(process, select.POLLIN)
if not ended.poll(1000 * seconds):
    signal.pidfd_send_signal(process, signal.SIGTERM)
"""


def end_with_us(process: subprocess.Popen[Any], after_seconds: float = 0.0) -> None:
    """From now on a process that we started gets SIGTERM when this one is killed, SIGKILL included,
    if it has not ended `after_seconds` later; and before this one where a training in it hangs.

    For one that another library starts, which leaves no room for PR_SET_PDEATHSIG, and ends by
    `atexit` alone. A process beside us waits for our end: then its stdin closes. Only on Linux,
    where a pidfd names a process, and never another one that got its number.
    """
    hanging.ends_with_us(process)
    try:
        named = os.pidfd_open(process.pid)
    except (AttributeError, OSError):  # not Linux, an old kernel, or it has ended
        return
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(named), str(after_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,  # who reads what we say waits for its end
        stderr=subprocess.DEVNULL,
        pass_fds=(named,),
        start_new_session=True,  # a terminal's Ctrl-C is not for it
    )
    os.close(named)

    def let_go() -> None:
        guard.kill()
        guard.communicate()

    atexit.register(let_go)
    hanging.farewells.append(let_go)
