"""One stage's training, from a JSON description to a finished stage directory.

To resume, run it again: it goes on from the newest checkpoint, and a finished stage is not trained
again. The result of a run that was killed anywhere and run again is that of an undisturbed one,
bit for bit on a CPU with the same workers.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
import resource
import secrets
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from pipeline import storage

from . import checkpoint, measuring, repro, results, sharding
from .accelerators import check_same, chosen, matmul_rate
from .config import TrainingConfig
from .loop import Diverged, Progress, Reached, World, train
from .resuming import differences
from .stage import Stage, copy_exactly, distinct_tensors, evaluating
from .starting import Start
from .supervision import BrokenOff, Interrupts, OnHang, Stopped, Watchdog, end
from .validation import Validation

log = logging.getLogger(__name__)

OnProgress = Callable[[dict[str, Any]], None]
Build = Callable[["Job", World], tuple[Stage, Any, str]]
"""(job, this worker) -> (stage, its loader, digest of the data)."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, on what, and where the result goes; all of it JSON."""

    kind: str
    fingerprint: str
    """Covers everything that the result depends on; a directory belongs to one fingerprint, and
    going on with other values under the same one is refused."""
    config: dict[str, Any]
    training: dict[str, Any]
    dataset: str = ""
    version: int = 0
    encodings: tuple[dict[str, Any], ...] = ()
    """{name, kind, fingerprint} of each encoding that batches are made of."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Stage name -> directory of an earlier stage."""
    output: str
    """The stage directory; on a file system that all workers share."""
    parent: str | None = None
    """A finished stage whose weights, of the same shapes, are the first ones."""
    seed: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    """Copied into stage.json."""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "encodings": list(self.encodings)}

    def micro_batches(self, workers: int) -> int:
        """Into how many so many workers' global batch is cut."""
        from .stages import compares_rows

        return self.training_config().micro_batches(workers, compares_rows(self.kind))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, "encodings": tuple(values.get("encodings", ()))})

    def training_config(self) -> TrainingConfig:
        from .stages import compares_rows, reconstruct

        config = reconstruct(TrainingConfig, self.training, "training")
        if compares_rows(self.kind):
            config.check_comparing(self.kind)
        # A warm start begins with averages worth keeping: a ramp would forget them at once.
        return replace(config, seed=self.seed, ema_ramp=0.0 if self.parent else config.ema_ramp)


def build(job: Job, world: World) -> tuple[Stage, Any, str]:
    """The stage of the job's kind and config, and this worker's loader of its data."""
    from pipeline import manifest
    from pipeline.load import Loader
    from pipeline.schema import Encoding

    from . import stages

    data = manifest.read(job.dataset, job.version)
    encodings = [
        Encoding.at(job.dataset, e["name"], e["kind"], e["fingerprint"]) for e in job.encodings
    ]
    loader = Loader(
        data,
        encodings,
        global_batch=job.training_config().batch,
        seed=job.seed,
        worker=world.rank,
        workers=world.size,
        micro_batches=job.micro_batches(world.size),
    )
    return stages.create(job.kind, job.config, job.inputs), loader, data.digest


def run(
    job: Job,
    world: World | None = None,
    on_progress: OnProgress | None = None,
    build: Build = build,
    on_hang: OnHang | None = None,
) -> dict[str, Any]:
    """Train the job's stage, or find it trained, and return the content of its stage.json.

    Alone, it waits while another process trains in the same directory; SIGTERM and Ctrl-C in the
    main thread first write a checkpoint. With a `world`, it is one of several workers whose caller
    owns the directory, and only rank 0 returns something. `on_progress` is handed each new line of
    history.jsonl. After `stall_seconds` without an update the stacks are dumped and `on_hang` is
    called, from another thread; without it that is told every so often and no more, for this
    process is the caller's. Raises Diverged, Stopped, ValueError, OSError.
    """
    with nullcontext() if world else results.owning(job.output):
        if done := results.committed(job.output):
            _check_begun(job, done, results.STAGE)
            return done
        asked = job.training_config().device
        world = world or World(device=chosen(asked, torch.cuda.is_available()))
        with _threads(job.training_config().threads):
            return _train(job, world, on_progress or (lambda record: None), build, on_hang)


