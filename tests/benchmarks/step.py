"""What an update takes beside the network: python -m tests.benchmarks.step [--pairs N]

Ours is the whole of it: the plan, loading from encoded shards on disk, sampling the latents, times
and noise by position, dropped captions, forward, backward, clipping, AdamW, averages, metrics and
their log lines. Bare is a plain PyTorch loop over batches that are tensors in memory already: noise
and times from torch's generator, the same network, forward, backward, clip_grad_norm_, the fused
AdamW, averages by lerp. The network is a U-Net of 3.9 M parameters on latents of 4 x 8 x 8 with
text, the batch 64, in fp32. They take turns update by update, now the one first and now the other;
the ratio is that of the bare seconds to ours, the median over the pairs; that of the processor's
seconds tells more than the clock on a busy machine.

Then both on two workers of one thread each, over gloo: theirs is DistributedDataParallel. What two
workers gain over one, ours over theirs, is the last line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline import manifest, storage
from pipeline.encode import encode
from pipeline.execute import Executor
from pipeline.load import Loader
from pipeline.schema import EncoderSpec, Encoding
from pipeline.shards import write_shard
from tests.benchmarks import targets
from tests.benchmarks.loader import numbered
from training.config import TrainingConfig
from training.denoising import BaseStage, BaseStageConfig
from training.distributed import of_process_group
from training.job import Speed, Window
from training.loop import World, train
from training.networks import ContextConfig, DenoiserConfig, UNetConfig
from training.stage import to_tensors

ROOT = Path(__file__).resolve().parents[2]
WIDTH, PROCESSOR = 64, ", processor"
RATIO, GAIN = 0.98, 0.9
"""Targets: bare / ours of one worker; what two workers gain, ours over theirs."""
NETWORK = UNetConfig(
    channels=56,
    embedding=128,
    channel_mult=(1, 2),
    head_width=28,
    contexts=(ContextConfig("text", 64, 64),),
)
SPECS = [
    EncoderSpec("latents", "image", "latents", {"batch": 256}, side=8),
    EncoderSpec("text", "text", "text", {"batch": 256}),
]


def write(folder: str, samples: int, shape: tuple[int, ...] = (8, 8, 8), text: bool = True) -> None:
    """A data set whose moments and texts are noise, encoded by `pipeline.encode`."""

    def build(spec: EncoderSpec) -> Callable[..., Any]:
        rng = np.random.default_rng(0)

        def latents(pixels: np.ndarray) -> dict[str, np.ndarray]:
            return {"moments": rng.standard_normal((len(pixels), *shape)).astype(np.float16)}

        def texts(captions: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
            tokens = [rng.standard_normal((rng.integers(8, 24), WIDTH)) for _ in captions]
            pooled = rng.standard_normal((len(captions), WIDTH))
            return [it.astype(np.float16) for it in tokens], pooled.astype(np.float16)

        return latents if spec.kind == "image" else texts

    made = write_shard(map(numbered, range(samples)), folder, "train")
    manifest.publish(manifest.Manifest(storage.absolute(folder), 1, None, (made,)))
    encode(manifest.read(folder, 1), SPECS[: 1 + text], build, Executor(kind="local"))


def loader(folder: str, batch: int, world: World = World(), text: bool = True) -> Loader:
    encodings = [Encoding.at(folder, it.name, it.kind, it.fingerprint) for it in SPECS[: 1 + text]]
    return Loader(
        manifest.read(folder, 1),
        encodings,
        global_batch=batch,
        seed=0,
        worker=world.rank,
        workers=world.size,
        micro_batches=world.size,
    )


def stage_of(network: DenoiserConfig, batches: Loader, device: Any = "cpu") -> BaseStage:
    torch.manual_seed(0)
    stage = BaseStage(BaseStageConfig(network=network, measured_pictures=256)).to(device)
    stage.prepare(batches)
    return stage


def ours(
    stage: BaseStage, batches: Loader, config: TrainingConfig, world: World
) -> Iterator[dict[str, Any]]:
    """Hands out the newest log line after each update."""
    window, line = Window({}, Speed(1.0, None), world.device), dict[str, Any]()
    with closing(train(stage, batches, config, world)) as updates:
        for progress in updates:
            window.add(progress)
            if progress.passed(config.log_images):
                line = json.loads(json.dumps(window.close(progress)))
            yield line


def bare(
    stage: BaseStage, batches: Loader, config: TrainingConfig, world: World
) -> Iterator[torch.Tensor]:
    """Hands out the loss of each update."""
    kept = [to_tensors(batches.batch(step), world.device) for step in range(8)]
    network = stage.network.train()
    model: Any = network
    if world.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(network)
    if config.compile:
        model.compile()
    live = list(network.parameters())
    averages = [p.detach().clone() for p in live]
    optimizer = torch.optim.AdamW(
        live, config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    decay = 0.5 ** (config.batch / config.ema_halflife_images)
    device = torch.device(world.device).type
    step = 0
    while True:
        batch = kept[step % len(kept)]
        step += 1
        mean, logvar = batch["moments"].chunk(2, dim=1)
        x0 = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        eps, t = torch.randn_like(x0), torch.rand(len(x0), device=x0.device)
        x = torch.lerp(x0, eps, t[:, None, None, None])
        cond = {name: it for name, it in batch.items() if name.startswith("text_")}
        cond["keep"] = torch.rand_like(t) >= 0.1
        with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
            out = model(x, t, cond)
        loss = F.mse_loss(out.float(), eps - x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(live, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, live, 1 - decay)
        yield loss.detach()


def measure(folder: str, pairs: int, world: World) -> dict[str, list[float]]:
    """Seconds of each update of both, a few at the start left out."""
    config = TrainingConfig(images=10**9, batch=64, log_images=640)
    batches = loader(folder, 64, world)
    stages = [stage_of(NETWORK, batches) for _ in range(2)]
    parameters = sum(p.numel() for p in stages[0].network.parameters())
    contenders: dict[str, Iterator[Any]] = {
        "bare": bare(stages[0], batches, config, world),
        "ours": ours(stages[1], batches, config, world),
    }
    took = {name + of: list[float]() for name in contenders for of in ("", PROCESSOR)}
    for turn in range(-4, pairs):
        for name in list(contenders)[:: 1 if turn % 2 else -1]:
            start, before = time.perf_counter(), time.process_time()
            next(contenders[name])
            if turn >= 0:
                took[name].append(time.perf_counter() - start)
                took[name + PROCESSOR].append(time.process_time() - before)
    return took | {"parameters": [parameters]}


def ratios(took: dict[str, list[float]], of: str) -> list[float]:
    return sorted(b / o for b, o in zip(took["bare" + of], took["ours" + of], strict=True))


def inside(folder: str, pairs: int, rank: int, size: int) -> None:
    torch.set_num_threads(1)
    if size == 1:
        print(json.dumps(measure(folder, pairs, World())))
        return
    where = f"file://{folder}.group"
    torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=size)
    took = measure(folder, pairs, of_process_group(rank, size, torch.device("cpu")))
    torch.distributed.destroy_process_group()
    print(json.dumps(took))


def run(folder: str, pairs: int, size: int) -> dict[str, list[float]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.benchmarks.step", "--pairs", str(pairs)]
            + ["--inside", folder, str(rank), str(size)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip
    told = [it.communicate()[0] for it in started]
    if any(it.returncode for it in started):
        raise SystemExit(f"a worker of {size} failed")
    return json.loads(told[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--inside", nargs=3, metavar=("FOLDER", "RANK", "SIZE"), help="(a worker)")
    options = parser.parse_args()
    if options.inside:
        folder, rank, size = options.inside
        inside(folder, options.pairs, int(rank), int(size))
        return
    gained: dict[str, list[float]] = {"bare": [], "ours": []}
    with tempfile.TemporaryDirectory(prefix="darkroom-") as temporary:
        folder = str(Path(temporary, "data"))
        write(folder, options.samples)
        for size in (1, 2):
            took = run(folder, options.pairs, size)
            million = took["parameters"][0] / 1e6
            print(f"{size} worker{'s' * (size > 1)}, {million:.1f} M parameters, batch 64, "
                  f"{options.pairs} pairs; load {os.getloadavg()[0]:.1f}")  # fmt: skip
            for name in ("bare", "ours"):
                seconds = statistics.median(took[name])
                gained[name].append(seconds)
                print(f"{name:6s} {1000 * seconds:8.1f} ms {64 / seconds:8.1f} images/s")
            for of in ("", PROCESSOR):
                found = ratios(took, of)
                ratio = statistics.median(found)
                aim = f"; {targets.at_least(ratio, RATIO)}" if size == 1 else ""
                print(
                    f"bare / ours{of}: {ratio:.3f} "
                    f"(half of them {found[len(found) // 4]:.3f} to {found[-len(found) // 4]:.3f})"
                    f"{aim}"
                )
    speedup = {name: one / two for name, (one, two) in gained.items()}
    ratio = speedup["ours"] / speedup["bare"]
    print(
        f"two workers for one: ours {speedup['ours']:.2f} times, bare {speedup['bare']:.2f}; "
        f"ours / bare {ratio:.3f}; {targets.at_least(ratio, GAIN)}"
    )


if __name__ == "__main__":
    main()
