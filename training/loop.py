"""The training loop: a generator, torch only. Its clock is images seen.

It yields after each update; whoever iterates logs, saves and stops. Nothing in it waits for the
device: what it yields are tensors. A global batch is a number of micro-batches, dealt to the
workers; their gradients are summed and divided by the count of all rows. Every random number is a
function of (seed, step, micro-batch) or, in stages, of (seed, purpose, global position), so the
state of a run is its weights, averages, optimizer state and a few integers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
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
from .health import Health
from .optimizer import Optimizer, gradient_norm
from .stage import Stage, copy_exactly, distinct_tensors, seed_of, to_tensors


def train(
    stage: Stage,
    loader: Any,
    config: TrainingConfig,
    world: World | None = None,
    state: TrainState | None = None,
    resumed: Callable[[Reached], bool] = lambda reached: True,
) -> Generator[Progress, None, None]:
    """Train `stage` in place until `config.images`, from `state` on, and yield after each update.

    Each worker's `loader` gives its micro-batches of the same global batches, one after another.
    Before the first update that follows a `state`, `resumed` says whether there is to be one.
    Raises Diverged; ValueError where `stage` or the workers do not go with the micro-batches.
    """
    world = world or World()
    turns = _turns(stage, config, world)
    device = next(stage.parameters()).device
    if config.compile:
        stage.compile()
    model = world.wrap(stage.train())  # what comes next follows the parameters' layout
    learner = Learner(stage, config, world)
    if state:
        learner.restore(state)
    done, streak = (state.step, state.numbers["skipped"]) if state else (0, 0)
    health = Health(config, device, world, streak)
    began, state = state is not None, None  # it is a second copy of everything
    if began and not resumed(_reached(learner, done, health)):
        return

    with closing(loader.batches(start_step=done)) as loaded:
        batches = Timed(loaded)
        for step in range(done, config.steps):
            started = time.perf_counter()
            share = gradients(model, turns, batches, step, config, world)
            world.average(learner.parameters.values())
            loss, metrics, stop = share.global_mean(config, world)
            norm = gradient_norm(learner.parameters)

            skip = health.skip(step, share, loss, norm)
            if health.diverged(step):
                blamed = health.blamed()
                state = learner.capture(blamed.step, health.streak)
                raise Diverged(blamed.message, blamed.keys, blamed.step, state)
            rate = learner.apply(step, norm, skip)

            yield Progress(
                **vars(_reached(learner, step + 1, health)),
                loss=loss,
                metrics=metrics,
                grad_norm=norm,
                skipped=skip,
                stop=stop,
                learning_rate=rate,
                seconds=time.perf_counter() - started,
                data_wait_seconds=batches.waited(),
            )


def _reached(learner: Learner, step: int, health: Health) -> Reached:
    return Reached(
        step=step,
        images_seen=step * learner.config.batch,
        images=learner.config.batch,
        ema=learner.ema,
        capture=partial(learner.capture, step, health.streak),
    )


def gradients(
    model: nn.Module,
    turns: list[Turn],
    batches: Iterator[dict[str, Any]],
    step: int,
    config: TrainingConfig,
    world: World,
) -> Share:
    """Add up, over the turns of a worker, the gradients of the mean loss over all rows of an
    update's global batch."""
    device, share, batch = next(model.parameters()).device, Share(), {}
    half = config.precision_on(device) == "bf16"
    for turn in turns:
        if turn.weight:
            batch = next(batches)
        _seed(device, config.seed, step, turn.number)
        with nullcontext() if turn.last else world.alone(model):
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                outputs = model(to_tensors(batch, device))
            losses = outputs.pop("loss").float()
            (losses.sum() * turn.weight).backward()
        if turn.weight:
            share.add(batch.get("key", []), losses.detach(), outputs)
    return share


class Turn(NamedTuple):
    """What a worker does at one of the micro-batches of an update."""

    number: int
    """Which of the global batch's micro-batches."""
    weight: float
    """Of each row's loss. 0: a repetition of the one before. Another worker has one more, and what
    the workers do together (gathering a sharded weight) they must do as often."""
    last: bool
    """Whether the gradients are summed over the workers now."""


