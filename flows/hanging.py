"""What becomes of a process in which a training hangs. That cannot be interrupted: the process
begins again, in place, or ends for whoever starts it again.

Only a process that is nobody else's: a command's, a stage's beside another, a run's that Prefect
has started. Who calls `training.job.run`, or a flow, in a process of his own is told and no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from training import results, supervision

from .progress import say

TRIES = 4
"""So often a training may hang without a new checkpoint; then that ends it."""
KNOWN = "DARKROOM_HUNG"
"""The environment variable in which a command tells itself what it has been through."""
FAREWELL_SECONDS = 15.0
"""How long all that must be told or ended before the process is may take together."""
ASKING_SECONDS = 5.0
AGAIN = "the training in {} hangs: starting again from its newest checkpoint"
MOST_FILES = 2**16
GOES_ON = "; the same command goes on from here"

Owner = Callable[[str], object]
_owner: Owner | None = None
farewells: list[Callable[[], object]] = []
"""Done, the newest first, before a process with a hung training ends or begins again: no `finally`
and no `atexit` will be."""


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


def owned_by(owner: Owner) -> None:
    """This process is for one thing alone: when a training in it hangs, `owner` is called, from
    another thread, and ends it or begins it again."""
    global _owner
    _owner = owner


def owned() -> bool:
    return _owner is not None


def response(stage_dir: str) -> supervision.OnHang | None:
    """What to do when the training in a directory hangs; None: nothing, the process is not ours."""
    if (owner := _owner) is None:
        return None
    return partial(owner, stage_dir)


@contextlib.contextmanager
def at_the_end(do: Callable[[], object]) -> Iterator[None]:
    """Inside, `do` is one of the farewells."""
    farewells.append(do)
    try:
        yield
    finally:
        farewells.remove(do)


def ends_with_us(process: subprocess.Popen[Any]) -> None:
    """From now on a process that we started ends before one with a hung training does."""

    def end() -> None:
        process.terminate()
        try:
            process.wait(FAREWELL_SECONDS / 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    farewells.append(end)


def say_farewell() -> None:
    def each() -> None:
        for do in reversed(farewells):
            with contextlib.suppress(Exception):  # one that fails keeps nobody from the next
                do()

    supervision.within(FAREWELL_SECONDS, each, None)


def crash(client: Any, run: Any, why: str) -> None:
    """A process that ended has told Prefect nothing."""
    from prefect.states import Crashed

    with contextlib.suppress(Exception):  # a server that is away is no second failure
        state = client.read_flow_run(run.id).state
        if state is None or not state.is_final():
            client.set_flow_run_state(run.id, Crashed(message=why), force=True)


def end(_: str) -> NoReturn:
    """For whoever starts the process again, or another one that goes on."""
    say_farewell()
    supervision.end()


def ends_where_prefect_started_us(flow_run: Any) -> None:
    """A process in which a deployment runs, which Prefect has started for this run alone, ends
    where a training in it hangs; Prefect calls the run crashed, and the next one goes on. A run
    that is under way cannot be begun again, and one that hangs would keep all others waiting."""
    if not owned() and flow_run.deployment_id is not None:
        owned_by(end)


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
            say_farewell()
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

        owned_by(begin_again)

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
