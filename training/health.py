"""Whether a training's numbers are still numbers, and which samples are to blame when not."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .config import TrainingConfig

if TYPE_CHECKING:
    from .loop import Share, World


class Blamed(NamedTuple):
    """What there is to say of updates that were not finite."""

    message: str
    keys: list[str]
    """Of the samples behind them."""
    step: int
    """The last of them."""


class Health:
    """Counts the updates in a row that were not finite, on the device. The host looks at each one
    on a CPU, at every sixteenth on a GPU; meanwhile none of them is applied."""

    def __init__(self, config: TrainingConfig, device: torch.device, world: World, streak: int = 0):
        self.config, self.world = config, world
        self.every = 1 if device.type == "cpu" else 16
        self.streak = torch.tensor(streak, device=device)
        self._worst = self.streak
        # (the step, its share, whether skipped) of the batches that could be to blame
        self._recent: deque[tuple[int, Share, Tensor]] = deque(
            maxlen=self.every + config.max_skipped
        )

    def skip(self, step: int, share: Share, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether not to apply this update, a bool scalar. `loss` and `norm` are the same on all
        workers, so all of them skip, or diverge, together."""
        skip = ~(loss.isfinite() & norm.isfinite())
        self.streak = (self.streak + 1) * skip
        self._worst = torch.maximum(self._worst, self.streak)
        self._recent.append((step, share, skip))
        return skip

    def diverged(self, step: int) -> bool:
        """Whether too many were skipped, if this is an update at which the host looks."""
        looking = step % self.every == 0 or step == self.config.steps - 1
        return looking and int(self._worst) > self.config.max_skipped

    def blamed(self, step: int) -> Blamed:
        """The updates that were skipped until `step`. All workers ask for it together."""
        skipped = [(at, share) for at, share, skip in self._recent if skip]
        last = max((at for at, _ in skipped), default=step)
        rows = self._of_all([share.rows() for _, share in skipped])
        culprits = [key for key, finite in rows if not finite]
        keys = culprits or [key for key, _ in rows]
        who = "Samples with such a loss" if culprits else "Their samples"
        return Blamed(self._message(step, who, keys), keys, last)

    def _of_all(self, own: list[list[tuple[str, bool]]]) -> list[tuple[str, bool]]:
        """All workers' rows, update by update."""
        updates = zip(*self.world.gather(own), strict=True)
        return [row for workers in updates for rows in workers for row in rows]

    def _message(self, step: int, who: str, keys: list[str]) -> str:
        config = self.config
        more = f" and {len(keys) - 16} more" if len(keys) > 16 else ""
        return (
            f"step {step} ({step * config.batch} images): loss or gradient was not finite in "
            f"{int(self._worst)} updates in a row ({config.max_skipped} may be skipped); none of "
            f"them was applied. {who}: {', '.join(keys[:16])}{more}. Look at these samples, or "
            f"lower learning_rate ({config.learning_rate:g}) or max_grad_norm "
            f"({config.max_grad_norm:g})"
        )
