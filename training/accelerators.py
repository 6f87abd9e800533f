"""What trainings compute on: published rates by name, and a probe of what is here.

Names are known without looking at a device, so that a wrong one is refused before anything starts.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

PROBE = "probe"
"""Stands for a rate that is timed at the start."""
RESERVE = 0.1
"""Share of a device's memory that is left to its context and to fragments."""
UTILISATION = 0.4
"""Share of the published peak that products of matrices reach in a training: Llama 3 had 0.38 to
0.43 of an H100's (Dubey et al. 2024, table 4)."""
PROBED_UTILISATION = 0.6
"""Share of the rate that a probe finds for one large product. With it ten trainings of 1 to 58 M
parameters on a CPU core, in fp32 and bf16, had 0.45 to 1.5 times the images per second planned."""


@dataclass(frozen=True)
class Accelerator:
    """What one worker computes on."""

    name: str
    matmul: Mapping[str, float]
    """FLOP/s of dense matrix products, by precision."""
    bandwidth: float
    """Bytes/s to and from its memory."""
    memory: float
    """Bytes."""
    utilisation: float = UTILISATION
    measured: bool = False
    """By `probe`, here and now."""

    @property
    def precision(self) -> Literal["bf16", "fp32"]:
        """What "auto" means on it: the faster one."""
        return "bf16" if self.matmul["bf16"] > self.matmul["fp32"] else "fp32"

    @property
    def usable(self) -> float:
        return self.memory * (1 - RESERVE)


def _published(name: str, bf16: float, fp32: float, bandwidth: float, memory: float) -> Accelerator:
    return Accelerator(
        name, {"bf16": bf16 * 1e12, "fp32": fp32 * 1e12}, bandwidth * 1e9, memory * 1e9
    )


ACCELERATORS: Mapping[str, Accelerator] = {
    it.name: it
    for it in (
        _published("a100", 312, 19.5, 2039, 80),
        _published("h100", 989.4, 66.9, 3352, 80),
        _published("h200", 989.4, 66.9, 4800, 141),
        _published("b200", 2250, 75, 7700, 180),
        _published("l4", 121, 30.3, 300, 24),
        _published("l40s", 362, 91.6, 864, 48),
        _published("rtx4090", 165.2, 82.6, 1008, 24),
        _published("mi300x", 1307.4, 163.4, 5300, 192),
    )
}
"""Dense peaks in TFLOP/s (bf16 with float32 sums; fp32 without TF32), GB/s and GB, as their makers
publish them: the data sheets of A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (an eighth of it), L4,
L40S and MI300X, and NVIDIA's Ada white paper for the RTX 4090. Half of what is advertised "with
sparsity"."""


def accelerator(name: str | None) -> Accelerator:
    """One of ACCELERATORS, or what this machine has, probed. ValueError names the nearest one."""
    if name is None:
        return probe()
    if name not in ACCELERATORS:
        nearest = _nearest(name, ACCELERATORS)
        raise ValueError(f"no device {name!r}{nearest}; without one, this machine is probed")
    return ACCELERATORS[name]


def check(name: str) -> None:
    """ValueError, with the nearest one, unless `matmul_rate` knows the name."""
    if name and name not in (known := (*ACCELERATORS, PROBE)):
        raise ValueError(f"accelerator: there is no {name!r}{_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), known, 1, 0.4)
    asked = f"; did you mean {near[0]!r}?" if near else ""
    return f"{asked} (known: {', '.join(known)})"


def chosen(asked: str, cuda: bool) -> str:
    """What this machine trains on, "cpu" or "cuda", where a config's `device` is `asked`.
    ValueError where that is not here."""
    if asked == "cuda" and not cuda:
        raise ValueError(
            "training.device is cuda, and torch finds no GPU here (torch.cuda.is_available() is "
            "False): mend that, or set training.device=cpu"
        )
    return asked if asked != "auto" else ("cuda" if cuda else "cpu")


def check_same(began: str | None, found: str, asked: str, where: str) -> None:
    """ValueError where a training that computed on `began` so far would go on on `found`, and
    nobody `asked` for that kind of device."""
    if began and found not in (began, asked):
        cure = f"set training.device={found} to go on there, or training.device={began} to stay"
        if began == "cuda":
            cure = (
                f"bring the GPU or its driver back, or set training.device={found} to go on there"
            )
        raise ValueError(f"{where}: trained on {began} so far, and would go on on {found}: {cure}")


def native_precision(device: torch.device | str) -> Literal["bf16", "fp32"]:
    """bf16 where the device has the instructions. Where it is emulated it is several times slower
    than fp32."""
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if fast else "fp32"


def matmul_rate(name: str, precision: str, device: torch.device | str) -> float | None:
    """FLOP/s of matrix products on one worker's device: the published ones of `name`, those that a
    PROBE finds now, or, without a name, those of a GPU in ACCELERATORS; else None."""
    if name:
        return (probe() if name == PROBE else accelerator(name)).matmul[precision]
    if torch.device(device).type != "cuda":
        return None
    words = re.split(r"[\s_-]+", torch.cuda.get_device_name(device).lower())
    words += [a + b for a, b in itertools.pairwise(words)]  # of "RTX 4090"
    known = next((ACCELERATORS[word] for word in words if word in ACCELERATORS), None)
    return known.matmul[precision] if known else None


def probe(seconds: float = 0.4) -> Accelerator:
    """This machine's device, timed for `seconds` at each of bf16 and fp32 products and a copy."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")

    def rate(work: Callable[[], object], amount: float) -> float:
        """The best of several: the machine may have other work."""
        work()
        best, end = 0.0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            work()
            if cuda:
                torch.cuda.synchronize()
            best = max(best, amount / (time.perf_counter() - started))
        return best

    # Constant operands let a GPU draw less power, and clock higher, than a training does. Their
    # generator is their own: whoever trains has seeded the usual one.
    draws = torch.Generator(device).manual_seed(0)
    matmul = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        if not cuda and name == "bf16" and native_precision(device) != name:
            side = 256  # emulated, a product of 1024 takes seconds
        else:
            side = 8192 if cuda else 1024
        x = torch.randn(side, side, dtype=dtype, device=device, generator=draws)
        matmul[name] = rate(lambda x=x: x @ x, 2.0 * side**3)
    some = torch.randn(2**20, device=device, generator=draws)
    source = some.repeat(2**8 if cuda else 2**5)  # far beyond any cache
    target = torch.empty_like(source)
    moved = rate(lambda: target.copy_(source), 2.0 * source.nbytes)
    if cuda:
        memory = torch.cuda.get_device_properties(0).total_memory
        name = torch.cuda.get_device_name(0)
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        name = f"this machine's CPU, {torch.get_num_threads()} threads"
    return Accelerator(name, matmul, moved, memory, PROBED_UTILISATION, measured=True)
