"""The autoencoder's stage: known losses on known pictures, and what it measures is true."""

import math

import numpy as np
import pytest
import torch

from training import stages
from training.autoencoding import edge_difference, gaussian_kl, sample_latent, to_bytes, to_unit
from training.measuring import ChannelStatistics, fixed_rows, heldout, psnr
from training.results import committed


def batch(pixels, first=0):
    return {
        "pixels": torch.from_numpy(pixels),
        "position": torch.arange(first, first + len(pixels)),
    }


def test_its_learning_lowers_the_loss(line):
    losses = [record["loss"] for record in line.history("autoencoder")]
    assert losses[-1] < 0.6 * losses[0]
    assert losses == sorted(losses, reverse=True)


def test_bytes_survive_the_unit_interval():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_unit(every)), every)
    assert to_unit(every)[[0, -1]].tolist() == [-1, 1]
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_the_divergence_is_that_of_gaussians():
    mean, logvar = torch.tensor([0.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, math.log(4)])
    moments = torch.cat([mean, logvar]).reshape(1, 6, 1, 1)
    wanted = [0, 2, (4 - 1 - math.log(4)) / 2]
    torch.testing.assert_close(gaussian_kl(moments).flatten(), torch.tensor(wanted))


def test_a_sampled_latent_has_the_moments_and_depends_on_its_position_alone():
    mean, logvar = 3.0, math.log(0.25)
    moments = (
        torch.tensor([mean, logvar]).reshape(1, 2, 1, 1).expand(1, 2, 64, 64).repeat(4, 1, 1, 1)
    )
    z = sample_latent(moments, 7, torch.arange(4))
    assert z.mean() == pytest.approx(mean, abs=0.02)
    assert z.std() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(sample_latent(moments[1:2], 7, torch.tensor([2])), z[2:3])
    assert not torch.equal(sample_latent(moments, 8, torch.arange(4)), z)


def test_edges_count_what_differs_between_neighbours():
    x = torch.zeros(1, 1, 4, 4)
    flat, step = x + 5, x.clone()
    step[..., 2:] = 1  # one step of 1 between columns 1 and 2, in each of 4 rows
    assert edge_difference(x, flat, 2).item() == 0
    assert edge_difference(x, step, 1).item() == pytest.approx(1 / 3)
    assert edge_difference(x, step, 2).item() == pytest.approx(1 / 3 + 1)


def test_the_loss_is_the_sum_of_its_parts(scenes):
    pixels, _ = scenes
    torch.manual_seed(0)
    network = {"channels": 8, "channel_mult": [1], "latent_channels": 2}
    parts, kept = {}, None
    for name in ("l1", "l2", "edges", "kl"):
        weights = dict.fromkeys(("l1", "l2", "edges", "kl"), 0.0) | {"l1": 1e-9, name: 1.0}
        stage = stages.create("autoencoder", {"network": network, **weights})
        if kept:
            stage.load_state_dict(kept)
        kept = stage.state_dict()
        parts[name] = stage(batch(pixels[:4]))["loss"]
    both = stages.create(
        "autoencoder", {"network": network, "l1": 1.0, "l2": 2.0, "edges": 3.0, "kl": 4.0}
    )
    both.load_state_dict(kept)
    wanted = parts["l1"] + 2 * parts["l2"] + 3 * parts["edges"] + 4 * parts["kl"]
    torch.testing.assert_close(both(batch(pixels[:4]))["loss"], wanted, rtol=1e-5, atol=1e-5)


def test_the_weight_of_the_divergence_grows_with_the_images_seen(scenes):
    pixels, _ = scenes
    torch.manual_seed(0)
    network = {"channels": 8, "channel_mult": [1], "latent_channels": 2}
    config = {"network": network, "kl": 4.0, "kl_warm_images": 1000}
    stage = stages.create("autoencoder", config)
    always = stages.create("autoencoder", {**config, "kl_warm_images": 0})
    never = stages.create("autoencoder", {**config, "kl": 0.0})
    for it in (always, never):
        it.load_state_dict(stage.state_dict())

    def losses(first):
        rows = batch(pixels[:4], first=first)
        return [it(rows)["loss"] for it in (stage, always, never)]

    for first, share in ((0, 0), (250, 0.25), (997, 0.997), (5000, 1)):
        found, whole, none = losses(first)
        weight = ((first + torch.arange(4)) / 1000).clamp(max=1) if share < 1 else 1.0
        torch.testing.assert_close(found, none + weight * (whole - none), rtol=1e-4, atol=1e-4)
    stage.eval()
    always.eval()
    found, whole, _ = losses(0)
    torch.testing.assert_close(found, whole)  # checkpoints are compared by one and the same loss


