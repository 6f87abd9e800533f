"""The training loop: a generator, torch only. Its clock is images seen.

It yields after each update; whoever iterates logs, saves and stops. Nothing in it waits for the
device: what it yields are tensors. A global batch is a number of micro-batches, dealt to the
workers; their gradients are summed and divided by the count of all rows. Every random number is a
function of (seed, step, micro-batch) or, in stages, of (seed, purpose, global position), so the
state of a run is its weights, averages, optimizer state and a few integers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.plan import dealt

from . import accelerators
from .checkpoint import POWER, Retention, TrainState
from .ema import Ema, PowerAverages, gamma
from .optimizer import AdamWConfig, Optimizer, OptimizerConfig, gradient_norm
from .stage import Stage, copy_exactly, distinct_tensors, seed_of, to_tensors


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a stage is trained; everything that is counted is counted in images."""

    kind: Literal["training"] = "training"
    images: int = 100_000
    batch: int = 64
    """Images per update, over all workers together."""
    micro_batch: int = 0
    """Images that a worker computes at once, at most: the gradients of several add up to that of
    the batch. Then the micro-batches are the same for any number of workers, and so is dropout. 0:
    a worker's whole share, which does not grow where `min_workers` lets some of them go."""
    learning_rate: float = 1e-3
    """Of the whole batch; nothing scales it by workers or batch."""
    warmup_images: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: as it is, or down to zero at `images`."""
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""
    ema_halflife_images: float = 10_000
    ema_ramp: float = 0.05
    """The EMA's halflife is at most this share of the images seen; 0: no ramp."""
    ema_sigma_rel: tuple[float, ...] = ()
    """Averages by power functions beside it (EDM2 has 0.05 and 0.1): from snapshots of two the
    average of any length can be had afterwards (`training.posthoc`). Each takes as much memory as
    the weights."""
    ema_snapshot_images: int = 0
    """Snapshots of them are kept this often, which 16 times in a training is enough for, and at the
    end; 0: at the end only."""
    precision: Literal["fp32", "bf16", "auto"] = "fp32"
    """bf16: autocast around the forward; weights, averages and optimizer state are fp32 always.
    auto: bf16 where a worker's device has the instructions, else fp32, so that the same training
    on other machines differs by more than the order of sums."""
    max_skipped: int = 3
    """Updates in a row that may be skipped because the loss or a gradient is not finite."""
    checkpoint_images: int = 20_000
    keep_last: int = 2
    """The newest checkpoints that are kept: from the one before goes on whose newest is damaged."""
    keep_best: bool = False
    """Keep also the checkpoint of the least held-out loss."""
    keep_images: int = 0
    """Keep also the first checkpoint at or past each multiple of so many images; 0: none."""
    heldout_pictures: int = 0
    """Held-out samples, the same each time, on which the averages' loss is taken; 0: none."""
    heldout_images: int = 0
    """It is taken this often; 0: at every checkpoint."""
    patience_images: int = 0
    """Training ends when that loss, as taken every `heldout_images`, has not fallen for so many
    images; 0: never early. What it ends with are its last averages; `keep_best` keeps others."""
    patience_margin: float = 0.0
    """To count as fallen it must be less than the least so far by this share of it."""
    log_images: int = 1_000
    preview_images: int = 0
    """Pictures are drawn this often; 0: at the end only."""
    seed: int = 0
    stall_seconds: float = 1800
    """Without an update for so long, all stacks are dumped, and a worker that gets restarted
    ends."""
    workers: int = 1
    min_workers: int = 0
    """Where a node is lost, training goes on with as many workers as there is room for, down to so
    few, and with all of them again when it is back; 0: it waits until there is room for all."""
    threads: int = 0
    """CPU threads of each worker; 0: torch's choice, or the cores shared between the workers."""
    accelerator: str = ""
    """Whose rate of matrix products the model FLOPs utilisation is a share of: a name as
    `darkroom plan --device` knows them, or "probe", which times one at the start. By default the
    published rate of a GPU that is among these; without any, only FLOP/s are logged."""
    fsdp: bool = False
    """Several workers share weights, averages and optimizer state (FSDP2) instead of each having
    all of them (DDP), and each writes its part of a checkpoint. The losses are the same."""
    compile: bool = False
    """Run `stage.compile()`, which a stage may confine to its network."""

    def __post_init__(self):
        positive = (
            "images",
            "batch",
            "learning_rate",
            "checkpoint_images",
            "keep_last",
            "log_images",
            "workers",
        )
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, int | float) and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        for name, known in {
            "schedule": ("constant", "cosine", "linear"),
            "precision": ("fp32", "bf16", "auto"),
        }.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        accelerators.check(self.accelerator)
        if self.keep_best and not self.heldout_pictures:
            raise ValueError(
                "keep_best goes by the held-out loss: set heldout_pictures, to 1024 for example"
            )
        if self.patience_images and not (self.heldout_pictures and self.heldout_images):
            raise ValueError(
                "patience_images goes by the held-out loss: set heldout_pictures, to 1024 for "
                "example, and heldout_images, to a tenth of patience_images"
            )
        for sigma_rel in self.ema_sigma_rel:
            gamma(sigma_rel)  # refuses what has no profile
        if len({f"{s:g}" for s in self.ema_sigma_rel}) < len(self.ema_sigma_rel):
            raise ValueError(f"ema_sigma_rel must be different lengths, got {self.ema_sigma_rel}")
        if self.heldout_images and not self.heldout_pictures:
            raise ValueError(
                "heldout_images says how often: set heldout_pictures, to 1024 for example"
            )
        if self.batch < self.workers:
            raise ValueError(
                f"batch {self.batch} is smaller than workers {self.workers}: "
                "each worker needs an image per update"
            )
        if self.min_workers > self.workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than workers {self.workers}: "
                "it is the least of them that may go on without the others"
            )
        if self.micro_batches(self.workers) < self.workers:
            raise ValueError(
                f"micro_batch {self.micro_batch} cuts a batch of {self.batch} into "
                f"{self.micro_batches(self.workers)}, too few for {self.workers} workers: lower it "
                f"to {self.batch // self.workers} or less"
            )

    def precision_on(self, device: torch.device | str) -> str:
        """fp32 or bf16."""
        return accelerators.native_precision(device) if self.precision == "auto" else self.precision

    @property
    def rows_at_once(self) -> int:
        """The most that a worker computes at once."""
        return math.ceil(self.batch / self.micro_batches(self.workers))

    @property
    def retention(self) -> Retention:
        return Retention(self.keep_last, self.keep_best, self.keep_images)

    def micro_batches(self, workers: int, compares_rows: bool = False) -> int:
        """Into how many micro-batches a global batch is cut; their sizes differ by at most one.
        What `compares_rows` (see Stage) is only dealt to the workers that there are."""
        if compares_rows:
            return workers
        if self.micro_batch:
            return math.ceil(self.batch / self.micro_batch)
        return self.workers if self.min_workers else workers

    def check_comparing(self, kind: str) -> None:
        """ValueError unless a stage of a kind that compares rows can be trained like this: none of
        them is left out of a comparison, and workers bring as many as each other."""
        if self.micro_batch:
            raise ValueError(
                f"{kind}: its loss compares the rows of a batch, so micro-batches would change it: "
                f"set micro_batch to 0 (it is {self.micro_batch})"
            )
        for workers in range(self.min_workers or self.workers, self.workers + 1):
            if self.batch % workers:
                raise ValueError(
                    f"{kind}: its loss compares the rows of a batch, of which each worker brings "
                    f"as many, and {workers} workers (from min_workers to workers) do not divide "
                    f"{self.batch}: set batch to a multiple of "
                    f"{math.lcm(*range(self.min_workers or self.workers, self.workers + 1))}"
                )

    @property
    def steps(self) -> int:
        return math.ceil(self.images / self.batch)

    def rate(self, images_seen: int) -> float:
        """The learning rate of the update that follows `images_seen` images."""
        if images_seen < self.warmup_images:
            return self.learning_rate * min(1.0, (images_seen + self.batch) / self.warmup_images)
        done = (images_seen - self.warmup_images) / max(self.images - self.warmup_images, 1)
        decay = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 + 0.5 * math.cos(math.pi * done),
        }
        return self.learning_rate * decay[self.schedule]


