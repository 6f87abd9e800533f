"""A command in which a training hangs begins again, in place, as often as that gets it further."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import NoReturn

from training import results, supervision

from . import ending
from .progress import say

TRIES = 4
"""So often a training may hang without a new checkpoint; then that ends it."""
KNOWN = "DARKROOM_HUNG"
"""The environment variable in which a command tells itself what it has been through."""
ASKING_SECONDS = 5.0
AGAIN = "the training in {} hangs: starting again from its newest checkpoint"
MOST_FILES = 2**16
GOES_ON = "; the same command goes on from here"


@dataclass(frozen=True)
class Patience:
    """How often in a row a training hung, and where."""

    where: str = ""
    times: int = 0

    def after(self, stage_dir: str) -> Patience:
        """Of one more time. A file system that does not answer has no new checkpoint to show."""
        where = supervision.within(ASKING_SECONDS, partial(_reached, stage_dir), self.where)
        return Patience(where, self.times + 1 if where == self.where else 1)

    @property
    def over(self) -> bool:
        return self.times >= TRIES

    def told(self, stage_dir: str) -> str:
        """Why it is over."""
        stacks = os.path.join(stage_dir, results.STACKS)
        return (
            f"the training in {stage_dir} hung {self.times} times in a row without a new "
            f"checkpoint: find in {stacks} what hangs; the same command goes on"
        )


def _reached(stage_dir: str) -> str:
    """The newest checkpoint, by its path."""
    paths = Path(stage_dir, results.CHECKPOINTS).glob("*")
    return max((str(it) for it in paths if it.name.isdigit()), default=stage_dir)


@dataclass
class Before:
    """What a command that was begun again knows of the time before."""

    patience: Patience = field(default_factory=Patience)
    began: float | None = None
    """time.time() of its newest beginning; None: it is the first."""
    aside: list[str] = field(default_factory=list)
    """Stages that --fresh has set aside: what they have learnt since is to stay."""


before = Before()


class Command:
    """A process that carries out a command of the command line. Where a training in it hangs it is
    executed again, in place: who waits for it, a shell or a supervisor, sees one process and one
    answer."""

    def __init__(self):
        if known := os.environ.pop(KNOWN, None):
            told = json.loads(known)
            before.patience = Patience(**told["patience"])
            before.began, before.aside = told["began"], told["aside"]
        self.environment = dict(os.environ)

    def owns(self, leave: Callable[[int, str], NoReturn], give_back: Callable[[], None]) -> None:
        """This process, from now on. `leave(code, error)` ends it and says why; `give_back`
        restores its stdout, for who comes after."""

        def begin_again(stage_dir: str) -> None:
            before.patience = before.patience.after(stage_dir)
            ending.say_farewell()
            if supervision.HEARD.is_set():  # who hangs obeys no signal
                leave(128 + signal.SIGTERM, f"stopped{GOES_ON}")
            if before.patience.over:
                leave(1, f"Hung: {before.patience.told(stage_dir)}")
            say(AGAIN.format(stage_dir))
            give_back()
            try:
                self._execute()
            except OSError as error:
                leave(1, f"Hung: the training in {stage_dir}; starting again: {error}")

        ending.owned_by(begin_again)

    def _execute(self) -> NoReturn:
        # What a library left open, such as a GPU, would keep what it holds.
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        for number in range(3, min(limit if limit > 0 else MOST_FILES, MOST_FILES)):
            with contextlib.suppress(OSError):
                os.set_inheritable(number, False)
        before.began = time.time()
        environment = self.environment | {KNOWN: json.dumps(asdict(before))}
        words = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, words, environment)  # noqa: S606 - no shell is wanted
