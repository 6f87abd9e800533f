"""Long work shows that it moves: bars on a terminal, plain lines elsewhere (always on stderr), and
in Prefect's UI.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_QUIET_SECONDS = 600.0
"""Between two tries to reach a server that is away: Prefect's client gives up after a minute."""
log = logging.getLogger(__name__)


def say(text: str = "") -> None:
    with suppress(BrokenPipeError):  # who has gone need not hear it
        print(text, file=sys.stderr, flush=True)
    if text and _in_prefect():
        from prefect.logging import get_run_logger

        get_run_logger().info(text.strip())  # to the server alone: see settings.py


def _in_prefect() -> bool:
    """Whether this is a flow's or a task's run."""
    if "prefect" not in sys.modules:
        return False
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None


def seconds(value: float) -> str:
    return f"{value:.0f} s" if value < 90 else f"{value / 60:.1f} min"


class Meter:
    """One task's progress; call it with (done, total, note)."""

    def __init__(self, title: str, every_seconds: float = 15.0):
        self.title = title
        self.started = time.monotonic()
        self._every = every_seconds
        self._shown = self.started
        self._artifact: Any = None
        self._artifact_shown = 0.0
        self._quiet_until = 0.0
        self._bar = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
            from rich.progress import TimeRemainingColumn as Remaining

            columns = ("[bold]{task.description:<14}", BarColumn(32), "{task.percentage:>3.0f}%")
            self._bar = Progress(
                *(TextColumn(c) if isinstance(c, str) else c for c in columns),
                TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(),
                Remaining(),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(title, total=None, note="")

    def __call__(self, done: float, total: float, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, note=note)
        elif time.monotonic() - self._shown >= self._every:
            self._shown = time.monotonic()
            say(f"  {self.title}: {min(1.0, done / max(total, 1)):4.0%}  {note}")
        self._tell_prefect(min(100.0, 100 * done / max(total, 1)))

    def _tell_prefect(self, percent: float) -> None:
        """A progress artifact of the run we are in, if we are in one; every five seconds and at the
        end. A server that is away ends no work.
        """
        now = time.monotonic()
        if (now - self._artifact_shown < 5 and percent < 100) or now < self._quiet_until:
            return
        if not _in_prefect():
            return
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        self._artifact_shown = now
        try:
            if self._artifact is None:
                key = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
                self._artifact = create_progress_artifact(percent, key=key, description=self.title)
            else:
                update_progress_artifact(self._artifact, percent)
        except Exception as error:  # of the network, of HTTP or of the server
            self._quiet_until = time.monotonic() + _QUIET_SECONDS
            log.warning(
                "%s: Prefect's server is not told of progress for %s (%s); the work goes on",
                self.title,
                seconds(_QUIET_SECONDS),
                f"{type(error).__name__}: {error}".splitlines()[0],
            )


@contextmanager
def meter(title: str) -> Iterator[Meter]:
    it = Meter(title)
    if it._bar is not None:
        it._bar.start()
    try:
        yield it
    finally:
        if it._bar is not None:
            it._bar.stop()
