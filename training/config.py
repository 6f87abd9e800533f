"""How a stage is trained. Whatever is counted, is counted in images.

The loop reads the half of it that an update depends on; when to log, save, measure and draw is for
the job, how many workers for `training.distributed`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Literal

import torch

from . import accelerators
from .checkpoint import Retention
from .ema import gamma
from .optimizer import AdamWConfig, OptimizerConfig


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
    """Without an update for so long, all stacks are dumped; workers under Ray and commands are then
    started again, who trains in a process of his own is told and no more."""
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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one; but a training that was begun on the one kind of device does
    not go on on the other. cpu, cuda: there, wherever it was before."""
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
            "device": ("auto", "cpu", "cuda"),
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