@dataclass(frozen=True)
class World:
    """This worker among its peers."""

    rank: int = 0
    size: int = 1
    device: torch.device | str = "cpu"
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module
    """Makes backward average the gradients over the workers; with `sharded`, in place, it leaves
    each of them its rows of the parameters."""
    alone: Callable[[nn.Module], AbstractContextManager[Any]] = lambda module: nullcontext()
    """Inside, forward and backward of a wrapped module leave the gradients with their worker."""
    sharded: bool = False
    average: Callable[[Iterable[nn.Parameter]], None] = lambda parameters: None
    """Averages the gradients over the workers that backward has left to each."""
    sum: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """The sum of a tensor over the workers."""
    gather: Callable[[Any], list[Any]] = lambda value: [value]
    """A JSON value from each worker, by rank."""
    stop: Callable[[], bool] = lambda: False
    """Whether all of them are to stop; asked by all at each log point."""
    restarts: bool = False
    """Whether somebody starts a worker anew that ends."""


@dataclass
class Progress:
    """One update. Tensors are scalars on the training device; reading them waits for it."""

    step: int
    images_seen: int
    loss: Tensor
    """The mean over the global batch."""
    metrics: dict[str, Tensor]
    grad_norm: Tensor
    """Before clipping."""
    skipped: Tensor
    """Whether the update was skipped, because the loss or the norm is not finite."""
    learning_rate: float
    seconds: float
    data_wait_seconds: float
    images: int
    """In this update, over all workers."""
    ema: Ema
    capture: Callable[[], TrainState]

    @property
    def state(self) -> TrainState:
        """What a checkpoint needs; its tensors are the live ones, so save it before going on."""
        return self.capture()

    def passed(self, images: int) -> bool:
        """Whether this update reached a multiple of `images`; never for 0."""
        return images > 0 and self.images_seen % images < self.images

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def data_wait_share(self) -> float:
        return self.data_wait_seconds / self.seconds


