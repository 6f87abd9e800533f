"""The same job on several workers: Ray Train starts them and starts them again; all else is as in
one process.

The batches, the noise and the mean over the global batch do not depend on the number of workers.
Ray keeps no state of the training: the newest checkpoint in the stage directory does, which also
survives the death of Ray.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import storage
from pipeline.execute import cpus

from . import checkpoint, results, sharding
from .accelerators import check_same, native_precision
from .checkpoint import HELDOUT_LOSS
from .config import TrainingConfig
from .job import Build, Job, OnProgress, build, check_begun, run
from .loop import Diverged, World
from .supervision import Interrupts, OnHang, Stopped

RAY, STOP = "ray", "stop"
PREEMPTION_SECONDS, PREEMPTION_UPDATES = 1.0, 16
"""About how often workers ask whether a node is about to be taken away: after so many updates at
the latest, however fast they are, for those that follow may be slow."""
TRIES = 4
"""So many failures end a run of Ray's; another one is begun where it left a new checkpoint."""
POLL_SECONDS = 0.5
GROW_SECONDS = 60.0
"""How often to look whether there is room for more workers again; making room costs them what they
did since their last checkpoint."""
GRACE_SECONDS = 25.0
"""How long workers have for a checkpoint once the driver was told to stop."""
_RAY_TRAIN = {
    # After the loss of a node Ray asks for all workers once more, before it knows of the loss.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}
_PASSED_ON = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "TORCH_DISTRIBUTED_DEBUG")
log = logging.getLogger(__name__)


def fit(
    job: Job,
    on_progress: OnProgress | None = None,
    force_ray: bool = False,
    build: Build = build,
    on_hang: OnHang | None = None,
) -> dict[str, Any]:
    """Train the job's stage on as many workers as it asks for; the content of its stage.json.

    One worker is this process, unless `force_ray`; should it hang, `on_hang` is called, and without
    that it is told and no more: only who owns the process may end it or begin it again. More are
    Ray actors, started again where they hang, each with a GPU where the cluster has enough of them;
    `output`, `dataset` and `inputs` must mean the same everywhere. `build` must then be picklable.
    On SIGTERM or Ctrl-C in the main thread they write a checkpoint after the next update.
    """
    config = job.training_config()
    if config.workers == 1 and not force_ray:
        return run(job, None, on_progress, build, on_hang)
    with results.owning(job.output):
        if results.committed(job.output) is None:
            check_begun(job)  # what is refused by all workers is refused before they start
            with _ray(config):
                _fit(job, config, on_progress, build)
        return run(job, World(), None, build)  # what is finished is only checked and read


def _fit(job: Job, config: TrainingConfig, on_progress: OnProgress | None, build: Build) -> None:
    output = Path(job.output).absolute()
    (output / STOP).unlink(missing_ok=True)
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["returned"] = _persist(job, config, build, output)
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    follow = _follow(job.output, on_progress or (lambda record: None), config.workers)
    patience = GRACE_SECONDS
    with Interrupts() as interrupts:
        thread.start()
        while thread.is_alive() and patience > 0:
            thread.join(POLL_SECONDS)
            follow()
            if interrupts.received is not None:
                (output / STOP).touch()
                patience -= POLL_SECONDS
        follow()
        (output / STOP).unlink(missing_ok=True)
        shutil.rmtree(output / RAY, ignore_errors=True)
        if interrupts.received is not None:
            interrupts.deliver()
    if "error" in outcome:
        raise outcome["error"]
    if failure := (outcome["returned"] or {}).get("diverged"):
        raise Diverged(failure["message"], failure["keys"])
    if results.committed(job.output) is None:
        raise Stopped(f"training in {job.output} was stopped; run it again to go on")


