"""A visible checkpoint is a whole one.

A checkpoint is a directory named after its images: `state.safetensors` and, written last,
`checkpoint.json` with the SHA-256 of the former. It is written under a hidden name, fsynced, and
renamed; it is removed by being hidden first. So a process may be killed anywhere, and a disk may
fill up, and what can be seen can be loaded. Should the medium lie, the newest one that verifies is
taken, the log says so, and those that do not are set aside: they count for nothing and stay for
whoever looks into it. Where none verifies, nothing begins anew by itself.

Of a sharded state each worker writes its rows into a file of its own, `state-00002-of-00004.
safetensors`, all in one hidden directory; the first worker waits for the others' files and then
goes on as above. Nobody tells another anything but through that directory, so it is done behind the
training's back as well. What was sharded loads on any number of workers. The files are laid out as
torch.distributed.checkpoint lays them out: its HuggingFaceStorageReader reads them too.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .sharding import Pieces, is_sharded, local, rows

TENSORS, DESCRIPTION = "state.safetensors", "checkpoint.json"
POWER = "power"
"""The part of a state that holds power-function averages."""
HELDOUT_LOSS = "heldout_loss"
"""The name among a state's numbers of the mean loss of its averages on held-out samples."""
DEVICE = "device"
"""The name among them of the kind of device that computed it."""
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
_POLL_SECONDS, _LOOK_SECONDS = 0.005, 0.2
_PATIENCE_SECONDS = 1800.0
"""How long the first worker waits for the others' parts."""
_VISIBLE_SECONDS = 60.0
"""For which a network file system may not show what another machine has written."""
_DAMAGED = ".damaged"
"""What the names of those end with that are set aside."""
_OFFSETS = "DCP_SHARDING_INFO"
"""Where a file says which row its tensors begin at; torch.distributed.checkpoint's name."""
_MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """All that training depends on besides its config and its data.

    `tensors` has the names "weights/...", "ema/...", "power/...", "optimizer/..." and refers to
    the live ones until it is saved; they may be sharded. `numbers` is JSON.
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
    """A checkpoint whose content is not what was written, or not there."""


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


def numbers(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Those of the newest checkpoint that says any, which is not verified; {} without one."""
    for path in reversed(visible(directory)):
        with contextlib.suppress(*_MISSING, ValueError, LookupError, TypeError):  # damaged
            return dict(json.loads((path / DESCRIPTION).read_bytes())["numbers"])
    return {}


def _best(paths: list[Path]) -> Path | None:
    losses: dict[Path, float] = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # damaged
            loss = json.loads((path / DESCRIPTION).read_bytes())["numbers"].get(HELDOUT_LOSS)
            if loss is not None:
                losses[path] = float(loss)
    return min(reversed(losses), key=lambda path: losses[path], default=None)


@dataclass(frozen=True)
class Part:
    """Which part of each checkpoint a worker writes: with one of one, all of it."""

    number: int = 0
    of: int = 1
    run: str = ""
    """What the parts of one checkpoint are known by: the same for all workers, never used
    before."""

    @property
    def file(self) -> str:
        if self.of == 1:
            return TENSORS
        return f"state-{self.number + 1:05d}-of-{self.of:05d}.safetensors"

    @property
    def receipt(self) -> str:
        """The file that says that `file` is written, or why it could not be."""
        return f"{self.file.removesuffix('.safetensors')}.json"

    def all(self) -> list[Part]:
        return [Part(number, self.of, self.run) for number in range(self.of)]


WHOLE = Part()


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
    """The state in one checkpoint. Damaged when a byte differs or a file is missing; ValueError
    when it is of another fingerprint; OSError when it cannot be read now, which says nothing of
    it."""
    state = load_lazily(path, fingerprint)
    return replace(state, tensors={name: t[...] for name, t in state.tensors.items()})


def load_lazily(path: str | os.PathLike[str], fingerprint: str = "") -> TrainState:
    """`load`, but what was sharded may be nothing but indexed (see `Pieces`): then a worker reads
    its own rows and has no second copy of everything."""
    path = Path(path)
    try:
        described = json.loads((path / DESCRIPTION).read_bytes())
        if parts := described.get("parts"):
            written = zip(Part(of=len(parts)).all(), parts, strict=True)
            tensors = _joined([_verified(path / part.file, said) for part, said in written])
        else:
            tensors = load_file(_verified(path / TENSORS, described))
        state = TrainState(
            tensors, described["step"], described["images_seen"], described["numbers"]
        )
        found = described["fingerprint"]
    except Damaged:
        raise
    except (*_MISSING, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"{path}: {type(error).__name__}: {error}") from error
    if fingerprint and found != fingerprint:
        raise ValueError(
            f"{path}: checkpoint of training {found}, but this is training {fingerprint}: "
            "give it a directory of its own, or remove this one to start over"
        )
    return state