class Diverged(ArithmeticError):
    """Too many updates in a row were not finite. `keys` names the samples behind them, `step` is
    the last of them, `state` what it would have changed."""

    def __init__(self, message: str, keys: list[str], step: int = 0):
        super().__init__(message)
        self.keys, self.step = keys, step
        self.state: TrainState | None = None


def train(
    stage: Stage,
    loader: Any,
    config: TrainingConfig,
    world: World | None = None,
    state: TrainState | None = None,
) -> Generator[Progress, None, None]:
    """Train `stage` in place until `config.images`, from `state` on, and yield after each update.

    Each worker's `loader` gives its micro-batches of the same global batches, one after another.
    Raises Diverged; ValueError where `stage` or the workers do not go with the micro-batches.
    """
    world = world or World()
    turns = _turns(stage, config, world)
    device = next(stage.parameters()).device
    if config.compile:
        stage.compile()
    model = world.wrap(stage.train())  # what comes next follows the parameters' layout
    optimizer = Optimizer(config.optimizer, stage)
    ema = Ema(stage, config.ema_halflife_images, config.ema_ramp)
    powers = PowerAverages(stage, config.ema_sigma_rel)
    done = _restore(state, stage, ema, powers, optimizer) if state else 0
    health = Health(config, device, state.numbers["skipped"] if state else 0, world)
    del state  # it is a second copy of everything
    half = config.precision_on(device) == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)

    with closing(loader.batches(start_step=done)) as batches:
        for step in range(done, config.steps):
            started = time.perf_counter()
            images_seen = step * config.batch
            share, batch, waited = Share(), {}, 0.0
            for turn in turns:
                if turn.counts:
                    asked = time.perf_counter()
                    batch = next(batches)
                    waited += time.perf_counter() - asked
                _seed(device, config.seed, step, turn.number)

                with nullcontext() if turn.last else world.alone(model):
                    with autocast:
                        outputs = model(to_tensors(batch, device))
                    losses = outputs.pop("loss").float()
                    # Workers' gradients get averaged: times their number, this adds up to the mean
                    # over all rows.
                    (losses.sum() * (turn.counts * world.size / config.batch)).backward()
                if turn.counts:
                    share.add(batch.get("key", []), losses.detach(), outputs)

            world.average(optimizer.parameters.values())
            loss, metrics = share.global_mean(config, world)
            norm = gradient_norm(optimizer.parameters)
            try:
                skip = health.check(step, share, loss + norm)
            except Diverged as error:
                error.state = _capture(stage, ema, powers, optimizer, health, step, images_seen)
                raise
            rate = config.rate(images_seen)
            optimizer.step(rate, norm, config.max_grad_norm, skip)
            optimizer.zero_grad()
            stage.renew(images_seen, config.batch, world.sum, skip)
            images_seen += config.batch
            ema.update(images_seen)
            powers.update(images_seen)

            yield Progress(
                step=step + 1,
                images_seen=images_seen,
                images=config.batch,
                loss=loss,
                metrics=metrics,
                grad_norm=norm,
                skipped=skip,
                learning_rate=rate,
                seconds=time.perf_counter() - started,
                data_wait_seconds=waited,
                ema=ema,
                capture=partial(
                    _capture, stage, ema, powers, optimizer, health, step + 1, images_seen
                ),
            )


class Turn(NamedTuple):
    """What a worker does at one of the micro-batches of an update."""

    number: int
    """Which of the global batch's micro-batches."""
    counts: bool
    """False: a repetition of weight 0. Another worker has one more, and what the workers do
    together (gathering a sharded weight) they must do as often."""
    last: bool
    """Whether the gradients are summed over the workers now."""


