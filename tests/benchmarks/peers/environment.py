"""Each peer lives in an environment of its own: its pins clash with ours."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def environment(peer: str) -> Path:
    """The bin folder of the environment with the versions in {peer}.txt; made once, with uv."""
    pins = Path(__file__).with_name(f"{peer}.txt")
    digest = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "darkroom", "peers")
    made = cache / f"{peer}-{digest}"
    if not (made / "ready").exists():
        beside = Path(sys.executable).with_name("uv")
        uv = str(beside) if beside.exists() else "uv"
        shutil.rmtree(made, ignore_errors=True)
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(made)], check=True)
        subprocess.run(
            [uv, "pip", "install", "-q", "--compile-bytecode", "-r", str(pins)],
            check=True,
            env={**os.environ, "VIRTUAL_ENV": str(made)},
        )
        (made / "ready").touch()
    return made / "bin"
