"""What is measured of stages: on fixed samples, held-out ones if there are some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline import manifest

from .stage import Stage, evaluating, to_tensors


def fixed_rows(samples: int, count: int) -> np.ndarray:
    """`count` indices spread evenly over the samples; all of them when there are fewer."""
    return np.linspace(0, samples - 1, min(count, samples)).round().astype(np.int64)


def fixed_batches(loader: Any, count: int, batch: int) -> Iterator[dict[str, Any]]:
    """`count` samples spread evenly over all (fewer when there are fewer), the same each time, in
    batches of at most `batch` and of pictures of one size.
    """
    for load in fixed_shares(loader, count, batch):
        yield load()


def fixed_shares(loader: Any, count: int, batch: int) -> list[Callable[[], dict[str, Any]]]:
    """What reads each of the `fixed_batches`."""
    shares = []
    for one in alike(loader):
        chosen = fixed_rows(one.samples, -(-count * one.samples // loader.samples))
        split = np.array_split(chosen, -(-len(chosen) // batch))
        shares += [partial(one.rows, rows) for rows in split]
    return shares


def alike(loader: Any) -> tuple[Any, ...]:
    """A loader for the pictures of each size that `loader` has, that with most of them first."""
    from pipeline.load import Loader

    return loader.alike() if isinstance(loader, Loader) else (loader,)


def heldout(loader: Any) -> Any:
    """A loader of the held-out pictures beside those that `loader` trains on; None without any."""
    from pipeline.load import Loader

    if not isinstance(loader, Loader):
        return None
    for version in reversed(manifest.versions(loader.dataset)):
        data = manifest.read(loader.dataset, version)
        if data.split("train") == loader.shards and data.samples("heldout"):
            try:
                return Loader(
                    data,
                    loader.encodings,
                    splits=("heldout",),
                    global_batch=loader.plan.global_batch,
                    seed=loader.seed,
                    captions=loader.captions,
                )
            except ValueError:  # not encoded
                return None
    return None


def flops_per_image(stage: Stage, loader: Any) -> float:
    """What an update computes for an image, forward and backward: products and convolutions.

    Counted as two rows run in eval mode, before anything is compiled or wrapped; what activation
    checkpointing computes again does not count.
    """
    from torch.utils.flop_counter import FlopCounterMode

    first = alike(loader)[0]
    if hasattr(first, "rows"):
        batch = first.rows(np.arange(min(2, first.samples)))
    else:
        with closing(first.batches(0)) as batches:
            batch = next(batches)
    with evaluating(stage), torch.enable_grad():
        with FlopCounterMode(display=False) as counter:
            losses = stage(to_tensors(batch, next(stage.parameters()).device))["loss"]
            forward = counter.get_total_flops()
            losses.float().sum().backward()
        stage.zero_grad(set_to_none=True)
    return min(counter.get_total_flops(), 3 * forward) / len(losses)


def per_sample(x: Tensor) -> Float[Tensor, " batch"]:
    """The mean of each row."""
    return x.flatten(1).mean(1)


def psnr(squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, of mean squared errors in [-1, 1] units."""
    return 10 * torch.log10(4 / squared_error.clamp(min=1e-10))


class ChannelStatistics:
    """Mean and deviation of each channel, accumulated in float64."""

    def __init__(self):
        self.rows, self.shape = 0, ()
        self._count, self._total, self._square = 0, torch.zeros(()), torch.zeros(())

    def add(self, z: Float[Tensor, "batch channel *place"]) -> None:
        self.rows, self.shape = self.rows + len(z), tuple(z.shape[1:])
        values = z.double().cpu().transpose(0, 1).flatten(1)
        self._count += values.shape[1]
        self._total = self._total + values.sum(1)
        self._square = self._square + values.square().sum(1)

    def shift_and_scale(self) -> tuple[Tensor, Tensor]:
        """Float64 [channel] each, with (z - shift) * scale of mean 0 and deviation 1.

        A channel that never changes is not scaled.
        """
        mean = self._total / self._count
        deviation = (self._square / self._count - mean.square()).clamp(min=0).sqrt()
        return mean, torch.where(deviation > 1e-6, 1 / deviation.clamp(min=1e-6), 1.0)
