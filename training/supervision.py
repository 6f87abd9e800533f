"""What ends a training from outside: a signal, which waits for a checkpoint, and a watchdog, which
waits for nothing."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

log = logging.getLogger(__name__)

_TELLING_SECONDS = 5.0
HUNG = 70
"""The exit code of a process that ends because a training in it hangs."""
OnHang = Callable[[], object]
"""Called by the watchdog's thread, while all else may stand still; may end the process."""
T = TypeVar("T")
HEARD = threading.Event()
"""Set from the moment that a training of this process keeps a signal: it ends by itself."""


class Stopped(Exception):
    """Training ended early because it was asked to; its checkpoint is written."""


class BrokenOff(Exception):
    """What is done between two updates was given up, for the training was asked to stop; who goes
    on with it makes up for it."""


class Interrupts:
    """Keeps the first SIGTERM or Ctrl-C until `deliver`; a second one acts at once.

    Only in the main thread, where Python has signals; elsewhere nothing is ever received.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def deliver(self) -> NoReturn:
        """Let the received signal take its course: the handler that was there before, or an
        exit."""
        assert self.received is not None
        self._restore()
        if signal.getsignal(self.received) == signal.SIG_DFL:
            raise SystemExit(128 + self.received)  # unlike the default, this runs `finally` blocks
        signal.raise_signal(self.received)
        raise Stopped(f"stopped by {signal.Signals(self.received).name}")

    def _receive(self, number: int, _: Any) -> None:
        self.received = number
        HEARD.set()
        self._restore()
        log.warning("%s: writing a checkpoint, then ending", signal.Signals(number).name)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def within(seconds: float, do: Callable[[], T], otherwise: T) -> T:
    """What `do` returns; `otherwise` where it takes longer or fails: it may wait for the very thing
    that hangs, a file system for instance."""
    answers: list[T] = []

    def work() -> None:
        with contextlib.suppress(Exception):
            answers.append(do())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else otherwise


def end() -> NoReturn:
    """End this process at once, for whoever starts it again."""
    os._exit(HUNG)


class Watchdog:
    """Dumps every thread's stack to stderr when `beat` was not called for `stall_seconds`.

    They are appended to the file `stacks` as well, for what workers of a cluster say to stderr is
    nobody's to read. Then `on_hang` is called, by which the process ends or begins again: a hung
    collective cannot be interrupted. Without, as where somebody trains in a process of his own, it
    is told again and again and nothing else is done.
    """

    def __init__(
        self, stall_seconds: float, *, on_hang: OnHang | None = None, stacks: Path | None = None
    ):
        self.stall_seconds, self.stacks, self.stalls = stall_seconds, stacks, 0
        self.on_hang = on_hang
        self._beat = time.monotonic()
        self._done = threading.Event()

    def beat(self) -> None:
        self._beat = time.monotonic()

    def __enter__(self) -> Watchdog:
        if self.stall_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(self._beat + self.stall_seconds - time.monotonic()):
            silent = time.monotonic() - self._beat
            if silent < self.stall_seconds:
                continue
            self.stalls += 1
            within(_TELLING_SECONDS, lambda silent=silent: self._tell(silent), None)
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
            # Training may have ended meanwhile.
            if self.on_hang and not self._done.is_set():
                self.on_hang()
            self.beat()

    def _tell(self, silent: float) -> None:
        log.error("no update for %.0f s; the stacks of all threads follow", silent)
        if self.stacks is None:
            return
        with contextlib.suppress(OSError):  # they stand in stderr too
            self.stacks.parent.mkdir(parents=True, exist_ok=True)
            with self.stacks.open("a") as file:
                said = f"{time.strftime('%Y-%m-%d %H:%M:%S')}: no update for {silent:.0f} s"
                print(said, file=file, flush=True)
                faulthandler.dump_traceback(file=file, all_threads=True)
                print(file=file)