def _persist(job: Job, config: TrainingConfig, build: Build, output: Path) -> Any:
    """What the workers return. They are started again for as long as they get anywhere: who trains
    for a month loses more of them than any fixed number of tries. Not on a disk that is full."""
    import ray
    from ray.train import ControllerError, TrainingFailedError

    # Once: where a node of GPUs is lost for good, nobody wants the rest to go on by CPUs unasked.
    gpus = ray.cluster_resources().get("GPU", 0)
    began = checkpoint.numbers(output / results.CHECKPOINTS).get(checkpoint.DEVICE)
    use_gpu = _by_gpus(config, gpus, began, job.output)

    reached = partial(checkpoint.reached, output / results.CHECKPOINTS)
    while True:
        before = reached()
        try:
            returned = _trainer(job, config, build, output, use_gpu).fit().return_value
            if not (returned or {}).get("preempted") or (output / STOP).exists():
                return returned
            log.warning("a node is about to be taken away: going on from %s elsewhere", reached())
        except TrainingFailedError as error:
            if isinstance(error, ControllerError) and _is_final(error.controller_failure):
                raise error.controller_failure from None
            if reached() <= before or (output / STOP).exists():
                raise
            log.warning("workers failed %d times, but got further: going on: %s", TRIES, error)


def _by_gpus(config: TrainingConfig, gpus: float, began: str | None, where: str) -> bool:
    """Whether each worker gets one of a cluster's GPUs. ValueError where too few are there for what
    was asked for, or for what the training was begun on."""
    least = config.min_workers or config.workers
    wanted = (began or "auto") if config.device == "auto" else config.device
    if wanted == "cuda" and gpus < least:
        why = "training.device is cuda" if config.device == "cuda" else "it was trained on cuda"
        raise ValueError(
            f"{where}: {why}, and {least} workers need as many GPUs, but the Ray cluster has "
            f"{gpus:g}: add nodes with GPUs, set training.workers or min_workers lower, or "
            "training.device=cpu to go on by CPUs"
        )
    by_gpus = gpus >= least and config.device != "cpu"
    check_same(began, "cuda" if by_gpus else "cpu", config.device, where)
    if 0 < gpus < least and config.device == "auto":
        log.warning(
            "%s: %d workers compute on CPUs, for the Ray cluster has only %g GPUs; "
            "training.device=cuda makes that an error", where, least, gpus,
        )  # fmt: skip
    return by_gpus


