"""What this machine has and lacks for the line, each with what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Any

from .settings import settings


def doctor() -> dict[str, Any]:
    """Each check says what it found; a failed one says what to do."""
    from importlib.metadata import PackageNotFoundError, version

    checks: list[tuple[str, bool, str]] = []

    def check(name: str, passed: bool, found: str) -> None:
        checks.append((name, passed, found))

    check("python", sys.version_info >= (3, 11), sys.version.split()[0])
    packages = ("torch", "torchvision", "ray", "prefect", "mlflow", "webdataset", "open_clip_torch")
    for package in (*packages, "transformers", "fsspec", "sqlalchemy", "fastapi"):
        try:
            check(package, True, version(package))
        except PackageNotFoundError:
            check(package, False, "missing; run `make` or install requirements.lock")
    here = settings()
    try:
        here.home.mkdir(parents=True, exist_ok=True)
        probe = here.home / ".doctor"
        probe.write_bytes(b"")
        probe.unlink()
        free = shutil.disk_usage(here.home).free / 2**30
        check(
            "home", free > 5, f"{here.home}, {free:.0f} GiB free" + ("" if free > 5 else "; free 5")
        )
    except OSError as error:
        check("home", False, f"{here.home}: {error}; set DARKROOM_HOME to a folder you can write")
    from training.distributed import accelerator

    check("device", True, accelerator())
    check("registry", *_answers(here.mlflow_uri))
    check("ray", True, os.environ.get("RAY_ADDRESS", "a cluster of our own"))
    check("prefect", True, os.environ.get("PREFECT_API_URL", "a server of our own"))
    lines = [f"{'ok  ' if passed else 'FAIL'} {name:16} {found}" for name, passed, found in checks]
    failed = [name for name, passed, _ in checks if not passed]
    return {
        "checks": [{"name": n, "passed": p, "found": f} for n, p, f in checks],
        "failed": failed,
        "text": "\n".join(lines),
    } | ({"error": f"failed: {', '.join(failed)}"} if failed else {})


def _answers(uri: str) -> tuple[bool, str]:
    """Whether the registry can be reached."""
    if uri.startswith("sqlite:"):
        return True, uri
    import urllib.request

    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=5) as answer:  # noqa: S310
            return answer.status == 200, uri
    except OSError as error:
        return False, f"{uri}: {error}; start the server or unset MLFLOW_TRACKING_URI"