def _train(
    job: Job, world: World, on_progress: OnProgress, build: Build, on_hang: OnHang | None
) -> dict[str, Any]:
    output, config, leads = Path(job.output), job.training_config(), world.rank == 0
    check_begun(job)
    if leads and not (output / results.JOB).exists():
        storage.publish_json(str(output / results.JOB), job.to_json())

    start = Start(output if leads else None)
    torch.manual_seed(job.seed)
    stage, loader, data_digest = build(job, world)
    start.done("stage and data")
    stage.seed = job.seed
    stage.to(world.device)
    state = checkpoint.agreed(output / results.CHECKPOINTS, job.fingerprint, leads, world.gather)
    if state:
        began = state.numbers.get(checkpoint.DEVICE)
        check_same(began, torch.device(world.device).type, config.device, job.output)
        log.info("%s: going on from the checkpoint at %d images", job.kind, state.images_seen)
    elif job.parent:
        warm_start(stage, job.parent)
        stage.adapt(loader)
    else:
        stage.prepare(loader)
    start.done("checkpoint" if state else "first weights")

    with ExitStack() as stack:
        interrupts, stopping = stack.enter_context(Interrupts()), _Stopping()
        # The world is asked each time: its answer may need all workers.
        heard = replace(
            world,
            stop=lambda: world.stop() or interrupts.received is not None,
            break_off=lambda: world.break_off() or interrupts.received is not None,
        )
        between = _Between(job, heard, stage, loader, state, on_progress, stack)
        stacks = output / results.STACKS / f"{world.rank}.txt"
        on_hang = end if world.restarts else on_hang
        watchdog = Watchdog(config.stall_seconds, on_hang=on_hang, stacks=stacks)
        stack.enter_context(watchdog)

        def leave(at: Reached) -> NoReturn:
            if interrupts.received is not None:
                interrupts.deliver()
            raise Stopped(f"stopped at {at.images_seen} images, as asked")

        def resumed(at: Reached) -> bool:
            if between.make_up(at, watchdog.beat):
                leave(at)
            return not between.over

        updates = train(stage, loader, config, heard, state, resumed)
        updates = stack.enter_context(closing(_reproducible(job, world, updates)))
        for progress in () if between.over else updates:
            watchdog.beat()
            start.over(job.kind)
            stop = stopping.after(progress)
            last, stop = between.log(progress, stop, watchdog.beat)
            between.snapshot(progress, last)
            state = between.save(progress, last, stop)  # the last update's at the end
            if not (last or stop):  # after the checkpoint: should drawing fail, that is written
                stop = between.draw(progress, watchdog.beat)
                if stop:
                    between.save(progress, last, stop)
            if stop:
                leave(progress)
            if last:
                break
    return _end(job, world, stage, loader, data_digest, state, between)


class _Stopping:
    """Whether to stop: all workers do after the same update, when one of them was asked to."""

    LATER = 2
    """On a GPU the answer of so many updates ago is read: it has been computed while others were
    queued, and waiting for it keeps no device idle."""

    def __init__(self):
        self._answers: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def after(self, progress: Progress) -> bool:
        if not progress.stop.is_cuda:
            return bool(progress.stop)
        answer, copied = progress.stop.to("cpu", non_blocking=True), torch.cuda.Event()
        copied.record(torch.cuda.current_stream(progress.stop.device))
        self._answers.append((answer, copied))
        if len(self._answers) <= self.LATER:
            return False
        answer, copied = self._answers.popleft()
        copied.synchronize()
        return bool(answer)