def _turns(stage: Stage, config: TrainingConfig, world: World) -> list[Turn]:
    if stage.compares_rows:
        config.check_comparing(stage.kind)
    parts = config.micro_batches(world.size, stage.compares_rows)
    own, most = dealt(parts, world.rank, world.size), -(-parts // world.size)
    return [
        Turn(own[min(n, len(own) - 1)], counts=n < len(own), last=n == most - 1)
        for n in range(most)
    ]


class Share:
    """What a worker's micro-batches came to, in one update."""

    def __init__(self):
        self.keys: list[str] = []
        self.losses: list[Tensor] = []
        self._metrics: list[dict[str, Tensor]] = []

    def add(self, keys: list[str], losses: Tensor, metrics: dict[str, Tensor]) -> None:
        self.keys += keys
        self.losses.append(losses)
        self._metrics.append({name: value.detach() for name, value in metrics.items()})

    def finite(self) -> list[bool]:
        """Of each row, whether its loss is."""
        return torch.cat(self.losses).isfinite().tolist()

    def global_mean(self, config: TrainingConfig, world: World) -> tuple[Tensor, dict[str, Tensor]]:
        """Means over the global batch, by one reduction; metrics count by the rows behind them."""
        if world.size == len(self.losses) == 1:
            return self.losses[0].mean(), self._metrics[0]
        names = sorted(self._metrics[0])
        first, *others = (
            torch.stack([one.sum(), *(found[name].float() * len(one) for name in names)])
            for one, found in zip(self.losses, self._metrics, strict=True)
        )
        loss, *means = (world.sum(sum(others, first)) / config.batch).unbind()
        return loss, dict(zip(names, means, strict=True))


class Health:
    """Counts the updates in a row that were not finite, on the device. The host looks at each one
    on a CPU, at every sixteenth on a GPU; meanwhile none of them is applied."""

    def __init__(self, config: TrainingConfig, device: torch.device, streak: int, world: World):
        self.config, self.every = config, 1 if device.type == "cpu" else 16
        self.world = world
        self.streak = torch.tensor(streak, device=device)
        self.worst = self.streak
        # (the step, its share, whether skipped) of the batches that could be to blame
        self.recent: deque[tuple[int, Share, Tensor]] = deque(
            maxlen=self.every + config.max_skipped
        )

    def check(self, step: int, share: Share, value: Tensor) -> Tensor:
        """Whether to skip this update, a bool scalar; Diverged when too many were skipped.

        `value` is the same on all workers, so all of them skip, or diverge, together.
        """
        skip = ~torch.isfinite(value)
        self.streak = (self.streak + 1) * skip
        self.worst = torch.maximum(self.worst, self.streak)
        self.recent.append((step, share, skip))
        looking = step % self.every == 0 or step == self.config.steps - 1
        if looking and int(self.worst) > self.config.max_skipped:
            raise self._error(step)
        return skip

    def _error(self, step: int) -> Diverged:
        own = [
            list(zip(share.keys, share.finite()))  # noqa: B905 - a batch may have no keys
            for _, share, skip in self.recent
            if skip
        ]
        last = max((at for at, _, skip in self.recent if skip), default=step)
        batches = zip(*self.world.gather(own), strict=True)
        rows = [row for batch in batches for worker in batch for row in worker]
        everyone, culprits = [key for key, _ in rows], [key for key, fine in rows if not fine]
        named, config = culprits or everyone, self.config
        more = f" and {len(named) - 16} more" if len(named) > 16 else ""
        return Diverged(
            f"step {step} ({step * config.batch} images): loss or gradient was not finite in "
            f"{int(self.worst)} updates in a row ({config.max_skipped} may be skipped); none of "
            f"them was applied. {'Samples with such a loss' if culprits else 'Their samples'}: "
            f"{', '.join(named[:16])}{more}. Look at these samples, or lower learning_rate "
            f"({config.learning_rate:g}) or max_grad_norm ({config.max_grad_norm:g})",
            named,
            last,
        )


def _seed(device: torch.device, *parts: int) -> None:
    """What is still drawn from torch's own generators (dropout) becomes a function of `parts`."""
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _capture(
    stage: Stage,
    ema: Ema,
    powers: PowerAverages,
    optimizer: Optimizer,
    health: Health,
    step: int,
    images_seen: int,
) -> TrainState:
    parts = {
        "weights": distinct_tensors(stage),
        "ema": ema.tensors(),
        POWER: powers.tensors(),
        "optimizer": optimizer.tensors(),
    }
    tensors = {f"{part}/{n}": t.detach() for part, named in parts.items() for n, t in named.items()}
    return TrainState(tensors, step, images_seen, {"skipped": int(health.streak)})


@torch.no_grad()
def _restore(
    state: TrainState, stage: Stage, ema: Ema, powers: PowerAverages, optimizer: Optimizer
) -> int:
    copy_exactly(state.part("weights"), distinct_tensors(stage), "the checkpoint")
    ema.load(state.part("ema"), state.images_seen)
    powers.load(state.part(POWER), state.images_seen)
    optimizer.load(state.part("optimizer"))
    return state.step
