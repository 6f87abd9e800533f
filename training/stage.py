"""A stage is what the loop trains: a module that maps a batch to one loss per sample.

The loop, the checkpoint and the workers know nothing else of a model. Per-sample losses, because
the mean is taken over the *global* batch: a worker cannot take it, it sees only its own rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor, nn

from .sharding import fill

Batch = dict[str, Any]  # arrays become tensors; lists (captions, keys, labels) and numbers stay


class Stage(nn.Module):
    """Subclass it: set `kind`, build the modules from a frozen config, give `forward`.

    Parameters that are trained require grad; frozen ones do not, and stay as they are. What is
    measured once (a latent scale, a mean) belongs into a buffer: checkpoints and exports then
    carry it. Whatever must not be exported (another stage, held for previews) must stay out of
    `state_dict`.
    """

    kind: str = ""
    compares_rows: bool = False
    """Whether a row's loss depends on the other rows of the global batch: then it is not cut into
    micro-batches."""
    seed: int = 0
    """The run's seed, set by the job: a stage draws noise from (seed, purpose,
    batch["position"])."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config

    def exported(self) -> dict[str, Tensor]:
        """What a finished stage consists of, by name, not copied: all but what only training
        needs."""
        return distinct_tensors(self)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`{"loss": [rows], ...}`: one loss per row of this worker; other entries are detached
        scalars to log."""
        raise TypeError(f"{type(self).__name__} defines no forward(batch) -> {{'loss': [rows]}}")

    def renew(
        self, images_seen: int, images: int, total: Callable[[Tensor], Tensor], skip: Tensor
    ) -> None:
        """After the update by the images from `images_seen` on, and before averages follow it: put
        in place what gradients do not move. `total` sums a tensor over the workers, all of which
        come here; where `skip` is true the update was not applied, and nothing may change."""

    def prepare(self, loader: Any) -> None:
        """Measure what must be known before the first step; each worker measures the same."""

    def adapt(self, loader: Any) -> None:
        """After a warm start: replace what the parent measured and this data decides anew."""

    def finish(self, loader: Any) -> dict[str, Any]:
        """Measure the trained stage (it holds its EMA weights); JSON, kept in stage.json under
        "measured"."""
        return {}

    def heldout_loss(self, batch: Batch) -> Tensor:
        """[rows]: by what a training's checkpoints are compared; a function of weights and batch
        alone, taken in eval mode."""
        return self(batch)["loss"]

    def settled(self, loader: Any) -> AbstractContextManager[Any]:
        """Inside, what a stage knows of the pictures that it saw in training (running statistics)
        is what the weights that it has now make of some of them; afterwards it is as before. The
        same on each worker, whatever that has seen: of one alone it is in the checkpoint."""
        return nullcontext()

    def heldout_bands(self, batch: Batch) -> tuple[Tensor, tuple[str, ...]] | None:
        """(which band of noise levels `heldout_loss` looks at each row in, int64 [rows]; the bands'
        names), or None where there is no noise. Bands are as likely as each other."""
        return None

    def preview(
        self, loader: Any, seed: int, beat: Callable[[], None] = lambda: None
    ) -> np.ndarray | None:
        """Pictures that show where the training stands, uint8 [n, height, width, 3], or None. Who
        draws in steps calls `beat` after each: the whole may take longer than workers wait for a
        sign of life."""
        return None


def telling(network: Callable[..., Any], beat: Callable[[], None]) -> Callable[..., Any]:
    """The network; `beat` is called after each of its calls."""

    def called(*given: Any, **more: Any) -> Any:
        out = network(*given, **more)
        beat()
        return out

    return called


def to_tensors(batch: Mapping[str, Any], device: torch.device | str = "cpu") -> Batch:
    """The batch with its arrays as tensors on `device`, float16 (how shards store it) as float32.

    An upload from pinned memory overlaps with the computation before it.
    """
    device = torch.device(device)

    def convert(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        tensor = torch.from_numpy(value if value.flags.writeable else value.copy())
        if device.type == "cuda":
            tensor = tensor.pin_memory().to(device, non_blocking=True)
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    return {name: convert(value) for name, value in batch.items()}


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer once, under its first name (tied weights have
    several), not copied."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    return {name: t for name, t in state.items() if first.setdefault(id(t), name) == name}


@torch.no_grad()
def copy_exactly(source: Mapping[str, Tensor], target: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors by name. ValueError names those that only one side has, or in another shape."""
    wrong = [
        f"{name} (it has {_shape(source, name)}, wanted {_shape(target, name)})"
        for name in sorted(source.keys() | target.keys())
        if _shape(source, name) != _shape(target, name)
    ]
    if wrong:
        raise ValueError(
            f"{what} is of another network: {', '.join(wrong[:4])}"
            f"{f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''}; "
            "use the config it was trained with, or start over in a new directory"
        )
    for name, tensor in target.items():
        fill(tensor, source[name])


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return str(list(tensors[name].shape)) if name in tensors else "none"


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def over_workers(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the workers that train together, for losses that look across the
    batch; not for what one worker does alone."""
    world = torch.distributed
    if not (world.is_available() and world.is_initialized()):
        return tensor
    total = tensor.clone()
    world.all_reduce(total)
    return total


@contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; afterwards each submodule is in the mode it was in."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield module
    finally:
        for m, mode in modes.items():
            m.training = mode


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a function of its parts alone."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