def _trainer(job: Job, config: TrainingConfig, build: Build, output: Path, use_gpu: bool) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    workers, least = config.workers, config.min_workers or config.workers
    for name, value in _RAY_TRAIN.items():
        os.environ.setdefault(name, value)
    # A process more; and of a single node nobody could go on elsewhere.
    watched = sum(node["Alive"] for node in ray.nodes()) > 1
    os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = str(int(watched))
    cores = int(ray.cluster_resources().get("CPU", 1))
    shared = max(1, cores // workers)
    environment = {"OMP_NUM_THREADS": str(config.threads or shared)}
    environment |= {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    return TorchTrainer(
        _worker,
        train_loop_config={
            "job": job.to_json(),
            "build": build,
            "shared": shared,
            "directory": os.getcwd(),
            "watched": watched,
        },
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=int(config.stall_seconds) or 1800
        ),
        scaling_config=ScalingConfig(
            num_workers=(least, workers) if least < workers else workers,
            elastic_resize_monitor_interval_s=GROW_SECONDS,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": _cpus(config), **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=RunConfig(
            # Ray resumes by name from what it remembers of it; only our checkpoints count.
            name=f"{job.fingerprint}-{secrets.token_hex(4)}",
            storage_path=str(output / RAY),
            failure_config=FailureConfig(max_failures=TRIES - 1),
            callbacks=[_no_tries_in_vain()],
            worker_runtime_env={"env_vars": environment},
        ),
    )


def _is_final(error: BaseException) -> bool:
    """Whether trying again would end the same way: the disk is full, or something was refused."""
    return storage.is_full(error) or isinstance(error, ValueError)


def _no_tries_in_vain() -> Any:
    """What Ray's controller asks when workers failed: it gives up at once where the error is final.
    The worker itself cannot say so by what it returns, for the others wait for it in a collective.
    """
    from ray.train import UserCallback

    class NoTriesInVain(UserCallback):
        def after_exception(
            self, run_context: Any, worker_exceptions: dict[int, Exception]
        ) -> None:
            for error in worker_exceptions.values():
                said = getattr(error, "_base_exc", error)  # Ray wraps what a worker raised
                if _is_final(said):
                    raise said

    return NoTriesInVain()


def _worker(settings: dict[str, Any]) -> dict[str, Any]:
    """What each of Ray's workers does: `run`, in a world of several."""
    import ray.train
    import ray.train.torch

    if os.path.isdir(settings["directory"]):
        os.chdir(settings["directory"])  # relative paths mean what they mean to the driver
    job, context = Job.from_json(settings["job"]), ray.train.get_context()
    # Ray may be told of more cores than there are: those of its own machine a worker can count.
    here = max(1, cpus() // context.get_local_world_size())
    torch.set_num_threads(job.training_config().threads or min(settings["shared"], here))
    world = of_process_group(
        context.get_world_rank(),
        context.get_world_size(),
        ray.train.torch.get_device(),
        fsdp=job.training_config().fsdp,
    )

    def warned() -> bool:
        return ray.train.get_preemption_info() is not None

    # Two, for while something is measured or drawn time passes otherwise.
    polls = [_Polled(warned if settings["watched"] else None, world.gather) for _ in range(2)]

    def stops(poll: _Polled) -> bool:
        return poll() or Path(job.output, STOP).exists()

    world = replace(world, stop=partial(stops, polls[0]), break_off=partial(stops, polls[1]))
    try:
        with _Events.of(job.output, world.rank):
            run(job, world, None, settings["build"])
    except Stopped:
        return {"stopped": True, "preempted": any(poll.answer for poll in polls)}
    except Diverged as error:  # would happen again: no reason for Ray to try
        return {"diverged": {"message": str(error), "keys": error.keys}}
    return {}


class _Polled:
    """The answer to a question, asked about once a second.

    All workers call it as often as each other, and `ask` at the same calls, for that is a
    collective, and dearer than an update may be: after how many calls the next one is, they agree
    upon by the slowest one's time.
    """

    def __init__(self, ask: Callable[[], bool] | None, gather: Callable[[Any], list[Any]]):
        self.answer, self._ask, self._gather = False, ask, gather
        self._every, self._calls, self._since = 1, 0, time.monotonic()

    def __call__(self) -> bool:
        self._calls += 1
        if self._ask is None or self.answer or self._calls < self._every:
            return self.answer
        self.answer = self._ask()
        now = time.monotonic()
        seconds = max(self._gather((now - self._since) / self._calls))
        self._every = max(1, min(PREEMPTION_UPDATES, int(PREEMPTION_SECONDS / max(seconds, 1e-9))))
        self._calls, self._since = 0, now
        return self.answer


class _Events(logging.Handler):
    """Appends a worker's warnings to the stage's events.jsonl, for the driver to say: what Ray logs
    of workers is kept from it. All warn of the same but for the errors of a watchdog."""

    def __init__(self, path: Path, rank: int):
        super().__init__(logging.WARNING if rank == 0 else logging.ERROR)
        self.path, self.rank = path, rank

    @classmethod
    @contextmanager
    def of(cls, stage_dir: str, rank: int) -> Iterator[None]:
        handler = cls(Path(stage_dir, results.EVENTS), rank)
        packages = [logging.getLogger(name) for name in ("pipeline", "training")]
        for logger in packages:
            logger.addHandler(handler)
        try:
            yield
        finally:
            for logger in packages:
                logger.removeHandler(handler)

    def emit(self, record: logging.LogRecord) -> None:
        said = {
            "time": record.created,
            "rank": self.rank,
            "level": record.levelname,
            "message": record.getMessage(),
        }
        with suppress(OSError), open(self.path, "ab", buffering=0) as file:  # a full disk
            file.write(json.dumps(said).encode() + b"\n")  # at once: others append as well


def of_process_group(
    rank: int,
    size: int,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
    fsdp: bool = False,
) -> World:
    """This process's world in the torch.distributed group that it is in."""

    def total(tensor: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(tensor)
        return tensor

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        torch.distributed.all_gather_object(values, value)
        return values

    def wrap(module: nn.Module) -> nn.Module:
        wrapped = nn.parallel.DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            find_unused_parameters=True,  # a condition may be absent from all of a worker's rows
        )
        wrapped.broadcast_buffers = False  # at each step, that is: they are measured once
        return wrapped

    def alone(wrapped: Any) -> AbstractContextManager[None]:
        return wrapped.no_sync()

    world = World(
        rank,
        size,
        device,
        wrap,
        alone,
        sum=total,
        gather=gather,
        stop=stop,
        restarts=True,
    )
    if not fsdp or size == 1:  # alone there is nobody to share with
        return world
    # Gradients stay with nobody: each micro-batch's are scattered at once, or all would be whole.
    return replace(
        world,
        wrap=partial(sharding.shard, device=device),
        alone=lambda module: nullcontext(),
        average=sharding.average,
        sharded=True,
    )


def _follow(stage_dir: str, on_progress: OnProgress, workers: int) -> Callable[[], None]:
    """A function that hands over what is new in history.jsonl since it was called last, and says
    when it is by more or fewer workers, and what workers warn of."""
    newest: dict[str, Any] = (results.history(stage_dir) or [{"images_seen": 0}])[-1]
    path, size, present = Path(stage_dir, results.HISTORY), -1, workers
    events = Path(stage_dir, results.EVENTS)
    told = events.stat().st_size if events.exists() else 0

    def follow() -> None:
        nonlocal newest, size, present, told
        found, told = results.events(stage_dir, told)
        for event in found:
            level = logging.getLevelNamesMapping().get(event["level"], logging.WARNING)
            log.log(level, "worker %d: %s", event["rank"], event["message"])
        if not path.exists() or path.stat().st_size == size:
            return
        size = path.stat().st_size
        for record in results.history(stage_dir):
            images, before = record["images_seen"], newest["images_seen"]
            more = images == before and HELDOUT_LOSS in record and HELDOUT_LOSS not in newest
            if images > before or more:  # what a restarted worker repeats is not new
                newest = record
                if (found := record.get("workers", present)) != present:
                    present = found
                    log.warning("%d images: %d of %d workers", images, present, workers)
                on_progress(record)

    return follow


def _cpus(config: TrainingConfig) -> float:
    """What a worker reserves. None would be needed, for Ray only places what is computed on a GPU
    or by OpenMP's threads; but of elastic workers, those of a lost node shall not crowd the
    others'."""
    return 1.0 if 0 < config.min_workers < config.workers else 0.5


@contextmanager
def _ray(config: TrainingConfig) -> Iterator[None]:
    """Ray, for as long as the block lasts where nobody has started it."""
    import signal

    import ray

    with ExitStack() as stack:
        if not ray.is_initialized():
            main = threading.current_thread() is threading.main_thread()
            before = signal.getsignal(signal.SIGTERM)
            address = os.environ.get("RAY_ADDRESS", "local")
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by itself: it starves
            ray.init(address=address, include_dashboard=False, log_to_driver=False)
            if main and before is not None:
                signal.signal(signal.SIGTERM, before)  # ray.init takes it and never gives it back
            stack.callback(ray.shutdown)
        free = ray.cluster_resources().get("CPU", 0)
        workers = config.min_workers or config.workers
        if free < _cpus(config) * workers:
            raise ValueError(
                f"{workers} workers need {_cpus(config) * workers:g} CPUs in the Ray cluster, it "
                f"has {free:g}: set training.workers lower or add nodes"
            )
        yield


def accelerator() -> str:
    """What a worker of this machine would compute on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    fast = native_precision("cpu") == "bf16"
    return f"{os.cpu_count()} CPU cores, " + (
        "bf16 in hardware" if fast else "bf16 emulated, fp32 faster"
    )