def _verified(file: Path, said: dict[str, Any]) -> Path:
    """The file; Damaged unless it is what was said of it."""
    if (size := file.stat().st_size) != said["bytes"]:
        raise Damaged(f"{file}: {size} bytes, wanted {said['bytes']}")
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    if digest != said["sha256"]:
        raise Damaged(f"{file}: sha256 {digest[:16]}..., wanted {said['sha256'][:16]}...")
    return file


def _joined(files: list[Path]) -> dict[str, Tensor]:
    """The tensors whose rows lie in the files, by name. Damaged where rows are missing."""
    pieces: dict[str, list[tuple[int, Tensor]]] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()[_OFFSETS])
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                first = (offsets[name]["saved_offsets"] or [0])[0]
                pieces.setdefault(name, []).append((first, file.get_tensor(name)))
    found = {}
    for name, several in pieces.items():
        end = 0
        for first, piece in several:
            if first != end:
                raise Damaged(f"{files[0].parent}: {name} lacks the rows {end} to {first - 1}")
            end += len(piece) if piece.ndim else 0
        tensors = [piece for _, piece in several]
        # Whoever is handed it indexes it, and so far does not see what it is.
        found[name] = tensors[0] if len(tensors) == 1 else cast(Tensor, Pieces(tensors))
    return found


def newest(directory: str | os.PathLike[str], fingerprint: str = "") -> TrainState | None:
    """The state of the newest checkpoint that verifies, as by `load_lazily`; None where there is no
    checkpoint. Damaged newer ones are set aside (`000000000128.damaged`), which is logged. Damaged
    where none of them verifies: then all stay where they are."""
    damaged = list[tuple[Path, Damaged]]()
    for path in reversed(visible(directory)):
        try:
            found = load_lazily(path, fingerprint)
        except Damaged as damage:
            if path.exists():  # else it was removed meanwhile, by who trains there
                damaged.append((path, damage))
            continue
        for one, damage in damaged:
            log.warning(
                "checkpoint %s is damaged, going back to the one before, it stays as %s: %s",
                one, _set_aside(one), damage,
            )  # fmt: skip
        return found
    if damaged:
        names = ", ".join(path.name for path, _ in damaged)
        raise Damaged(
            f"{directory}: none of its checkpoints can be loaded ({names}; the newest: "
            f"{damaged[0][1]}): restore one of them from a copy, or delete them to begin anew"
        )
    return None


def _set_aside(path: Path) -> str:
    """Rename a checkpoint to what is neither loaded nor removed; its new name."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}{_DAMAGED}{f'-{number}' if number > 1 else ''}")
        if not aside.exists():
            os.rename(path, aside)
            return aside.name
    raise AssertionError


def agreed(
    directory: str | os.PathLike[str],
    fingerprint: str,
    leads: bool,
    gather: Callable[[Any], list[Any]],
) -> TrainState | None:
    """`newest` for several workers, all of which come here: the first one (who `leads`) chooses,
    the others read the same. What one of them sees the others wait for, a minute at most.

    `gather` gives each worker's JSON value to all. Damaged, or ValueError, where the first one
    refuses; OSError, which is reason to try again, where others do not see what it does.
    """
    directory = Path(directory)
    known = max(gather(reached(directory)))
    blind = [rank for rank, sees in enumerate(gather(_appears(directory, known))) if not sees]
    if blind:
        raise OSError(
            errno.ESTALE,
            f"{directory / known} is seen by some workers, and not by {blind} after "
            f"{_VISIBLE_SECONDS:g} s: the stage directory must lie on a file system that all "
            "workers share",
        )
    state = newest(directory, fingerprint) if leads else None
    chosen = gather(named(directory, state.images_seen).name if state else "")[0]
    if leads or not chosen:
        return state
    try:
        return load_lazily(directory / chosen, fingerprint)
    except Damaged as error:
        raise OSError(
            errno.ESTALE, f"{directory / chosen}: the first worker has read it, and here: {error}"
        ) from error


def _appears(directory: Path, name: str) -> bool:
    """Whether a checkpoint is seen before long, or none is meant."""
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while name and name not in {path.name for path in visible(directory)}:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_SECONDS)
    return True


def reached(directory: str | os.PathLike[str]) -> str:
    """The name of the newest checkpoint, "" where there is none."""
    paths = visible(directory)
    return paths[-1].name if paths else ""


def visible(directory: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a directory, oldest first."""
    directory = Path(directory)
    return sorted(p for p in directory.iterdir() if p.name.isdigit()) if directory.is_dir() else []