def test_a_rows_loss_knows_nothing_of_its_neighbours(line, scenes):
    pixels, _ = scenes
    stage = stages.load(line.stages["autoencoder"])
    whole = stage(batch(pixels))["loss"]
    torch.testing.assert_close(stage(batch(pixels[5:9], first=5))["loss"], whole[5:9])


def test_shifted_and_scaled_latents_have_mean_0_and_deviation_1(line):
    """Over the very pictures that it measured, drawn by another seed."""
    measured = committed(line.stages["autoencoder"])["measured"]
    stage = stages.load(line.stages["autoencoder"])
    pixels = torch.from_numpy(line.loader("pixels").rows(np.arange(64))["pixels"])
    shift, scale = (torch.tensor(measured[n]).reshape(3, 1, 1) for n in ("shift", "scale"))
    with torch.no_grad():
        z = (sample_latent(stage.encode(pixels), 99, torch.arange(64)) - shift) * scale
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), atol=0.12, rtol=0)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(3), atol=0.12, rtol=0)
    assert measured["latent_shape"] == [3, 4, 4]
    assert measured["pictures"] == 64


def test_the_measured_psnr_is_that_of_the_heldout_pictures(line):
    measured = committed(line.stages["autoencoder"])["measured"]
    stage = stages.load(line.stages["autoencoder"])
    pixels = line.loader("pixels", splits=("heldout",)).rows(np.arange(16))["pixels"]
    with torch.no_grad():
        again = stage.decode(stage.encode(torch.from_numpy(pixels)).chunk(2, 1)[0]).numpy()
    error = ((again.astype(float) - pixels) ** 2).mean((1, 2, 3))
    assert measured["heldout_psnr"] == pytest.approx(
        (10 * np.log10(255**2 / error)).mean(), abs=0.01
    )


def test_statistics_are_numpys():
    draws = np.random.default_rng(0).normal(5, 3, (20, 2, 4, 4)).astype(np.float32)
    draws[:, 1] = 7  # never changes
    statistics = ChannelStatistics()
    for part in np.split(draws, 4):
        statistics.add(torch.from_numpy(part))
    shift, scale = statistics.shift_and_scale()
    np.testing.assert_allclose(shift, draws.mean((0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(scale, [1 / draws[:, 0].std(), 1], rtol=1e-5)
    assert (statistics.rows, statistics.shape) == (20, (2, 4, 4))


def test_previews_are_pairs(line):
    stage = stages.load(line.stages["autoencoder"])
    loader = line.loader("pixels")
    pairs = stage.preview(loader, 0)
    unseen = line.loader("pixels", splits=("heldout",)).rows(np.arange(16))["pixels"]
    assert pairs.shape == (16, 16, 32, 3)
    np.testing.assert_array_equal(pairs[:, :, :16], unseen.transpose(0, 2, 3, 1))


def test_heldout_pictures_are_found_beside_the_training_ones(line):
    assert heldout(line.loader("pixels")).samples == 16
    assert heldout(line.loader("pixels", splits=("heldout",))) is None
    assert heldout(object()) is None


def test_fixed_rows_spread_over_all():
    assert fixed_rows(10, 4).tolist() == [0, 3, 6, 9]
    assert fixed_rows(3, 10).tolist() == [0, 1, 2]


def test_psnr_of_one_step_of_grey():
    assert psnr(torch.tensor((2 / 255) ** 2)).item() == pytest.approx(
        20 * math.log10(255), abs=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l1": 0, "l2": 0}, "l1 or l2 must be positive"),
        ({"kl": -1}, "must not be negative"),
        ({"scales": 0}, "scales must be at least 1"),
    ],
)
def test_configs_say_why_they_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        stages.config_of("autoencoder", changes)
