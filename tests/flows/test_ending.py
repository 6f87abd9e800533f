"""What a process starts ends with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

STARTS = """
import subprocess, sys, time
from flows.ending import end_with_us

sleeps = [sys.executable, "-c", "import time; time.sleep(600)"]
it = subprocess.Popen(sleeps, stdout=subprocess.DEVNULL)
end_with_us(it, float(sys.argv[1]))
print(it.pid, flush=True)
sys.stdin.readline()
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux alone has pidfds")


def lives(pid: int) -> bool:
    """Whether it has not ended, waited for or not."""
    with suppress(OSError):
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    return False


def ends(pid: int, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while lives(pid) and time.monotonic() < limit:
        time.sleep(0.05)
    return not lives(pid)


@contextmanager
def started(after_seconds: float) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """(a process, the number of one that it started)."""
    it = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(after_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert it.stdout
    child = int(it.stdout.readline())
    try:
        yield it, child
    finally:
        it.kill()
        it.communicate()
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_who_is_killed_takes_along_what_it_started():
    with started(0) as (it, child):
        assert not ends(child, 0.5)
        it.kill()
        it.wait()
        assert ends(child, 60)


def test_what_was_started_has_so_long_to_end_by_itself():
    with started(2) as (it, child):
        it.kill()
        began = time.monotonic()
        it.wait()
        assert ends(child, 60)
        assert time.monotonic() - began > 1.9


def test_who_ends_by_itself_has_ended_what_it_started_or_meant_to_leave_it():
    with started(0) as (it, child):
        it.communicate("end\n", timeout=60)
        assert it.returncode == 0
        assert not ends(child, 1)


FLOW = """
import sys, time
from flows.__main__ import outcome
from flows.ending import end_on_sigterm, leaving_without_goodbyes
from flows.settings import prepare_environment

prepare_environment()
end_on_sigterm()
from prefect import flow
from prefect.server.api.server import SubprocessASGIServer


@flow
def line():
    with leaving_without_goodbyes():
        print(SubprocessASGIServer().server_process.pid, flush=True)
        time.sleep(600)


sys.exit(outcome(line, {})[0])
"""


@pytest.mark.slow
def test_who_is_ended_together_with_prefects_server_does_not_wait_for_it(tmp_path):
    """As a service's supervisor ends it; Prefect alone takes 140 s."""
    home = {"DARKROOM_HOME": str(tmp_path / "home"), "PREFECT_HOME": str(tmp_path / "prefect")}
    named = {name: it for name, it in os.environ.items() if name != "PREFECT_API_URL"}
    command = [sys.executable, "-c", FLOW]
    with subprocess.Popen(
        command, env=named | home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as it:
        assert it.stdout
        server = int(it.stdout.readline())
        try:
            os.kill(server, signal.SIGTERM)
            it.send_signal(signal.SIGTERM)
            _, said = it.communicate(timeout=60)
        finally:
            it.kill()
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
        assert it.returncode == 128 + signal.SIGTERM, said
        assert not lives(server)