class _Between:
    """What is done between two updates, each at its times: to log, with the held-out loss; to keep
    a snapshot of the averages; to save; to draw. `stack` closes what is open for that.

    Who is asked to stop has seconds: what takes longer than a save is broken off, or not begun, and
    whoever goes on with the training makes up for it."""

    def __init__(
        self,
        job: Job,
        world: World,
        stage: Stage,
        loader: Any,
        state: checkpoint.TrainState | None,
        on_progress: OnProgress,
        stack: ExitStack,
    ):
        self.job, self.world, self.loader, self.on_progress = job, world, loader, on_progress
        self.config = config = job.training_config()
        unseen = measuring.heldout(loader) if config.heldout_pictures else None
        if config.heldout_pictures and unseen is None:
            raise ValueError(
                f"heldout_pictures is {config.heldout_pictures}, but {job.dataset}, version "
                f"{job.version}, has none that are held out and encoded: set it to 0 or ingest some"
            )
        numbers = state.numbers if state else {}
        self.shown = _Shown(stage, world)
        settled = partial(self.shown.settled, loader)
        self.validation = Validation(settled, unseen, config, world, numbers)
        self.flops = numbers.get("flops_per_image") or measuring.flops_per_image(stage, loader)
        self.window = Window(numbers, Speed(self.flops, _peak(config, world)), world.device)
        self.found: dict[str, float | None] = {}
        """Held-out losses after this update."""
        self.history = self.saver = self.snapshots = None
        output, part, leads = Path(job.output), _part(world), world.rank == 0
        if leads:
            self.history = results.History(output, state.images_seen if state else 0)
            stack.callback(self.history.close)
        if leads or world.sharded:
            path, keep = output / results.CHECKPOINTS, config.retention
            self.saver = checkpoint.Saver(path, job.fingerprint, keep=keep, part=part)
            stack.enter_context(self.saver)
            if config.ema_sigma_rel:
                path = output / results.AVERAGES
                self.snapshots = checkpoint.Saver(path, job.fingerprint, keep=None, part=part)
                stack.enter_context(self.snapshots)

    @property
    def over(self) -> bool:
        """Whether the held-out loss has ended the training."""
        return self.validation.over

    def log(self, progress: Progress, stop: bool, beat: Callable[[], None]) -> tuple[bool, bool]:
        """Take the update down, and log where it is time; whether it is the last one, and whether
        to stop, which may be asked for meanwhile."""
        last, due = progress.step == self.config.steps, self.validation.due(progress)
        self.found = {}
        self.window.add(progress)
        if not (last or due or progress.passed(self.config.log_images)):
            return last, stop
        record = self.window.close(progress) | {"workers": self.world.size}
        if due and not stop:
            try:
                with self.window.aside():
                    self.found = self.validation.measure(progress, beat)
            except BrokenOff:
                stop = True
        if self.history:
            self.history.append(record | self.found)
            self.on_progress(record | self.found)
        return last or self.over, stop

    def snapshot(self, progress: Reached, last: bool) -> None:
        if self.snapshots and (last or progress.passed(self.config.ema_snapshot_images)):
            sigma_rel = {"sigma_rel": list(self.config.ema_sigma_rel)}
            # Waits, because resuming from the next checkpoint does not come here again.
            self.snapshots.save(progress.state.only(checkpoint.POWER, sigma_rel), wait=True)

    def save(self, progress: Progress, last: bool, stop: bool) -> checkpoint.TrainState | None:
        """Where it is time; what was saved."""
        due = last or stop or progress.passed(self.config.checkpoint_images)
        if not (self.saver and due):
            return None
        state = progress.state
        state.numbers |= self.window.numbers() | self.validation.numbers()
        state.numbers["flops_per_image"] = self.flops
        state.numbers[checkpoint.DEVICE] = torch.device(self.world.device).type
        if self.found:
            state.numbers[checkpoint.HELDOUT_LOSS] = self.found[checkpoint.HELDOUT_LOSS]
        self.saver.save(state, wait=last or stop)
        return state

    def draw(self, progress: Reached, beat: Callable[[], None]) -> bool:
        """Where it is time; whether it was broken off."""
        if not progress.passed(self.config.preview_images):
            return False
        try:
            with self.window.aside(), self.shown.averaged(progress) as averaged:
                _draw(averaged, self.loader, self.job, progress.images_seen, self.world, beat)
        except BrokenOff:
            return True
        return False

    def make_up(self, reached: Reached, beat: Callable[[], None]) -> bool:
        """Measure and draw what was due where the training goes on from, and was not done before it
        was ended; whether that was broken off."""
        unmeasured, undrawn = self.world.gather(self._missing(reached))[0]
        if unmeasured:
            try:
                with self.window.aside():
                    found = self.validation.measure(reached, beat)
            except BrokenOff:
                return True
            if self.history:
                loss = {checkpoint.HELDOUT_LOSS: found[checkpoint.HELDOUT_LOSS]}
                path = checkpoint.named(
                    Path(self.job.output, results.CHECKPOINTS), reached.images_seen
                )
                checkpoint.amend(path, self.validation.numbers() | loss)
                self.on_progress(self.history.amend(found))
            if self.over:
                self.snapshot(reached, last=True)
        last = reached.step == self.config.steps or self.over  # whose pictures are drawn at the end
        return undrawn and not last and self.draw(reached, beat)

    def _missing(self, reached: Reached) -> tuple[bool, bool]:
        """Of what was due: whether the first worker's log point lacks a held-out loss, and whether
        there are no pictures."""
        if self.history is None:
            return False, False
        newest = (results.history(self.job.output) or [{}])[-1]
        here = newest.get("images_seen") == reached.images_seen
        unmeasured = here and checkpoint.HELDOUT_LOSS not in newest
        pictures = Path(self.job.output, _picture(reached.images_seen))
        return unmeasured and self.validation.due(reached), not pictures.exists()


