"""The training loop: a generator, torch only. Its clock is images seen.

It yields after each update; whoever iterates logs, saves and stops. Nothing in it waits for the
device: what it yields are tensors. A global batch is a number of micro-batches, dealt to the
workers; their gradients are summed and divided by the count of all rows. Every random number is a
function of (seed, step, micro-batch) or, in stages, of (seed, purpose, global position), so the
state of a run is its weights, averages, optimizer state and a few integers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pipeline.plan import dealt

from .checkpoint import POWER, TrainState
from .config import TrainingConfig
from .ema import Ema, PowerAverages
from .optimizer import Optimizer, gradient_norm
from .stage import Stage, copy_exactly, distinct_tensors, seed_of, to_tensors


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
