"""Two that learn in one update: each gets its own gradient, and the loss stays what it was.

Run as a script, this file is a group of two workers: `test_adversarial.py DIRECTORY`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from training import stages
from training.adversarial import QUIET, AdversarialConfig, adaptive_weight, hinge
from training.config import TrainingConfig
from training.distributed import of_process_group
from training.job import warm_start
from training.loop import World, train
from training.stage import Stage, evaluating

NETWORK = {"channels": 8, "channel_mult": [1, 2], "latent_channels": 3}
JUDGE = {"weight": 0.7, "start_images": 0, "discriminator": {"channels": 8, "layers": 2}}
CONFIG: dict[str, Any] = {"network": NETWORK, "adversarial": JUDGE}
VQ: dict[str, Any] = {**CONFIG, "network": {**NETWORK, "codebook": {"codes": 8}}}


def pictures(count: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 3, 16, 16), np.uint8)


def batch(count: int = 8, first: int = 0) -> dict[str, Any]:
    return {
        "pixels": torch.from_numpy(pictures(count)),
        "position": torch.arange(first, first + count),
    }


def create(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return stages.create("autoencoder", config)


def without_judge(stage: Any, config: dict[str, Any]) -> Any:
    plain = create({**config, "adversarial": None})
    plain.load_state_dict(
        {n: t for n, t in stage.state_dict().items() if not n.startswith("discriminator.")}
    )
    return plain


def test_the_hinge_of_known_logits():
    real = torch.tensor([[[[2.0, 0.0]]], [[[1.0, -1.0]]], [[[0.0, 0.0]]]])
    fake = torch.tensor([[[[-3.0, 0.5]]], [[[-1.0, -1.0]]], [[[0.0, 0.0]]]])
    assert hinge(real, fake).tolist() == [(0.5 + 0.75) / 2, (1.0 + 0.0) / 2, 1.0]


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer():
    torch.manual_seed(0)
    last = torch.nn.Conv2d(4, 3, 3, padding=1)
    y = last(torch.randn(5, 4, 8, 8))
    losses = [(y - 1).abs().mean((1, 2, 3)), -y.square().mean((1, 2, 3))]
    slopes = [torch.autograd.grad(it.sum(), y, retain_graph=True)[0] for it in losses]
    norms = [
        torch.autograd.grad(it.mean(), last.weight, retain_graph=True)[0].norm() for it in losses
    ]
    found = adaptive_weight(y, last.weight, *slopes)
    torch.testing.assert_close(found, norms[0] / (norms[1] + 1e-6))
    assert not found.requires_grad
    nothing = torch.zeros_like(slopes[1])
    assert adaptive_weight(y, last.weight, slopes[0], nothing, 50.0).item() == 50


@pytest.mark.parametrize("config", [CONFIG, VQ], ids=["kl", "vq"])
def test_each_side_gets_the_gradient_of_its_own_loss(config):
    """Against losses written down one by one, with a backward for each."""
    stage = create(config).train()
    stage(batch())["loss"].mean().backward()
    found = {name: p.grad.clone() for name, p in stage.named_parameters()}

    plain, judge, rows = without_judge(stage, config), stage.discriminator, batch()
    plain.train()
    drawn = {}
    plain.network.decoder.register_forward_hook(lambda _, __, out: drawn.update(y=out))
    compared = plain(rows)["loss"].mean()
    x = rows["pixels"].float() / 127.5 - 1
    y = torch.nn.functional.pixel_shuffle(drawn["y"], 2)
    fooled = -judge(y).mean()
    last = plain.network.last_weight
    ratio = [
        torch.autograd.grad(it, last, retain_graph=True)[0].norm() for it in (compared, fooled)
    ]
    (compared + 0.7 * (ratio[0] / ratio[1]) * fooled).backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
    judge.zero_grad()
    (QUIET * hinge(judge(x), judge(y.detach())).mean()).backward()
    for name, p in judge.named_parameters():
        torch.testing.assert_close(found[f"discriminator.{name}"], p.grad, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("config", [CONFIG, VQ], ids=["kl", "vq"])
def test_the_loss_is_worth_what_it_is_without_a_judge(config):
    stage = create(config).train()
    told, plain = stage(batch()), without_judge(stage, config).train()(batch())
    assert torch.equal(told["loss"], plain["loss"])
    more = {"adversarial", "discriminator", "adaptive_weight", "logits_real", "logits_fake"}
    assert told.keys() - plain.keys() == more
    with evaluating(stage):
        assert stage(batch()).keys() == plain.keys()


def test_before_its_time_the_judge_neither_judges_nor_learns():
    late = {**CONFIG, "adversarial": {**JUDGE, "start_images": 100}}
    stage = create(late).train()
    plain = without_judge(stage, late).train()
    for it in (stage, plain):
        it(batch(first=92))["loss"].mean().backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(stage.get_parameter(name).grad, p.grad, rtol=1e-4, atol=1e-7)
    assert not any(p.grad.any() for p in stage.discriminator.parameters())
    stage(batch(first=93))["loss"].mean().backward()
    assert stage.discriminator.layers[0].weight.grad.any()


def test_a_finished_stage_leaves_the_judge_behind(tmp_path):
    stage = create(CONFIG)
    assert not any("discriminator" in name for name in stage.exported())
    assert stage.exported().keys() == without_judge(stage, CONFIG).state_dict().keys()
    weights = {name: t.detach() for name, t in stage.exported().items()}
    save_file(weights, tmp_path / "weights.safetensors")
    (tmp_path / "stage.json").write_text(
        '{"weights_sha256": "' + _sha256(tmp_path / "weights.safetensors") + '"}'
    )
    other = create(CONFIG)
    torch.nn.init.ones_(other.network.last_weight)
    torch.nn.init.ones_(other.discriminator.layers[0].weight)
    warm_start(other, str(tmp_path))
    assert torch.equal(other.network.last_weight, stage.network.last_weight)
    assert (other.discriminator.layers[0].weight == 1).all()


def test_it_learns_to_tell_and_the_network_still_to_draw():
    """A discriminator of its own may win: its loss falls below 1, where it can't tell."""
    config = TrainingConfig(images=8 * 60, batch=8, learning_rate=2e-3)
    steps = list(train(create(CONFIG), Rows(8), config))
    losses, telling = (
        [float(it) for it in values]
        for values in zip(*((p.loss, p.metrics["discriminator"]) for p in steps), strict=True)
    )
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])  # of noise, which has no pattern to learn
    assert telling[0] == pytest.approx(1, abs=0.05)
    assert min(telling) < 0.9


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own look at it
def test_compiled_it_does_the_same():
    plain, compiled = create(CONFIG).train(), create(CONFIG).train()
    compiled.compile(backend="aot_eager")
    for stage in (plain, compiled):
        stage(batch())["loss"].mean().backward()
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": 0}, "weight and limit must be positive"),
        ({"limit": 0}, "weight and limit must be positive"),
        ({"start_images": -1}, "start_images not negative"),
        ({"discriminator": {"in_channels": 4}}, "in_channels: got 4, wanted 3"),
    ],
)
def test_configs_say_why_they_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        stages.config_of("autoencoder", {"adversarial": changes})


