"""Ray for as long as a piece of work needs it: the cluster of RAY_ADDRESS, or one of our own."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def ray_session(wanted: bool = True) -> Iterator[None]:
    """Ray is up inside, if it is wanted; a session that is already there is used and left as it is.

    It lasts as long as the work that needs it: its processes wake up often enough to slow down a
    training in this one by a sixth. ray.init replaces the process's SIGTERM handler, and with
    it Prefect's cancellation: it is put back.
    """
    if not wanted:
        yield
        return
    import ray

    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    before = signal.getsignal(signal.SIGTERM)
    root = Path(__file__).resolve().parent.parent
    # Ray's workers give way to everybody else (nice 15), though they are what was asked for: beside
    # other work on two cores they did not even get to start.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        # Without "local" a session that another command has here for itself would be joined.
        address=address or "local",
        # Logical cores: Data's readers, its actors and Train's workers share two real ones.
        num_cpus=None if address else max(4, os.cpu_count() or 1),
        object_store_memory=None if address else 512 * 2**20,
        include_dashboard=False if not address else None,
        logging_level=logging.ERROR,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(root), "PYTHONWARNINGS": "ignore"}},
    )
    with suppress(ValueError):  # not in the main thread: ray left the handler alone there as well
        signal.signal(signal.SIGTERM, before)
    try:
        yield
    finally:
        ray.shutdown()