def _end(
    job: Job,
    world: World,
    stage: Stage,
    loader: Any,
    data_digest: str,
    state: checkpoint.TrainState | None,
    between: _Between,
) -> dict[str, Any]:
    """Commit the last averages; only the first worker does, and returns something."""
    if between.over:
        at = between.validation.least_at
        log.info("%s: no lower held-out loss since %d images", job.kind, at)
    leads, twin = world.rank == 0, between.shown.twin
    if world.sharded and state is not None:
        averages = sharding.gathered(state.averaged(), keep=leads)
        state = replace(state, tensors={f"weights/{n}": t for n, t in averages.items()})
    if not leads:
        return {}
    assert state is not None
    whole = stage if twin is None else twin.to(world.device)
    return _commit(job, whole, loader, data_digest, state, between.over)


class _Shown:
    """The stage that is measured and drawn from: the one that trains, or, where each worker has but
    a part of that, a whole one of the first worker's."""

    def __init__(self, stage: Stage, world: World):
        self.stage, self.world = stage, world
        self.twin = _in_memory(stage) if world.sharded and world.rank == 0 else None

    @contextmanager
    def averaged(self, progress: Reached) -> Iterator[Stage]:
        """With its averages. Of a sharded stage's workers all come here; the first has the twin."""
        if not self.world.sharded:
            with progress.ema.applied():
                yield self.stage
            return
        averages = progress.state.averaged()
        gathered = sharding.gathered(averages, keep=self.twin is not None)
        if self.twin is None:
            yield self.stage
            return
        copy_exactly(gathered, distinct_tensors(self.twin), "the stage")
        try:
            yield self.twin.to(self.world.device)
        finally:
            self.twin.cpu()

    @contextmanager
    def settled(self, loader: Any, progress: Reached) -> Iterator[Stage]:
        """The same, for who measures."""
        with self.averaged(progress) as stage:
            whole = not self.world.sharded or self.twin is not None
            with stage.settled(loader) if whole else nullcontext():
                yield stage


def _in_memory(stage: Stage) -> Stage:
    """A copy in the CPU's memory; the device never holds two."""
    copies: dict[int, Any] = {id(t): t.to("cpu", copy=True) for t in stage.buffers()}
    for p in stage.parameters():
        copies[id(p)] = nn.Parameter(p.detach().to("cpu", copy=True), p.requires_grad)
    return copy.deepcopy(stage, copies)


def _part(world: World) -> checkpoint.Part:
    """Which part of each checkpoint this worker writes."""
    if not world.sharded:
        return checkpoint.WHOLE
    run = world.gather(secrets.token_hex(4))[0]
    return checkpoint.Part(world.rank, world.size, run)


def _reproducible(
    job: Job, world: World, updates: Generator[Progress, None, None]
) -> Generator[Progress, None, None]:
    """The updates; should they diverge, the one that did is left to be run again."""
    with closing(updates):
        try:
            yield from updates
        except Diverged as error:
            command = repro.leave(job, world, error)
            told = Diverged(f"{error}. To run that update again: {command}", error.keys, error.step)
            raise told from error


def _peak(config: TrainingConfig, world: World) -> float | None:
    """FLOP/s of all workers' devices together, where it is known."""
    if not config.accelerator and torch.device(world.device).type == "cpu":
        return None
    rate = matmul_rate(config.accelerator, config.precision_on(world.device), world.device)
    return rate and rate * world.size


