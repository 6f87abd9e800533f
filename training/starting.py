"""How long a training takes to start, phase by phase.

Who asks for it and who trains are one process or several: each has a `Start`, and what the first
worker leaves in the stage directory is told by whoever asked. Torch is not imported: it is one of
the phases.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

from pipeline import storage

from . import results

log = logging.getLogger(__name__)


class Start:
    """Phases since `began` (time.time()), which is now unless it is said. With `into`, a stage
    directory, what the first update took to come is written there."""

    def __init__(self, into: Path | None = None, began: float | None = None):
        self.began = self.last = time.time() if began is None else began
        self.phases: dict[str, float] = {}
        self._into, self._over = into, False

    @classmethod
    def of_process(cls) -> Start:
        """From when this process was started, where the system tells it."""
        try:
            fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf(
                "SC_CLK_TCK"
            )
        except (OSError, AttributeError):  # not Linux
            return cls()
        return cls(began=time.time() - age)

    def done(self, phase: str) -> None:
        now = time.time()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.last
        self.last = now

    def over(self, kind: str) -> None:
        """At each update; the first one ends the start."""
        if self._over:
            return
        self.done("first update")
        self._over = True
        log.info("%s: %s", kind, _text(self.phases))
        if self._into:
            found = {"began": self.began, "phases": list(self.phases.items())}
            storage.publish_json(str(self._into / results.STARTED), found)

    def told(self, stage_dir: str | os.PathLike[str], between: str) -> str | None:
        """In words, with the phases of the training that has begun since in a stage directory;
        `between` is what came before those. None where none has begun."""
        path = Path(stage_dir, results.STARTED)
        if not path.exists():
            return None
        found: dict[str, Any] = storage.read_json(str(path))
        waited = found["began"] - self.last
        if waited < 0:  # it is of an earlier start
            return None
        return _text(self.phases | {between: waited} | dict(found["phases"]))


def _text(phases: dict[str, float]) -> str:
    """`started in 5.1 s: torch 3.0, stage and data 2.1`; what took no time is left out."""
    parts = ", ".join(f"{name} {taken:.1f}" for name, taken in phases.items() if taken >= 0.05)
    return f"started in {sum(phases.values()):.1f} s: {parts}"
