"""Where things are: DARKROOM_HOME and the tools' own environment variables, nothing else.

Layout of the home: datasets/ stages/ models/ runs/ versions/ copies/ ledger/ mlflow.db mlartifacts/
"""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path


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

    def stage_noted(self, where: str) -> str:
        """A stage's directory, or a pretrained model, as a note names it that was written when the
        home may have lain elsewhere.
        """
        here = self.stage(Path(where).name)
        return str(here) if here.is_dir() else where

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