def _turns(stage: Stage, config: TrainingConfig, world: World) -> list[Turn]:
    if stage.compares_rows:
        config.check_comparing(stage.kind)
    parts = config.micro_batches(world.size, stage.compares_rows)
    own, most = dealt(parts, world.rank, world.size), -(-parts // world.size)
    # Workers' gradients get averaged: times their number, they add up to the mean over all rows.
    weight = world.size / config.batch
    return [
        Turn(own[min(n, len(own) - 1)], weight if n < len(own) else 0.0, last=n == most - 1)
        for n in range(most)
    ]


class Timed:
    """An iterator that knows how long it was waited for."""

    def __init__(self, values: Iterator[dict[str, Any]]):
        self._values, self._seconds = values, 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        asked = time.perf_counter()
        value = next(self._values)
        self._seconds += time.perf_counter() - asked
        return value

    def waited(self) -> float:
        """Seconds since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds


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

    def rows(self) -> list[tuple[str, bool]]:
        """The key of each row, and whether its loss is finite."""
        finite = torch.cat(self.losses).isfinite().tolist()
        return list(zip(self.keys, finite))  # noqa: B905 - a batch may have no keys

    def global_mean(
        self, config: TrainingConfig, world: World
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Loss and metrics, means over the global batch, and how many workers are to stop, by one
        reduction; metrics count by the rows behind them."""
        stop = float(world.stop())
        if world.size == 1 and len(self.losses) == 1:  # all rows are here: nothing to add up
            return self.losses[0].mean(), self._metrics[0], torch.tensor(stop)
        names = sorted(self._metrics[0])
        first, *others = (
            torch.stack([one.sum(), *(found[name].float() * len(one) for name in names)])
            for one, found in zip(self.losses, self._metrics, strict=True)
        )
        asked = first.new_full((1,), stop)  # to copy it there would wait for the device
        totals = world.sum(torch.cat([sum(others, first), asked]))
        loss, *means = (totals[:-1] / config.batch).unbind()
        return loss, dict(zip(names, means, strict=True)), totals[-1]


class Learner:
    """All that an update changes and a checkpoint holds: a stage, its optimizer's state and its
    averages."""

    def __init__(self, stage: Stage, config: TrainingConfig, world: World):
        self.stage, self.config, self.world = stage, config, world
        self.optimizer = Optimizer(config.optimizer, stage)
        self.parameters = self.optimizer.parameters
        self.ema = Ema(stage, config.ema_halflife_images, config.ema_ramp)
        self.powers = PowerAverages(stage, config.ema_sigma_rel)

    def apply(self, step: int, norm: Tensor, skip: Tensor) -> float:
        """Update by the gradients, whose norm that is, or not where `skip`; the learning rate."""
        before, after = step * self.config.batch, (step + 1) * self.config.batch
        rate = self.config.rate(before)
        self.optimizer.step(rate, norm, self.config.max_grad_norm, skip)
        self.optimizer.zero_grad()
        # Dead vectors of a codebook have no gradients. The averages follow what took their place.
        self.stage.renew(before, self.config.batch, self.world.sum, skip)
        self.ema.update(after)
        self.powers.update(after)
        return rate

    def capture(self, step: int, streak: Tensor) -> TrainState:
        """What a training that did `step` updates, the last `streak` of them skipped, goes on from;
        the tensors are the live ones."""
        parts = {
            "weights": distinct_tensors(self.stage),
            "ema": self.ema.tensors(),
            POWER: self.powers.tensors(),
            "optimizer": self.optimizer.tensors(),
        }
        tensors = {f"{part}/{n}": t.detach() for part, of in parts.items() for n, t in of.items()}
        return TrainState(tensors, step, step * self.config.batch, {"skipped": int(streak)})

    @torch.no_grad()
    def restore(self, state: TrainState) -> None:
        copy_exactly(state.part("weights"), distinct_tensors(self.stage), "the checkpoint")
        self.ema.load(state.part("ema"), state.images_seen)
        self.powers.load(state.part(POWER), state.images_seen)
        self.optimizer.load(state.part("optimizer"))


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
    """Whether this worker was asked to stop; all of them know with the loss of that update."""
    break_off: Callable[[], bool] = lambda: False
    """The same, asked while workers measure or draw: all of them as often."""
    restarts: bool = False
    """Whether somebody starts a worker anew that ends."""

    def breaks_off(self) -> bool:
        """Whether any worker was asked to stop, the same to all, which come here together; who
        waits for another hears that it lives."""
        asked = self.break_off()
        if self.size == 1:
            return asked
        return bool(self.sum(torch.tensor(float(asked), device=self.device)))


@dataclass
class Reached:
    """Where a training stands."""

    step: int
    images_seen: int
    images: int
    """In an update, over all workers."""
    ema: Ema
    capture: Callable[[], TrainState]

    @property
    def state(self) -> TrainState:
        """What a checkpoint needs; its tensors are the live ones, so save it before going on."""
        return self.capture()

    def passed(self, images: int) -> bool:
        """Whether the last update reached a multiple of `images`; never for 0."""
        return images > 0 and self.images_seen % images < self.images


@dataclass
class Progress(Reached):
    """One update. Tensors are scalars on the training device; reading them waits for it."""

    loss: Tensor
    """The mean over the global batch."""
    metrics: dict[str, Tensor]
    grad_norm: Tensor
    """Before clipping."""
    skipped: Tensor
    """Whether the update was skipped, because the loss or the norm is not finite, or because too
    many were already, which a host that looks now and then has still to find out."""
    stop: Tensor
    """How many workers were asked to stop, the same to all of them."""
    learning_rate: float
    seconds: float
    data_wait_seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def data_wait_share(self) -> float:
        return self.data_wait_seconds / self.seconds


class Diverged(ArithmeticError):
    """Too many updates in a row were not finite. `keys` names the samples behind them, `step` is
    the last of them, `state` what it would have changed. (Averages have gone on towards the weights
    that stayed, until somebody looked.)"""

    def __init__(
        self, message: str, keys: list[str], step: int = 0, state: TrainState | None = None
    ):
        super().__init__(message)
        self.keys, self.step, self.state = keys, step, state


def _seed(device: torch.device, *parts: int) -> None:
    """What is still drawn from torch's own generators (dropout) becomes a function of `parts`."""
    seed = seed_of(*parts)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
