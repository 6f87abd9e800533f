"""For all tests: one thread for each library, shapes checked at run time where beartype is there,
and a server of pictures that counts."""

from __future__ import annotations

import http.server
import importlib.util
import io
import json
import os
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

# Before torch is imported by any test: on a busy machine two OpenMP threads are slower than one.
for threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
# Ray's workers are as urgent as the tests that wait for them.
os.environ.setdefault("RAY_worker_niceness", "0")

if importlib.util.find_spec("beartype") is not None:
    from jaxtyping import install_import_hook

    install_import_hook(
        [
            f"training.diffusion.{name}"  # not config: its refusals are ValueErrors of its own
            for name in [
                "draws",
                "guidance",
                "likelihood",
                "objective",
                "path",
                "prediction",
                "samplers",
            ]
        ],
        "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
    )


SOAK = os.environ.get("DARKROOM_SOAK", "0") not in ("", "0")


@pytest.fixture(scope="session")
def rounds():
    """`rounds(few, all)`: how often to repeat; all of it in `make soak`."""
    return lambda few, all: all if SOAK else few


@pytest.fixture(autouse=True)
def _own_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test tells MLflow is forgotten after it: MLflow keeps its tracking URI in the
    environment as well, where it would reach the processes that later tests start."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.delenv(name, raising=False)
    yield
    if "mlflow" in sys.modules:
        import mlflow

        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what repeats. A mark's time limit is for few rounds, and goes before `--timeout=0`."""
    for item in items:
        if "rounds" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.soak)
            if SOAK:
                item.add_marker(pytest.mark.timeout(0), append=False)


class Gallery(http.server.ThreadingHTTPServer):
    """Pictures of noise on loopback. It notes what it is asked, and can leave requests without an
    answer, so that whoever asks is caught in the middle.
    """

    daemon_threads = True
    request_queue_size = 64  # of the usual 5 the others would knock again a second later
    host = "127.0.0.1"

    def __init__(self) -> None:
        super().__init__((self.host, 0), _Pictures)
        self.asked: list[int] = []
        self.guard, self.open, self.held = threading.Lock(), threading.Event(), threading.Event()
        self.left: int | None = None

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients that die are what it is for

    def hold_after(self, requests: int) -> None:
        """Answer so many more requests, and then none until `release`; those that are held now are
        let go of.
        """
        with self.guard:
            self.open.set()
            self.open, self.held = threading.Event(), threading.Event()
            self.left = requests

    def release(self) -> None:
        with self.guard:
            self.left = None
            self.open.set()

    def taken(self) -> list[int]:
        """The sorted numbers of the pictures that were asked since this was asked last."""
        with self.guard:
            asked, self.asked = sorted(self.asked), []
        return asked

    def wait_until_held(self, seconds: float) -> None:
        assert self.held.wait(seconds), f"asked for {len(self.asked)}, and for no more"

    def table(self, path: Path, count: int) -> str:
        """A table of the first `count` pictures, in order."""
        url = f"http://{self.host}:{self.server_port}"
        rows = [{"url": f"{url}/{i}.png", "caption": f"noise {i}"} for i in range(count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)


class _Pictures(http.server.BaseHTTPRequestHandler):
    server: Gallery
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        number, server = int(self.path.strip("/").removesuffix(".png")), self.server
        with server.guard:
            server.asked.append(number)
            late, opened, held = server.left == 0, server.open, server.held
            if server.left:
                server.left -= 1
        if late:
            held.set()
            opened.wait()
        body = _noise(number)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _noise(number: int) -> bytes:
    import numpy as np
    from PIL import Image

    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


Server = TypeVar("Server", bound=socketserver.BaseServer)


@contextmanager
def _served(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def served():
    """`with served(server):` it answers from a thread, and is gone afterwards."""
    return _served


@pytest.fixture
def gallery() -> Iterator[Gallery]:
    with _served(Gallery()) as it:
        yield it
        it.release()
