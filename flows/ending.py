"""How a process of ours ends: what it tells and ends before, what ends with it, and whether a hung
training ends it.

Such a training cannot be interrupted, and no `finally` and no `atexit` runs where it ends the
process. That happens only to a process that is nobody else's: a command's, a stage's beside
another, a run's that Prefect has started. Who calls `training.job.run`, or a flow, in a process of
his own is told and no more.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from training import supervision

FAREWELL_SECONDS = 15.0
"""How long all that must be told or ended before the process is may take together."""
farewells: list[Callable[[], object]] = []
"""Done, the newest first, before a process with a hung training ends or begins again."""
Owner = Callable[[str], object]
_owner: Owner | None = None


def end_on_sigterm() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, `finally` and `atexit` included: by
    its default nothing would end what the process has started, such as Prefect's server.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


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

    def end_it() -> None:
        process.terminate()
        try:
            process.wait(FAREWELL_SECONDS / 2)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    farewells.append(end_it)
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
    farewells.append(let_go)


def owned_by(owner: Owner) -> None:
    """This process is for one thing alone: when a training in it hangs, `owner` is called, from
    another thread, and ends it or begins it again."""
    global _owner
    _owner = owner


def response(stage_dir: str) -> supervision.OnHang | None:
    """What to do when the training in a directory hangs; None: nothing, the process is not ours."""
    if (owner := _owner) is None:
        return None
    return partial(owner, stage_dir)


def end(_: str) -> NoReturn:
    """For whoever starts the process again, or another one that goes on."""
    say_farewell()
    supervision.end()


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


@contextlib.contextmanager
def at_the_end(do: Callable[[], object]) -> Iterator[None]:
    """Inside, `do` is one of the farewells."""
    farewells.append(do)
    try:
        yield
    finally:
        farewells.remove(do)


@contextlib.contextmanager
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
    if not _owner and context.flow_run.deployment_id is not None:
        # Prefect has started this process for this run alone, and calls it crashed when it ends. A
        # run that is under way cannot be begun again, and one that hangs would keep others waiting.
        owned_by(end)
    why = "a training in it hung"
    try:
        with at_the_end(partial(crash, context.client, context.flow_run, why)):
            yield
    except Exception:
        raise
    except BaseException:  # Ctrl-C, SIGTERM as Prefect or we put it
        get_current_settings().client.max_retries = 0
        raise