def _commit(
    job: Job,
    stage: Stage,
    loader: Any,
    data_digest: str,
    state: checkpoint.TrainState,
    stopped_early: bool,
) -> dict[str, Any]:
    """Export the averaged weights and what was measured on them; stage.json comes last."""
    output = Path(job.output)
    copy_exactly(state.averaged(), distinct_tensors(stage), "the checkpoint")
    with evaluating(stage):
        measured = stage.finish(loader)
    _preview(stage, loader, job, state.images_seen)

    hidden = output / f".{results.WEIGHTS}"
    exported = {n: t.detach().cpu().contiguous() for n, t in stage.exported().items()}
    try:
        size = sum(t.numel() * t.element_size() for t in exported.values())
        with storage.room(str(hidden), size):
            save_file(exported, hidden)
    except storage.NoRoom:
        hidden.unlink(missing_ok=True)  # it takes what room there is
        raise
    digest = storage.sha256(hidden)
    storage.publish_file(hidden, str(output / results.WEIGHTS))
    config = asdict(stage.config)
    storage.publish_json(str(output / results.CONFIG), {"kind": job.kind, "config": config})
    described = {
        **job.to_json(),
        "config": config,
        "data_digest": data_digest,
        "images_seen": state.images_seen,
        "measured": measured,
        "parameters": sum(p.numel() for n, p in stage.named_parameters() if n in exported),
        "seconds": state.numbers["seconds"],
        "stopped_early": stopped_early,
        "weights_sha256": digest,
    }
    del described["output"]  # a directory may be moved
    storage.publish_json(str(output / results.STAGE), described)
    final = replace(job.training_config().retention, last=1)
    checkpoint.prune(output / results.CHECKPOINTS, keep=final)
    done = results.committed(job.output)
    assert done is not None
    return done


@dataclass(frozen=True)
class Speed:
    """What images per second amount to."""

    flops_per_image: float
    peak: float | None
    """FLOP/s."""

    def told(self, images_per_second: float) -> dict[str, float]:
        done = self.flops_per_image * images_per_second
        used = {"model_flops_utilisation": done / self.peak} if self.peak else {}
        return {"flops_per_second": done, **used}


