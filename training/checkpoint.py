"""A visible checkpoint is a whole one.

A checkpoint is a directory named after its images: `state.safetensors` and, written last,
`checkpoint.json` with the SHA-256 of the former. It is written under a hidden name, fsynced, and
renamed; it is removed by being hidden first. So a process may be killed anywhere, and a disk may
fill up, and what can be seen can be loaded. Should the medium lie, the newest one that verifies is
taken, and the log says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

TENSORS, DESCRIPTION = "state.safetensors", "checkpoint.json"
POWER = "power"
"""The part of a state that holds power-function averages."""
HELDOUT_LOSS = "heldout_loss"
"""The name among a state's numbers of the mean loss of its averages on held-out samples."""
_DTYPES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_FOREGROUND_BYTES = 8 << 20
log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """All that training depends on besides its config and its data.

    `tensors` has the names "weights/...", "ema/...", "power/...", "optimizer/..." and refers to
    the live ones until it is saved; `numbers` is JSON.
    """

    tensors: dict[str, Tensor]
    step: int
    images_seen: int
    numbers: dict[str, Any] = field(default_factory=dict)

    def averaged(self) -> dict[str, Tensor]:
        """The weights with averages in place of what is trained: what a finished stage is."""
        return self.part("weights") | self.part("ema")

    def only(self, prefix: str, numbers: dict[str, Any]) -> TrainState:
        """The state of one part alone, with other numbers."""
        kept = {name: t for name, t in self.tensors.items() if name.startswith(f"{prefix}/")}
        return TrainState(kept, self.step, self.images_seen, numbers)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below "prefix/", by the rest of their names."""
        return {
            k.removeprefix(f"{prefix}/"): t
            for k, t in self.tensors.items()
            if k.startswith(f"{prefix}/")
        }


class Damaged(ValueError):
    """A checkpoint whose content is not what was written."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one is there."""

    last: int = 2
    """So many of the newest: should one be damaged, there is the one before."""
    best: bool = False
    """Also the one of the least HELDOUT_LOSS among its numbers."""
    images: int = 0
    """Also the first one at or past each multiple of so many images; 0: none."""

    def stay(self, paths: list[Path]) -> set[Path]:
        """Those of `paths`, oldest first, that are kept. What was kept stays so."""
        kept = set(paths[-self.last :])
        if self.images:
            firsts: dict[int, Path] = {}
            for path in paths:
                firsts.setdefault(int(path.name) // self.images, path)
            firsts.pop(0, None)
            kept |= set(firsts.values())
        if self.best and (best := _best(paths)):
            kept.add(best)
        return kept


KEEP_TWO = Retention()


def best(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint of the least held-out loss, the newest of several; None where none has one."""
    return _best(visible(directory))


def _best(paths: list[Path]) -> Path | None:
    losses: dict[Path, float] = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # damaged
            loss = json.loads((path / DESCRIPTION).read_bytes())["numbers"].get(HELDOUT_LOSS)
            if loss is not None:
                losses[path] = float(loss)
    return min(reversed(losses), key=lambda path: losses[path], default=None)


def save(
    directory: str | os.PathLike[str],
    state: TrainState,
    fingerprint: str = "",
    *,
    keep: Retention | None = KEEP_TWO,
) -> Path:
    """Write `state` as the newest checkpoint in `directory`, drop those that `keep` does not (None
    keeps all), and return its path."""
    return _write(Path(directory), Snapshot(state), fingerprint, keep)


def load(path: str | os.PathLike[str], fingerprint: str = "") -> TrainState:
    """The state in one checkpoint. Damaged when a byte differs; ValueError when it is of another
    fingerprint."""
    path = Path(path)
    try:
        described = json.loads((path / DESCRIPTION).read_bytes())
        tensors, size = path / TENSORS, described["bytes"]
        if tensors.stat().st_size != size:
            raise Damaged(f"{tensors}: {tensors.stat().st_size} bytes, wanted {size}")
        with open(tensors, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != described["sha256"]:
            raise Damaged(
                f"{tensors}: sha256 {digest[:16]}..., wanted {described['sha256'][:16]}..."
            )
        state = TrainState(
            load_file(tensors), described["step"], described["images_seen"], described["numbers"]
        )
        found = described["fingerprint"]
    except Damaged:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"{path}: {type(error).__name__}: {error}") from error
    if fingerprint and found != fingerprint:
        raise ValueError(
            f"{path}: checkpoint of training {found}, but this is training {fingerprint}: "
            "give it a directory of its own, or remove this one to start over"
        )
    return state


def newest(directory: str | os.PathLike[str], fingerprint: str = "") -> TrainState | None:
    """The state of the newest checkpoint that verifies, or None. Damaged ones are passed over and
    logged."""
    for path in reversed(visible(directory)):
        try:
            return load(path, fingerprint)
        except Damaged as damage:
            log.warning("checkpoint %s is damaged, going back to the one before: %s", path, damage)
    return None


def visible(directory: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    directory = Path(directory)
    return sorted(p for p in directory.iterdir() if p.name.isdigit()) if directory.is_dir() else []


def prune(directory: str | os.PathLike[str], keep: Retention | None) -> None:
    """Remove the checkpoints that `keep` does not (None keeps all), and what a killed writer left.
    For the one writer only."""
    directory = Path(directory)
    if keep is not None:
        paths = visible(directory)
        stay = keep.stay(paths)
        for path in paths:
            if path not in stay:
                _hide(path)
    for path in directory.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


class Snapshot:
    """A copy of a state, laid out as the safetensors file it becomes: the writer only streams it
    out.

    `reuse` is an older snapshot whose memory may be taken; fresh memory costs more than the copy
    into it.
    """

    def __init__(self, state: TrainState, reuse: Snapshot | None = None):
        # Wider types first keeps each tensor aligned; the format allows no gaps.
        tensors = dict(
            sorted(state.tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
        )
        entries, end = {}, 0
        for name, t in tensors.items():
            start, end = end, end + t.numel() * t.element_size()
            entries[name] = {
                "dtype": _DTYPES[t.dtype],
                "shape": list(t.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.step, self.images_seen, self.numbers = state.step, state.images_seen, state.numbers

        on_gpu = any(t.is_cuda for t in tensors.values())
        if reuse is not None and reuse.data.numel() == end and reuse.data.is_pinned() == on_gpu:
            self.data = reuse.data
        else:
            self.data = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        with torch.no_grad():
            for name, t in tensors.items():
                start, stop = entries[name]["data_offsets"]
                self.data[start:stop].view(t.dtype).view(t.shape).copy_(t, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    @property
    def bytes(self) -> int:
        return len(self.header) + self.data.numel()


class Saver:
    """Saves behind the training's back: `save` copies the state and returns, a thread writes it.

    At most one write is under way; the next save waits for it, and raises what it raised. Small
    states are written at once: there is nothing to gain, and then a kill never costs more than one
    interval.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: str = "",
        *,
        keep: Retention | None = KEEP_TWO,
    ):
        self.directory, self.fingerprint, self.keep = Path(directory), fingerprint, keep
        self.saved_at: int | None = None
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        prune(self.directory, keep)

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save `state` unless it is saved already; with `wait`, it is on disk on return."""
        self.wait()
        if state.images_seen == self.saved_at:
            return
        self._snapshot = Snapshot(state, self._snapshot)
        self.saved_at = state.images_seen
        if wait or self._snapshot.bytes <= _FOREGROUND_BYTES:
            _write(self.directory, self._snapshot, self.fingerprint, self.keep)
        else:
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return once nothing is being written; raise what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _work(self) -> None:
        assert self._snapshot is not None
        try:
            _write(self.directory, self._snapshot, self.fingerprint, self.keep)
        except BaseException as error:
            self._error, self.saved_at = error, None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self.wait()


def _write(directory: Path, snapshot: Snapshot, fingerprint: str, keep: Retention | None) -> Path:
    final = directory / f"{snapshot.images_seen:012d}"
    hidden = directory / f".{final.name}.{secrets.token_hex(4)}"
    try:
        hidden.mkdir(parents=True)
        digest = hashlib.sha256()
        with _synced(hidden / TENSORS) as file:
            for part in (snapshot.header, memoryview(snapshot.data.numpy().data)):
                for start in range(0, len(part), 1 << 24):
                    piece = part[start : start + (1 << 24)]
                    file.write(piece)
                    digest.update(piece)
        described = {
            "bytes": snapshot.bytes,
            "fingerprint": fingerprint,
            "images_seen": snapshot.images_seen,
            "numbers": snapshot.numbers,
            "sha256": digest.hexdigest(),
            "step": snapshot.step,
            "written": time.time(),
        }
        with _synced(hidden / DESCRIPTION) as file:
            file.write(json.dumps(described, sort_keys=True, indent=1, allow_nan=False).encode())
        _sync_directory(hidden)
        if final.exists():  # training came here again because this one is damaged
            _hide(final)
        os.rename(hidden, final)
        _sync_directory(directory)
        prune(directory, keep)
    except OSError as error:
        shutil.rmtree(hidden, ignore_errors=True)
        size = snapshot.bytes / 2**20
        raise OSError(
            error.errno,
            f"checkpoint {final} ({size:.1f} MiB) could not be written: {error.strerror or error}; "
            "nothing of it is visible. Make room and run the same command again: it goes on from "
            "the checkpoint before",
        ) from error
    except BaseException:
        shutil.rmtree(hidden, ignore_errors=True)
        raise
    return final


@contextlib.contextmanager
def _synced(path: Path) -> Iterator[Any]:
    with open(path, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hide(path: Path) -> None:
    """Removal that never shows a part: a rename, then the deletion."""
    hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
