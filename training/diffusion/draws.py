"""Random numbers as a function: draw = f(seed, purpose, global position), with no state to carry.

A row's draws depend on its own position alone, so any number of workers, any split of a batch and
any resumed run see the same ones. Each element is SplitMix64's finaliser over the hashed position
plus the hashed column: about a dozen vectorised 64-bit integer operations, the same on every
device.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

Position = Int[Tensor, " batch"]


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own carries the sign along."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(words: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014); products wrap modulo 2^64."""
    words = (words ^ _shifted(words, 30)).mul_(_MULTIPLIERS[0])
    words = words.bitwise_xor_(_shifted(words, 27)).mul_(_MULTIPLIERS[1])
    return words.bitwise_xor_(_shifted(words, 31))


@functools.lru_cache(maxsize=4096)
def _key(seed: int, purpose: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _words(seed: int, purpose: str, position: Position, count: int) -> Int[Tensor, "batch count"]:
    rows = _mix(position.long() * _GOLDEN + _key(seed, purpose))
    columns = _mix(torch.arange(1, count + 1, device=position.device) * _GOLDEN)
    return _mix(rows[:, None] + columns)


def uniform(
    seed: int, purpose: str, position: Position, shape: Sequence[int] = ()
) -> Float[Tensor, "batch ..."]:
    """Float32 draws [batch, *shape] in the open interval (0, 1), multiples of 2^-24."""
    words = _words(seed, purpose, position, math.prod(shape))
    return ((_shifted(words, 41) + 0.5) * 2.0**-23).reshape(-1, *shape)


def normal(
    seed: int, purpose: str, position: Position, shape: Sequence[int] = ()
) -> Float[Tensor, "batch ..."]:
    """Standard normal float32 draws [batch, *shape] (Box & Muller 1958, both of each pair used)."""
    count = math.prod(shape)
    words = _words(seed, purpose, position, (count + 1) // 2)
    radius = ((_shifted(words, 24) + 0.5) * 2.0**-40).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_((1 << 24) - 1) * (2 * math.pi * 2.0**-24)
    pair = torch.cat([radius * angle.cos(), radius * angle.sin_()], dim=1)
    return pair[:, :count].reshape(-1, *shape)


def stratified(seed: int, purpose: str, position: Position) -> Float[Tensor, " batch"]:
    """Uniform draws spread evenly over any run of positions: multiples of the golden ratio, mod 1.

    A batch of n has a discrepancy of order log(n)/n rather than n^-1/2, as with the strata of
    Kingma et al. 2021, but no worker needs to know the batch. Over seeds each draw is uniform on
    (0, 1).
    """
    words = position.long() * _GOLDEN + _key(seed, purpose)
    return (_shifted(words, 41) + 0.5) * 2.0**-23


def stream(seed: int, purpose: str, position: Position) -> Callable[[Tensor], Tensor]:
    """The `noise` of a sampler: call k gives normal draws like x for purpose/k, row by row."""
    calls = iter(range(1 << 62))

    def noise(x: Tensor) -> Tensor:
        return normal(seed, f"{purpose}/{next(calls)}", position.to(x.device), x.shape[1:]).to(x)

    return noise