def named(directory: str | os.PathLike[str], images_seen: int) -> Path:
    """Where the checkpoint of so many images is, or would be."""
    return Path(directory, f"{images_seen:012d}")


def prune(directory: str | os.PathLike[str], keep: Retention | None, run: str = "") -> None:
    """Remove the checkpoints that `keep` does not (None keeps all), and what killed writers left;
    what `run` is about to write stays. For the first or only writer."""
    directory = Path(directory)
    if keep is not None:
        paths = visible(directory)
        stay = keep.stay(paths)
        for path in paths:
            if path not in stay:
                _hide(path)
    for path in directory.glob(".*"):
        if run and path.name.endswith(f".{run}"):
            continue
        shutil.rmtree(path, ignore_errors=True)


class Snapshot:
    """A copy of a state, laid out as the safetensors file it becomes: the writer only streams it
    out.

    `reuse` is an older snapshot whose memory may be taken; fresh memory costs more than the copy
    into it. Of a part of several, sharded tensors' own rows are in it, and others in the first.
    """

    def __init__(self, state: TrainState, reuse: Snapshot | None = None, part: Part = WHOLE):
        own, offsets = state.tensors, dict[str, Any]()
        if part.of > 1:
            own = {n: local(t) for n, t in own.items() if is_sharded(t) or part.number == 0}
            own = {n: t for n, t in own.items() if t.numel() or not is_sharded(state.tensors[n])}
            for name, t in own.items():
                where = rows(state.tensors[name])
                first = [where.start] if isinstance(where, slice) else [0]
                offsets[name] = {"saved_offsets": (first + [0] * t.ndim)[: t.ndim]}
        # Wider types first keeps each tensor aligned; the format allows no gaps.
        tensors = dict(sorted(own.items(), key=lambda item: (-item[1].element_size(), item[0])))
        entries: dict[str, Any] = {}
        end = 0
        for name, t in tensors.items():
            start, end = end, end + t.numel() * t.element_size()
            entries[name] = {
                "dtype": _DTYPES[t.dtype],
                "shape": list(t.shape),
                "data_offsets": [start, end],
            }
        if part.of > 1:
            entries |= {"__metadata__": {"format": "pt", _OFFSETS: json.dumps(offsets)}}
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

    At most one write is under way; the next save waits for it, and raises what it raised. A kill
    costs at most the interval between two saves and the time that a write takes behind the
    training's back. Small states are written at once: there is nothing to gain, and then it costs
    an interval. Of a sharded state each worker has a saver and saves its `part`; the first one's is
    done when all of them are written.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: str = "",
        *,
        keep: Retention | None = KEEP_TWO,
        part: Part = WHOLE,
    ):
        self.directory, self.fingerprint, self.keep = Path(directory), fingerprint, keep
        self.part, self._given_up = part, threading.Event()
        self.saved_at: int | None = None
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        if part.number == 0:
            prune(self.directory, keep, part.run)

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        """Save `state` unless it is saved already; with `wait`, it is on disk on return."""
        self.wait()
        if state.images_seen == self.saved_at:
            return
        self._snapshot = Snapshot(state, self._snapshot, self.part)
        self.saved_at = state.images_seen
        if wait or self._snapshot.bytes <= _FOREGROUND_BYTES:
            self._write()
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
        try:
            self._write()
        except BaseException as error:
            self._error, self.saved_at = error, None

    def _write(self) -> None:
        assert self._snapshot is not None
        _write(
            self.directory, self._snapshot, self.fingerprint, self.keep, self.part, self._given_up
        )

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.wait()
        else:
            self._given_up.set()  # the other workers may be no more
            with contextlib.suppress(OSError):  # the first error is the one to tell
                self.wait()


