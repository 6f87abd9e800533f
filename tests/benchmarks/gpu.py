"""What share of a GPU's products a training uses: python -m tests.benchmarks.gpu

DiT-XL/2 and DiT-B/2 (Peebles & Xie 2023) learn latents of 256 px, 4 x 32 x 32, without text, in
bf16, compiled. Each contender is a fresh process that does the same updates:

    ours        training.loop on moments read from encoded shards, draws by position, clipping,
                fused AdamW, averages, log lines
    bare        a plain loop over batches in the device's memory, otherwise as
                `tests.benchmarks.step` has it
    diffusers   DiTTransformer2DModel in the loop of diffusers' unconditional training example:
                DDPMScheduler, AdamW, a learning-rate schedule, EMAModel, the loss read at each
                update; without accelerate, whose part (autocast) is written out

Model FLOPs utilisation is FLOPs per image (forward and backward of each one's own network, counted
by torch) times images per second over the rate of bf16 products that `darkroom plan` probes on the
same card just before. The rate is the median over windows of updates, the first ones, which
compile, left out. `--tiny` runs all of it in small on whatever there is, a CPU too: it tells that
this works, and nothing else.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.benchmarks import step
from training import accelerators, measuring
from training.config import TrainingConfig
from training.loop import World
from training.networks import DiTConfig
from training.stage import to_tensors

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = {
    "DiT-XL/2": DiTConfig(),
    "DiT-B/2": DiTConfig(width=768, depth=12, head_width=64),
    "tiny": DiTConfig(width=48, depth=2, head_width=24),
}
CONTENDERS = ("ours", "bare", "diffusers")
TARGET = 0.45
"""Of ours, on DiT-XL/2."""


class Diffusers(nn.Module):
    """diffusers' network of a config, as a stage is counted."""

    def __init__(self, config: DiTConfig, side: int):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        self.network = DiTTransformer2DModel(
            num_attention_heads=config.width // config.head_width,
            attention_head_dim=config.head_width,
            num_layers=config.depth,
            sample_size=side,
            norm_num_groups=8,  # which it checks and does not use
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        x = batch["moments"].chunk(2, dim=1)[0]
        zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        out = self.network(x, timestep=zeros, class_labels=zeros).sample
        return {"loss": out.square().flatten(1).mean(1)}


def diffusers(model: Any, batches: Any, config: TrainingConfig, device: str) -> Iterator[Any]:
    """Its training example's loop, over batches that lie in memory."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    kept = [to_tensors(batches.batch(number), device)["moments"] for number in range(8)]
    model.train()
    averages = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True)
    averages.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999))
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000)
    noising = DDPMScheduler(num_train_timesteps=1000)
    if config.compile:
        model.compile()
    turn = 0
    while True:
        clean = kept[turn % len(kept)].chunk(2, dim=1)[0]
        turn += 1
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=device)
        labels = torch.zeros_like(t)
        noisy = noising.add_noise(clean, noise, t)
        with torch.autocast(
            torch.device(device).type, torch.bfloat16, enabled=config.precision == "bf16"
        ):
            out = model(noisy, timestep=t, class_labels=labels).sample
        loss = F.mse_loss(out.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        averages.step(model.parameters())
        yield loss.detach().item()


def measure(name: str, network: str, folder: str, options: Any) -> dict[str, float]:
    """Images per second, FLOPs per image, parameters, bytes at the most."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = TrainingConfig(
        images=10**9,
        batch=options.batch,
        learning_rate=1e-4,
        log_images=10 * options.batch,
        precision=options.precision,
        compile=options.compile,
    )
    batches = step.loader(folder, options.batch, text=False)
    world = World(device=device)
    if name == "diffusers":
        stage: Any = Diffusers(NETWORKS[network], options.side).to(device)
    else:
        stage = step.stage_of(NETWORKS[network], batches, device)
    flops = measuring.flops_per_image(stage, batches)
    updates: Iterator[Any] = {
        "ours": lambda: step.ours(stage, batches, config, world),
        "bare": lambda: step.bare(stage, batches, config, world),
        "diffusers": lambda: diffusers(stage.network, batches, config, device),
    }[name]()

    def window(count: int) -> float:
        """Images per second."""
        start = time.perf_counter()
        for _ in range(count):
            next(updates)
        if device == "cuda":
            torch.cuda.synchronize()
        return count * options.batch / (time.perf_counter() - start)

    started = time.perf_counter()
    window(options.steps)
    compiled = time.perf_counter() - started
    rates = [window(options.steps) for _ in range(options.windows)]
    return {
        "images_per_second": statistics.median(rates),
        "lowest": min(rates),
        "highest": max(rates),
        "flops_per_image": flops,
        "parameters": sum(p.numel() for p in stage.network.parameters()),
        "first_seconds": compiled,
        "bytes": torch.cuda.max_memory_allocated() if device == "cuda" else 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["DiT-XL/2", "DiT-B/2"])
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, choices=CONTENDERS)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="updates in a window")
    parser.add_argument("--windows", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--side", type=int, default=32, help="of the latents")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tiny", action="store_true", help="small, not compiled, in fp32")
    parser.add_argument("--inside", nargs=3, metavar=("CONTENDER", "NETWORK", "FOLDER"))
    words = sys.argv[1:]
    if "--tiny" in words:
        words = "--networks tiny --batch 4 --steps 2 --windows 2 --samples 64 --side 8 --precision "
        words = [*(words + "fp32 --no-compile").split(), *sys.argv[1:]]
    options = parser.parse_args(words)
    if options.inside:
        name, network, folder = options.inside
        if name == "probe":
            told: Any = {"rate": accelerators.probe().matmul[options.precision]}
        else:
            told = measure(name, network, folder, options)
        print(json.dumps(told))
        return
    if not (torch.cuda.is_available() or options.tiny):
        raise SystemExit("no GPU here: --tiny runs the same in small on a CPU")

    def child(name: str, network: str, folder: str) -> dict[str, float]:
        command = [sys.executable, "-m", "tests.benchmarks.gpu", *words]
        ran = subprocess.run(
            [*command, "--inside", name, network, folder],
            cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if ran.returncode:
            return {}
        return json.loads(ran.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory(prefix="darkroom-") as temporary:
        folder = str(Path(temporary, "data"))
        shape = (8, options.side, options.side)
        step.write(folder, options.samples, shape, text=False)
        rate = child("probe", "", folder)["rate"]
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(
            f"{card}: {rate / 1e12:.4g} TFLOP/s of {options.precision} products, "
            f"torch {torch.__version__}, batch {options.batch}; load {os.getloadavg()[0]:.1f}"
        )
        for network in options.networks:
            for name in options.contenders:
                if not (it := child(name, network, folder)):
                    print(f"{network:9s} {name:10s} failed: see above", flush=True)
                    continue
                used = it["images_per_second"] * it["flops_per_image"] / rate
                aim = f" (target {TARGET})" if (name, network) == ("ours", "DiT-XL/2") else ""
                print(
                    f"{network:9s} {name:10s} {it['images_per_second']:9.1f} images/s "
                    f"({it['lowest']:.1f} to {it['highest']:.1f}), MFU {used:.3f}{aim}, "
                    f"{it['flops_per_image'] / 1e9:.4g} GFLOP an image, "
                    f"{it['parameters'] / 1e6:.1f} M parameters, {it['bytes'] / 2**30:.1f} GiB, "
                    f"first {options.steps} updates {it['first_seconds']:.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