class Window:
    """The updates since the last log point. It travels in checkpoints, so that a resumed run logs
    the very lines that an undisturbed one does, clocks and memory aside."""

    def __init__(self, numbers: dict[str, Any], speed: Speed, device: torch.device | str):
        self._speed, self._device = speed, torch.device(device)
        self._values: dict[str, list[Any]] = numbers.get("window", {})
        self._before: float = numbers.get("seconds", 0.0)
        self._started = self._opened = time.perf_counter()
        self._images, self._waited = 0, 0.0

    def add(self, progress: Progress) -> None:
        own = {"loss": progress.loss, "grad_norm": progress.grad_norm, "skipped": progress.skipped}
        for name, value in {**progress.metrics, **own}.items():
            self._values.setdefault(name, []).append(value)
        self._images += progress.images
        self._waited += progress.data_wait_seconds

    def close(self, progress: Progress) -> dict[str, Any]:
        """The log line of the updates so far: means over those that were applied; and start
        anew."""
        values = self._read()
        now = time.perf_counter()
        passed = max(now - self._opened, 1e-9)
        record = {
            **{name: _mean(numbers) for name, numbers in values.items()},
            "images_seen": progress.images_seen,
            "step": progress.step,
            "learning_rate": progress.learning_rate,
            "skipped": int(sum(values["skipped"])),
            "images_per_second": self._images / passed,
            **self._speed.told(self._images / passed),
            "peak_memory_bytes": self._memory(),
            "data_wait_share": self._waited / passed,
            "seconds": self._seconds(),
        }
        self._values, self._opened, self._images, self._waited = {}, now, 0, 0.0
        return record

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is no part of the training's speed."""
        started = time.perf_counter()
        yield
        self._opened += time.perf_counter() - started

    def numbers(self) -> dict[str, Any]:
        """What `Window(numbers)` goes on from, JSON."""
        values = {name: [_finite(v) for v in values] for name, values in self._read().items()}
        return {"window": values, "seconds": self._seconds()}

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self._started

    def _memory(self) -> int:
        """The most that was allocated on the device, or resident."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10  # bytes there, KiB elsewhere

    def _read(self) -> dict[str, list[Any]]:
        """All values as numbers, by one look at the device."""
        waiting = [v for vs in self._values.values() for v in vs if isinstance(v, torch.Tensor)]
        numbers = iter(torch.stack([v.double() for v in waiting]).tolist() if waiting else [])
        self._values = {
            name: [next(numbers) if isinstance(v, torch.Tensor) else v for v in values]
            for name, values in self._values.items()
        }
        return self._values


def warm_start(stage: Stage, parent: str) -> None:
    """Give a stage the weights of a finished one. ValueError when they are not what was
    committed."""
    done = results.committed(parent)
    if done is None:
        raise ValueError(f"{parent}: no finished stage ({results.STAGE} is missing) to start from")
    weights = Path(parent, results.WEIGHTS)
    if (digest := storage.sha256(weights)) != done["weights_sha256"]:
        raise ValueError(
            f"{weights}: sha256 {digest[:16]}..., but {results.STAGE} says "
            f"{done['weights_sha256'][:16]}...: it was changed; restore it or train without it"
        )
    copy_exactly(load_file(weights), stage.exported(), str(weights))


def contact_sheet(pictures: np.ndarray, gap: int = 2) -> np.ndarray:
    """Pictures uint8 [n, height, width, 3] on one white sheet, in rows about as long as it is
    high."""
    n, height, width, _ = pictures.shape
    columns = min(n, math.ceil(math.sqrt(n * height / width)))
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for number, picture in enumerate(pictures):
        top, left = (
            gap + (height + gap) * (number // columns),
            gap + (width + gap) * (number % columns),
        )
        sheet[top : top + height, left : left + width] = picture
    return sheet


def _draw(
    stage: Stage,
    loader: Any,
    job: Job,
    images_seen: int,
    world: World,
    beat: Callable[[], None],
) -> None:
    """A preview by the first worker. The others wait for it, and hear of each of its steps, which
    is how they know that it lives: it may draw for longer than anybody may be silent. BrokenOff, by
    all of them, after the step during which one was asked to stop."""

    def said(done: bool) -> bool:
        where = world.device if world.size > 1 else "cpu"  # alone, no GPU is waited for
        mine = torch.tensor([float(done), float(world.break_off())], device=where)
        over, broken_off = world.sum(mine).tolist()
        beat()
        if broken_off and not over:
            raise BrokenOff
        return over > 0

    if world.rank == 0:
        _preview(stage, loader, job, images_seen, lambda: said(False))
        said(True)
        return
    while not said(False):
        pass


def _preview(
    stage: Stage,
    loader: Any,
    job: Job,
    images_seen: int,
    beat: Callable[[], Any] = lambda: None,
) -> None:
    with evaluating(stage):
        pictures = stage.preview(loader, job.seed, beat)
    if pictures is not None and len(pictures):
        from PIL import Image

        data = io.BytesIO()
        Image.fromarray(contact_sheet(pictures)).save(data, format="PNG")
        for name in (results.PREVIEW, _picture(images_seen)):
            storage.publish_bytes(str(Path(job.output, name)), data.getvalue())


def _picture(images_seen: int) -> str:
    return f"{results.PREVIEWS}/{images_seen:012d}.png"


def changes(begun: dict[str, Any], job: Job) -> list[str]:
    """What a job may not change that was begun as `begun`, a job.json, says: key by key, values
    that are left out as the defaults that they are."""
    from . import stages

    def filled(of: Callable[[Any], Any], one: Any, other: Any) -> tuple[Any, Any]:
        try:
            return asdict(of(one)), asdict(of(other))
        except ValueError:  # not of this version of the code, or a kind of somebody else
            return one, other

    asked = job.to_json()
    configs = filled(lambda it: stages.config_of(job.kind, it), begun["config"], asked["config"])
    trainings = filled(stages.training_of, begun["training"], asked["training"])
    one, other = (
        json.loads(json.dumps(values | {"config": config, "training": training}))
        for values, config, training in zip((begun, asked), configs, trainings, strict=True)
    )
    return differences(one, other)


def check_begun(job: Job) -> None:
    """ValueError where another training was begun in the job's directory, or this one otherwise in
    what may not change when it goes on."""
    begun = Path(job.output, results.JOB)
    if begun.exists():
        _check_begun(job, storage.read_json(str(begun)), results.JOB)


def _check_begun(job: Job, found: dict[str, Any], where: str) -> None:
    """ValueError unless the directory, whose `where` holds what was found, is of this training."""
    begun = Path(job.output, results.JOB)
    changed = changes(storage.read_json(str(begun)), job) if begun.exists() else []
    named = "; ".join(changed)
    if found["fingerprint"] != job.fingerprint:
        raise ValueError(
            f"{job.output}/{where} is of training {found['fingerprint']}, but this is training "
            f"{job.fingerprint}{f' ({named})' if named else ''}: "
            "give it a directory of its own, or remove that one"
        )
    if changed:
        raise ValueError(
            f"{begun}: {named}; this decides the result and may not change when a training goes "
            "on: ask for what it was begun with, or give the new one a directory and a "
            "fingerprint of its own"
        )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _mean(numbers: Sequence[float | None]) -> float | None:
    finite = [n for n in map(_finite, numbers) if n is not None]
    return math.fsum(finite) / len(finite) if finite else None
