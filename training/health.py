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


def looks_every(device: torch.device) -> int:
    """At every how many updates the host looks: on a GPU it would wait for each of them."""
    return 1 if device.type == "cpu" else 16


class Health:
    """Counts the updates in a row that were not finite, on the device; none of them is applied.
    Neither is any that follows too many, so a host that looks only now and then stops the same
    trainings, with the same weights, as one that looks at each update."""

    def __init__(self, config: TrainingConfig, device: torch.device, world: World, streak: int = 0):
        self.config, self.world, self.every = config, world, looks_every(device)
        # More were skipped where fewer may be now, or nobody looked: the next update decides.
        self.streak = torch.tensor(min(streak, config.max_skipped), device=device)
        # (the step, its share, whether not finite) of the batches that could be to blame
        self._recent: deque[tuple[int, Share, Tensor]] = deque(
            maxlen=self.every + config.max_skipped
        )

    def skip(self, step: int, share: Share, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether not to apply this update, a bool scalar. `loss` and `norm` are the same on all
        workers, so all of them skip, or diverge, together."""
        over = self.streak > self.config.max_skipped
        bad = ~(loss.isfinite() & norm.isfinite() | over)
        self.streak = torch.where(over, self.streak, (self.streak + 1) * bad)
        self._recent.append((step, share, bad))
        return bad | over

    def diverged(self, step: int) -> bool:
        """Whether too many were skipped, if this is an update at which the host looks."""
        looking = step % self.every == 0 or step == self.config.steps - 1
        return looking and int(self.streak) > self.config.max_skipped

    def blamed(self) -> Blamed:
        """The updates in a row that were too many. All workers ask for it together."""
        bad = [(step, share) for step, share, bad in self._recent if bad][-int(self.streak) :]
        rows = self._of_all([share.rows() for _, share in bad])
        culprits = [key for key, finite in rows if not finite]
        keys = culprits or [key for key, _ in rows]
        who = "Samples with such a loss" if culprits else "Their samples"
        step, _ = bad[-1]
        return Blamed(self._message(step, who, keys), keys, step)

    def _of_all(self, own: list[list[tuple[str, bool]]]) -> list[tuple[str, bool]]:
        """All workers' rows, update by update."""
        updates = zip(*self.world.gather(own), strict=True)
        return [row for workers in updates for rows in workers for row in rows]

    def _message(self, step: int, who: str, keys: list[str]) -> str:
        config = self.config
        more = f" and {len(keys) - 16} more" if len(keys) > 16 else ""
        return (
            f"step {step} ({step * config.batch} images): loss or gradient was not finite in "
            f"{int(self.streak)} updates in a row ({config.max_skipped} may be skipped); none of "
            f"them was applied. {who}: {', '.join(keys[:16])}{more}. Look at these samples, or "
            f"lower learning_rate ({config.learning_rate:g}) or max_grad_norm "
            f"({config.max_grad_norm:g})"
        )
