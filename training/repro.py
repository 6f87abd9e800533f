"""The update at which a training diverged, to be run again: python -m training.repro FILE

FILE is `repro/repro.json` in the stage directory, beside the state that the update would have
changed. The batch is read from the data set again, drawn and cut as it was, on whatever this
machine has. What is told: the loss, the samples whose own is not finite, the first module that made
something not finite out of what was, and the parameters with such gradients. Exit code 1 where the
update is as bad as it was, 0 where it is not.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline import storage

from . import checkpoint, results, sharding
from .loop import Diverged, World, train
from .stage import trainable

if TYPE_CHECKING:
    from .job import Build, Job

FILE = "repro.json"


def leave(job: Job, world: World, error: Diverged) -> str:
    """Write what `again` needs; the command line that runs it. Only rank 0 writes."""
    directory = Path(job.output).absolute() / results.REPRO
    path = directory / FILE
    tensors = error.state.tensors if error.state is not None else {}
    if world.sharded:
        tensors = sharding.gathered(tensors, keep=world.rank == 0)
    if world.rank == 0 and error.state is not None:
        state = replace(error.state, tensors=tensors, step=error.step, numbers={"skipped": 0})
        state.images_seen = error.step * job.training_config().batch
        shutil.rmtree(directory, ignore_errors=True)  # of a divergence before, maybe a later one
        written = checkpoint.save(directory, state, job.fingerprint, keep=checkpoint.Retention(1))
        described = {
            "job": job.to_json(),
            "keys": error.keys,
            "message": str(error),
            "micro_batches": job.micro_batches(world.size),
            "seed": job.seed,
            "state": written.name,
            "step": error.step,
            "torch": torch.__version__,
            "workers": world.size,
        }
        storage.publish_json(str(path), described)
    return f"python -m training.repro {path}"


@dataclass
class Found:
    """What an update came to."""

    step: int
    loss: float
    grad_norm: float
    keys: list[str] = field(default_factory=list)
    """Of the samples whose loss is not finite."""
    module: str = ""
    """The first whose output is not finite though what it was given is."""
    parameters: list[str] = field(default_factory=list)
    """With a gradient that is not finite."""

    @property
    def finite(self) -> bool:
        return bool(torch.tensor([self.loss, self.grad_norm]).isfinite().all())

    @property
    def text(self) -> str:
        lines = [f"step {self.step}: loss {self.loss:g}, gradient norm {self.grad_norm:g}"]
        if self.keys:
            lines.append(f"samples whose loss is not finite: {', '.join(self.keys)}")
        if self.module:
            lines.append(f"the first module that makes it so: {self.module}")
        if self.parameters:
            more = len(self.parameters) - 8
            named = ", ".join(self.parameters[:8]) + (f" and {more} more" if more > 0 else "")
            lines.append(f"parameters whose gradient is not finite: {named}")
        return "\n".join(lines)


def again(file: str | os.PathLike[str], build: Build | None = None) -> Found:
    """Run the update that `file` describes, as one worker."""
    from . import job as jobs
    from .stages import compares_rows

    told = storage.read_json(str(file))
    job = jobs.Job.from_json(told["job"])
    # One of elastic workers computes what all of them would: as many parts as they are. The size of
    # a part would not tell, for 256 rows in 48 parts have six at most, and so have 43 parts.
    parts = 1 if compares_rows(job.kind) else told["micro_batches"]
    as_one = {
        "workers": parts,
        "min_workers": 1,
        "fsdp": False,
        "micro_batch": 0,
        "compile": False,
    }
    job = replace(job, training=job.training | as_one | {"max_skipped": 1})
    state = checkpoint.load(Path(file).parent / told["state"], job.fingerprint)

    world = World(device="cuda" if torch.cuda.is_available() else "cpu")
    stage, loader, _ = (build or jobs.build)(job, world)
    stage.seed = job.seed
    stage.to(world.device)
    found = Found(told["step"], float("nan"), float("nan"))
    updates = train(stage, loader, job.training_config(), world, state)
    with _watched(stage, found), closing(updates):
        progress = next(updates)
        found.loss, found.grad_norm = progress.loss.item(), progress.grad_norm.item()
    return found


@contextmanager
def _watched(stage: nn.Module, found: Found) -> Iterator[None]:
    """Looks at everything that passes through the stage."""

    def module(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(it: nn.Module, given: Any, made: Any) -> None:
            if not found.module and _finite(given) and not _finite(made):
                found.module = f"{name or 'the stage itself'} ({type(it).__name__})"

        return look

    def rows(_: nn.Module, given: Any, made: dict[str, Tensor]) -> None:
        fine = made["loss"].isfinite().tolist()
        keys = given[0].get("key", [])
        found.keys += [key for key, it in zip(keys, fine) if not it]  # noqa: B905 - may have none

    def gradient(name: str) -> Callable[[Tensor], None]:
        def look(parameter: Tensor) -> None:
            if not _finite(parameter.grad) and name not in found.parameters:
                found.parameters.append(name)

        return look

    with ExitStack() as stack:
        hooks = [it.register_forward_hook(module(name)) for name, it in stage.named_modules()]
        hooks.append(stage.register_forward_hook(rows))
        hooks += [
            p.register_post_accumulate_grad_hook(gradient(name))
            for name, p in trainable(stage).items()
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        yield


def _finite(values: Any) -> bool:
    tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point()]
    return all(bool(x.isfinite().all()) for x in tensors)


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        return 2
    found = again(sys.argv[1])
    print(found.text)
    return 0 if found.finite else 1


if __name__ == "__main__":
    sys.exit(main())