class Rows:
    """Endless batches of the same pictures; `rows` of each."""

    def __init__(self, size: int, rows: slice = slice(None)):
        self.size, self.rows = size, rows

    def batches(self, start_step: int = 0, prefetch: int = 2):
        pixels = pictures(self.size)
        while True:
            position = start_step * self.size + np.arange(self.size)
            yield {"pixels": pixels[self.rows], "position": position[self.rows], "key": []}
            start_step += 1


def trained(config: dict[str, Any], rows: slice, world: World | None) -> Stage:
    stage = create(config)
    if stage.network.codebook is not None:
        torch.nn.init.normal_(stage.network.codebook.vectors, std=0.3)
    training = TrainingConfig(images=9 * 6, batch=9, learning_rate=1e-3, max_grad_norm=0.0)
    steps = list(train(stage, Rows(9, rows), training, world))
    stage.told = {n: [float(p.metrics[n]) for p in steps] for n in steps[0].metrics}
    return stage


@pytest.mark.slow
def test_two_workers_with_uneven_shares_do_what_one_does(tmp_path):
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "GLOO_SOCKET_IFNAME": "lo"
    }  # fmt: skip
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for name, config in {"kl": CONFIG, "vq": VQ}.items():
        alone = trained(config, slice(None), None)
        together = load_file(tmp_path / f"{name}.safetensors")
        for key, tensor in alone.state_dict().items():
            torch.testing.assert_close(together[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
        for key in ("adaptive_weight", "perplexity", "discriminator", "psnr"):
            if key in alone.told:
                wanted = torch.tensor(alone.told[key])
                torch.testing.assert_close(together[f"told.{key}"], wanted, rtol=1e-3, atol=1e-4)


def work(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2
    )
    rows = (slice(0, 4), slice(4, 9))[rank]
    for name, config in {"kl": CONFIG, "vq": VQ}.items():
        world = of_process_group(rank, 2, torch.device("cpu"))
        stage = trained(config, rows, replace(world, restarts=False))
        if rank == 0:
            told = {f"told.{n}": torch.tensor(values) for n, values in stage.told.items()}
            save_file({**stage.state_dict(), **told}, directory / f"{name}.safetensors")
    torch.distributed.destroy_process_group()


def _sha256(path: Path) -> str:
    from pipeline import storage

    return storage.sha256(path)


def test_the_defaults_are_a_config():
    assert AdversarialConfig().discriminator.patch == 70


if __name__ == "__main__":
    other = os.fork()
    work(0 if other else 1, Path(sys.argv[1]))
    if other:
        sys.exit(os.waitpid(other, 0)[1])
