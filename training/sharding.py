"""Tensors of which each worker has some rows: FSDP2 (Zhao et al. 2023; torch's `fully_shard`).

A sharded stage's parameters are DTensors, cut along their first dimension. What is computed from
them row by row (averages, moments, norms) is computed on each worker's own rows, as plain tensors;
a parameter's layout is only put around it to be saved or gathered. An unsharded tensor is all rows
of itself, so one code serves both. torch.distributed.fsdp takes seconds to import: it is, once
something is sharded.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import EllipsisType
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Leave each worker its rows of the trained parameters, in place, and return the module.

    Rank 0's parameters and buffers are everybody's first ones. Whole parameters come back for as
    long as a block (see `blocks`) or, for those of no block, an update needs them. Frozen ones,
    buffers and single numbers stay whole; of the last, `average` sees to the gradients. Those of
    micro-batches add up sharded.
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ValueError(
            f"fsdp: torch {torch.__version__} cannot shard parameters that some of a worker's rows "
            "leave unused: install a newer one, or set training.fsdp to false"
        )
    with torch.no_grad():
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            torch.distributed.broadcast(tensor, 0)
    group = torch.distributed.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    kept = {p for p in module.parameters() if not p.requires_grad or not p.ndim}
    for part in (*blocks(module), module):
        fully_shard(part, mesh=mesh, ignored_params=kept)
    assert isinstance(module, FSDPModule)
    module.set_reduce_scatter_unused_params(True)  # a condition may be absent from all of its rows
    return module


@torch.no_grad()
def average(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of the trained parameters that every worker has whole; one that a
    worker's rows left unused counts as 0."""
    for parameter in parameters:
        if not is_sharded(parameter):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at once: the members of module lists, however these are nested."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from _members(child)
        else:
            yield from blocks(child)


def _members(several: nn.ModuleList) -> Iterator[nn.Module]:
    for member in several:
        if isinstance(member, nn.ModuleList):
            yield from _members(member)
        else:
            yield member


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This worker's rows of a tensor, not copied."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return _dtensor(tensor).to_local()


def rows(tensor: Tensor) -> slice | EllipsisType:
    """Which rows `local(tensor)` are: whole[rows(tensor)] is equal to it."""
    if not is_sharded(tensor):
        return ...
    mesh = _dtensor(tensor).device_mesh
    each = -(-len(tensor) // mesh.size())
    start = min(mesh.get_local_rank() * each, len(tensor))
    return slice(start, min(start + each, len(tensor)))


def like(parameter: Tensor, own: Tensor) -> Tensor:
    """`own`, a value for each of this worker's rows of a parameter, in the parameter's layout."""
    if not is_sharded(parameter) or own.ndim == 0:
        return own
    from torch.distributed.tensor import DTensor

    layout = _dtensor(parameter)
    return DTensor.from_local(
        own,
        layout.device_mesh,
        layout.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor. All workers ask for it together."""
    return _dtensor(tensor).full_tensor() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor's values into one of the same shape that may be sharded."""
    local(target).copy_(source[rows(target)])


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """All rows of the tensors, gathered one after the other into the CPU's memory; where not to
    `keep`, nothing. All workers ask for it together."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        every_row = whole(tensor.detach()).cpu() if is_sharded(tensor) else tensor
        if keep:
            found[name] = every_row
    return found


class Pieces:
    """A tensor whose rows lie in several files. `[slice]` reads those rows, `[...]` all of them."""

    def __init__(self, pieces: Sequence[Tensor]):
        self._pieces = pieces
        self.shape = torch.Size((sum(map(len, pieces)), *pieces[0].shape[1:]))
        self.dtype, self.ndim = pieces[0].dtype, pieces[0].ndim

    def __getitem__(self, wanted: slice | EllipsisType) -> Tensor:
        start, stop = (0, self.shape[0]) if wanted is ... else (wanted.start, wanted.stop)
        found, first = [], 0
        for piece in self._pieces:
            own = slice(max(start - first, 0), max(stop - first, 0))
            found.append(piece[own])
            first += len(piece)
        return torch.cat(found)


def _dtensor(tensor: Tensor) -> Any:
    return tensor
