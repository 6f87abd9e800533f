"""What guided sampling costs beside its network calls: python -m tests.benchmarks.sampling

Twenty guided DDIM steps of a U-Net on 16 pictures of 3 x 16 x 16, in turns with the bare network
calls that they need (the same batches, guided rows stacked, and nothing else) and with diffusers'
usual loop (DDIMScheduler, two rows chunked and mixed) over the same network. In fp32. The table
gives the median seconds of each and the median ratio of neighbours in time; then what guidance on
an interval of the steps saves. Pictures of ours and theirs are compared, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from training.diffusion import DiffusionConfig, Model, normal, sample, table
from training.diffusion.guidance import classifier_free
from training.diffusion.samplers import ddim, leading_grid
from training.networks import ContextConfig, UNetConfig, build

STEPS, ROWS, SCALE, TABLE = 20, 16, 3.0, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=3, channels=64, channel_mult=(1, 2), contexts=(ContextConfig("text", 64, 64),)
    )
    network = build(config).eval().requires_grad_(False)
    for p in network.parameters():  # its last layer starts at zero: the calls are to say something
        p.add_(0.02 * torch.randn_like(p))
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    model = DiffusionConfig(path="ddpm_linear", prediction="eps").build_model(network)
    path = table(scheduler.betas.double())
    model = Model(network, path, model.prediction)
    eps = normal(0, "start", torch.arange(ROWS), (3, 16, 16))
    cond = {
        "text_tokens": torch.randn(ROWS, 12, 64),
        "text_mask": torch.ones(ROWS, 12, dtype=torch.bool),
        "text_pooled": torch.randn(ROWS, 64),
        "keep": torch.ones(ROWS, dtype=torch.bool),
    }
    twice = {key: torch.cat([value, value]) for key, value in cond.items()}
    twice["keep"] = torch.cat([~cond["keep"], cond["keep"]])
    grid = leading_grid(STEPS, TABLE)
    labels = [model.labels(t, torch.cat([eps, eps])) for t in grid[:-1]]
    doubled = torch.cat([eps, eps])

    def bare() -> Tensor:
        for label in labels:
            network(doubled, label, twice)
        return eps

    def ours(interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        guided = classifier_free(SCALE, interval=interval)(model)
        return sample(guided, ddim(path), eps, grid, cond)

    def theirs() -> Tensor:
        x = eps * scheduler.init_noise_sigma
        for timestep, label in zip(scheduler.timesteps, labels, strict=True):
            shown = scheduler.scale_model_input(torch.cat([x, x]), timestep)
            base, wanted = network(shown, label, twice).chunk(2)
            x = scheduler.step(base + SCALE * (wanted - base), timestep, x).prev_sample
        return x

    with torch.inference_mode():
        far = (ours() - theirs()).abs().max() / theirs().abs().max()
        print(
            f"{ROWS} pictures, {STEPS} steps, {options.threads} threads; ours - theirs: {far:.1e}"
        )
        contenders: dict[str, Callable[[], Tensor]] = {
            "bare network calls": bare,
            "ours": ours,
            "diffusers' loop": theirs,
            "ours, guided at t in [.2, .8]": lambda: ours((0.2, 0.8)),
        }
        took: dict[str, list[float]] = {name: [] for name in contenders}
        for run in range(options.rounds + 1):
            names = list(contenders)[:: 1 if run % 2 else -1]
            for name in names:
                start = time.perf_counter()
                contenders[name]()
                if run:  # the first warms up
                    took[name].append(time.perf_counter() - start)
    for name, seconds in took.items():
        ratios = [a / b for a, b in zip(seconds, took["bare network calls"], strict=True)]
        print(f"{name:32s} {statistics.median(seconds):7.3f} s {statistics.median(ratios):7.3f}")


if __name__ == "__main__":
    main()
