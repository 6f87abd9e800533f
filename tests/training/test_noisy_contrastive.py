"""The noise-aware CLIP's stage: it learns which caption a noisy picture shows."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from training import stages
from training.noisy_contrastive import NoisyClipStage, NoisyClipStageConfig
from training.results import committed
from training.stage import to_tensors


@pytest.fixture(scope="module")
def stage(line):
    return stages.load(line.stages["noisy_clip"])


def batch_of(line, count):
    return to_tensors(line.loader("pixels").rows(np.arange(count)))


def test_it_learns(line):
    losses = [record["loss"] for record in line.history("noisy_clip")]
    assert np.mean(losses[-2:]) < losses[0] - 0.2
    assert committed(line.stages["noisy_clip"])["measured"]["among"] == 64


def test_it_knows_clean_pictures_better_than_noisy_ones(stage, line):
    batch = batch_of(line, 64)
    x0 = batch["pixels"] / 127.5 - 1
    torch.manual_seed(0)
    eps, texts = torch.randn_like(x0), stage.texts(batch["caption"])

    def likeness(t):
        a, s = stage.config.diffusion.build_path()(torch.tensor(t))
        images = stage.noisy_features(a * x0 + s * eps, torch.full((64,), t))
        per_image = (images.float() @ texts.T * stage.temperature).log_softmax(1)
        return per_image.diagonal().mean().item()

    found = [likeness(t) for t in (0.02, 0.6, 0.98)]
    assert found[0] > found[1] > found[2] - 0.05
    assert found[0] > -np.log(64) + 0.3
    torch.testing.assert_close(
        stage.features(x0), stage.noisy_features(x0, torch.zeros(64)), rtol=0, atol=0
    )


def test_its_log_probability_is_the_likeness_and_has_a_gradient(stage, line):
    batch = batch_of(line, 4)
    x = (batch["pixels"] / 127.5 - 1).requires_grad_()
    t = torch.tensor(0.3)
    found = stage.log_prob(batch["caption"])(x, t, {})
    images = stage.noisy_features(x, t)
    wanted = stage.temperature * (images * stage.texts(batch["caption"])).sum(1)
    torch.testing.assert_close(found, wanted)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()


def test_noise_is_new_at_each_position_and_the_same_at_the_same(stage, line):
    batch = batch_of(line, 4)
    assert torch.equal(stage.seen(batch), stage.seen(batch))
    later = {**batch, "position": batch["position"] + 64}
    assert not torch.equal(stage.seen(batch), stage.seen(later))


def test_its_config_is_json_and_back(stage):
    again = stages.create("noisy_clip", json.loads(json.dumps(asdict(stage.config))))
    assert isinstance(again, NoisyClipStage)
    assert again.config == stage.config
    with pytest.raises(ValueError, match="in_channels: got 4, wanted 3"):
        NoisyClipStageConfig(network=stage.config.network.__class__(in_channels=4))
