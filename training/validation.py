"""The held-out loss of a training's averages while it goes on, and whether it still falls.

All workers measure together, each its share of the batches, and know the sums: so they decide
alike. Of a sharded stage the first one measures, and the others count its batches, which is how
they know that it lives. What was decided by travels in checkpoints, and a resumed training decides
the same.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from . import measuring
from .checkpoint import HELDOUT_LOSS
from .config import TrainingConfig
from .loop import Reached, World
from .stage import Stage, evaluating, to_tensors
from .supervision import BrokenOff

BY_TIME = "heldout_loss_by_t/"
"""What the names of the losses by noise level begin with; then comes the time in the middle."""
ALONE = World()
log = logging.getLogger(__name__)


def heldout_losses(
    stage: Stage,
    unseen: Any,
    count: int,
    batch: int,
    world: World = ALONE,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The mean `stage.heldout_loss` of `count` samples spread evenly over the held-out ones, at
    most `batch` at once; and for stages of noise its mean in each band of noise levels.

    Workers do as many batches as each other: what they have too few of they repeat uncounted. Of a
    sharded stage the first one, which has a whole one, does all of them. `beat` is called after
    each: the time between is that of a batch, wherever it is computed. BrokenOff, by all workers,
    after the batch during which one of them was asked to stop.
    """
    device = next(stage.parameters()).device
    shares = measuring.fixed_shares(unseen, count, batch)
    if world.sharded:
        own, most = range(len(shares) if world.rank == 0 else 0), len(shares)
    else:
        own, most = range(world.rank, len(shares), world.size), -(-len(shares) // world.size)
    names: tuple[str, ...] = ()
    sums = torch.zeros(1, 2, dtype=torch.float64, device=device)  # of losses, of rows
    with evaluating(stage):
        for turn in range(most):
            counts = turn < len(own)
            if counts or not world.sharded:
                some = to_tensors(shares[own[turn] if counts else 0](), device)
                losses = stage.heldout_loss(some).double()
                bands = stage.heldout_bands(some)
                if bands is not None and not names:
                    names = bands[1]
                    sums = torch.cat([sums, sums.new_zeros(len(names), 2)])
                if counts:
                    pairs = torch.stack([losses, torch.ones_like(losses)], 1)
                    sums[0] += pairs.sum(0)
                    if bands is not None:
                        sums[1:].index_add_(0, bands[0].to(device), pairs)
            broken_off = world.breaks_off()
            beat()
            if broken_off:
                raise BrokenOff
    if world.sharded:
        names, totals = world.gather((names, sums.tolist()))[0]
    else:
        totals = world.sum(sums).tolist()
    labels = (HELDOUT_LOSS, *(BY_TIME + name for name in names))
    return {
        label: total / rows for label, (total, rows) in zip(labels, totals, strict=True) if rows
    }


class Validation:
    """When a training's averages are held against `unseen`, and what came of it so far. `averaged`
    gives the stage with them, or the first worker alone a whole one."""

    def __init__(
        self,
        averaged: Callable[[Reached], AbstractContextManager[Stage]],
        unseen: Any,
        config: TrainingConfig,
        world: World,
        numbers: dict[str, Any],
    ):
        self.averaged, self.unseen, self.config, self.world = averaged, unseen, config, world
        known = numbers.get("validation", {})
        self.least: float | None = known.get("least")
        self.least_at: int = known.get("least_at", 0)
        self.judged_at: int = known.get("judged_at", 0)

    @property
    def over(self) -> bool:
        """Whether the loss has not fallen for longer than one has patience."""
        patience = self.config.patience_images
        return patience > 0 and self.judged_at - self.least_at >= patience

    def due(self, progress: Reached) -> bool:
        """Whether to measure after this update."""
        config = self.config
        if self.unseen is None:
            return False
        at_checkpoints = config.keep_best or not config.heldout_images
        return (
            progress.step == config.steps
            or progress.passed(config.heldout_images)
            or (at_checkpoints and progress.passed(config.checkpoint_images))
        )

    def measure(self, progress: Reached, beat: Callable[[], None]) -> dict[str, float | None]:
        """The losses of the averages now, None for one that is not finite. BrokenOff where a worker
        was asked to stop meanwhile: it is as if this had not been begun."""
        config, world = self.config, self.world
        with self.averaged(progress) as stage:
            # A loss that compares rows is another one for other rows: not as many as a worker has.
            rows = config.batch if stage.compares_rows else config.rows_at_once
            found = heldout_losses(stage, self.unseen, config.heldout_pictures, rows, world, beat)
        loss, at = found[HELDOUT_LOSS], progress.images_seen
        log.info("%s: held-out loss %g at %d images", stage.kind, loss, at)
        if progress.passed(config.heldout_images):  # others depend on when checkpoints are written
            self.judged_at = at
            least = math.inf if self.least is None else self.least
            margin = 0.0 if self.least is None else config.patience_margin * abs(self.least)
            if loss < least - margin:
                self.least, self.least_at = loss, at
        return {name: it if math.isfinite(it) else None for name, it in found.items()}

    def numbers(self) -> dict[str, Any]:
        """What `Validation(..., numbers)` goes on from, JSON."""
        if not self.judged_at:
            return {}
        told = {"least": self.least, "least_at": self.least_at, "judged_at": self.judged_at}
        return {"validation": told}