def _write(
    directory: Path,
    snapshot: Snapshot,
    fingerprint: str,
    keep: Retention | None,
    part: Part = WHOLE,
    given_up: threading.Event | None = None,
) -> Path:
    final = named(directory, snapshot.images_seen)
    hidden = directory / f".{final.name}.{part.run or secrets.token_hex(4)}"
    try:
        hidden.mkdir(parents=True, exist_ok=part.of > 1)
        digest = _stream(snapshot, hidden / part.file)
        written: dict[str, Any] = {"bytes": snapshot.bytes, "sha256": digest}
        if part.of > 1:
            if part.number > 0:
                _tell(hidden, part, written)
                return final
            written = {"parts": [written, *_told(hidden, part, given_up)]}
        _describe(hidden, {
            **written,
            "fingerprint": fingerprint,
            "images_seen": snapshot.images_seen,
            "numbers": snapshot.numbers,
            "step": snapshot.step,
            "written": time.time(),
        })  # fmt: skip
        if final.exists():  # the training was begun with an older one, and came here again
            _hide(final)
        os.rename(hidden, final)
        _sync_directory(directory)
        prune(directory, keep, part.run)
    except OSError as error:
        _take_back(hidden, part, error)
        size = snapshot.bytes / 2**20
        raise OSError(
            error.errno,
            f"checkpoint {final} ({size:.1f} MiB) could not be written: {error.strerror or error}; "
            "nothing of it is visible. Make room and run the same command again: it goes on from "
            "the checkpoint before",
        ) from error
    except BaseException as error:
        _take_back(hidden, part, error)
        raise
    return final


def amend(path: str | os.PathLike[str], numbers: dict[str, Any]) -> None:
    """Add to the numbers of a checkpoint, whole or not at all; its tensors stay as they are."""
    described = json.loads(Path(path, DESCRIPTION).read_bytes())
    _describe(Path(path), described | {"numbers": described["numbers"] | numbers})


def _describe(path: Path, described: dict[str, Any]) -> None:
    unfinished = path / f".{DESCRIPTION}"
    with _synced(unfinished) as file:
        file.write(json.dumps(described, sort_keys=True, indent=1, allow_nan=False).encode())
    os.rename(unfinished, path / DESCRIPTION)
    _sync_directory(path)


def _stream(snapshot: Snapshot, path: Path) -> str:
    """Write a snapshot's file; its SHA-256."""
    digest = hashlib.sha256()
    with _synced(path) as file:
        for content in (snapshot.header, memoryview(snapshot.data.numpy().data)):
            for start in range(0, len(content), 1 << 24):
                piece = content[start : start + (1 << 24)]
                file.write(piece)
                digest.update(piece)
    return digest.hexdigest()


def _tell(hidden: Path, part: Part, what: dict[str, Any]) -> None:
    """Leave a receipt for the first worker, whole or not at all."""
    _sync_directory(hidden)
    unfinished = hidden / f".{part.receipt}"
    unfinished.write_text(json.dumps(what))
    os.rename(unfinished, hidden / part.receipt)


def _told(hidden: Path, part: Part, given_up: threading.Event | None) -> list[dict[str, Any]]:
    """The other workers' receipts, once all of them are there. OSError where one of them could not
    write, or none is awaited any more."""
    others, waits = part.all()[1:], given_up or threading.Event()
    receipts, deadline = [], time.monotonic() + _PATIENCE_SECONDS
    for other in others:
        while not (hidden / other.receipt).exists():
            if waits.wait(_POLL_SECONDS) or time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, f"worker {other.number} has not written its part")
        receipts.append(json.loads((hidden / other.receipt).read_bytes()))
        if "error" in receipts[-1]:
            raise OSError(receipts[-1]["errno"], receipts[-1]["error"])
    for other in others:
        (hidden / other.receipt).unlink()
    return receipts


def _take_back(hidden: Path, part: Part, error: BaseException) -> None:
    """Leave nothing of a checkpoint that failed; the first worker may be waiting for this part."""
    if part.number == 0:
        shutil.rmtree(hidden, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        (hidden / part.file).unlink(missing_ok=True)
        told = f"worker {part.number}: {getattr(error, 'strerror', None) or error}"
        _tell(hidden, part, {"error": told, "errno": getattr(error, "errno", None) or errno.EIO})


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
