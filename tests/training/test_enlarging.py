"""What a stage of a cascade enlarges: shrunk exactly, damaged as much as it is told."""

import pytest
import torch

from training.diffusion import DiffusionConfig, normal
from training.enlarging import PIXELS_VARIANCE, LowConfig, blurred, enlarged, shrunk

POSITION = torch.arange(64)


def pictures(rows: int = 64, side: int = 8) -> torch.Tensor:
    return normal(0, "pictures", torch.arange(rows), (3, side, side))


def told(config: LowConfig, strength: torch.Tensor, low: torch.Tensor):
    model = DiffusionConfig(path="cosine", prediction="v").build_model(lambda x, label, cond: x)
    return model, config.told(low, strength, model, config.noise(0, POSITION, low), 16)


def test_a_small_picture_is_the_means_of_squares():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert shrunk(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert torch.equal(shrunk(x, 4), x)
    for bad in (3, 8):
        with pytest.raises(ValueError, match="wanted squares whose side is a multiple"):
            shrunk(x, bad)


def test_noise_is_that_of_the_path_and_its_level_is_told():
    config, low = LowConfig(side=8, strongest=0.5), pictures()
    strength = config.draw(0, POSITION)
    assert 0 <= strength.min() < 0.05
    assert 0.45 < strength.max() <= 0.5
    model, cond = told(config, strength, low)
    a, s = model.path.at(strength, low)
    eps = (cond["low"] - a * low) / s
    assert eps.std().item() == pytest.approx(1, abs=0.02)
    assert abs((eps * low).mean().item()) < 0.02
    assert torch.equal(cond["level"], model.labels(strength, low))
    _, clean = told(config, torch.zeros(64), low)
    assert torch.allclose(clean["low"], low, atol=1e-6)
    assert clean["level"].isfinite().all()


def test_damage_is_a_function_of_seed_and_position():
    config, low = LowConfig(side=8), pictures()
    some = POSITION[10:20]
    assert torch.equal(config.draw(3, POSITION)[10:20], config.draw(3, some))
    assert torch.equal(config.noise(3, POSITION, low)[10:20], config.noise(3, some, low[10:20]))
    assert not torch.equal(config.draw(3, POSITION), config.draw(4, POSITION))
    assert not torch.equal(config.draw(3, POSITION), config.draw(3, POSITION, "heldout/"))


def test_a_blur_is_a_gaussian_of_the_row_s_own_deviation():
    x = torch.zeros(3, 2, 33, 33)
    x[:, :, 16, 16] = 1
    deviation = torch.tensor([0.0, 1.0, 3.0])
    out = blurred(x, deviation)
    assert torch.allclose(out[0], x[0])
    assert torch.allclose(out.sum((2, 3)), torch.ones(3, 2), atol=1e-5)
    place = torch.arange(33.0) - 16
    for row in (1, 2):
        spread = (out[row, 0].sum(0) * place.square()).sum().sqrt()
        assert spread.item() == pytest.approx(deviation[row].item(), rel=0.02)
        assert torch.equal(out[row, 0], out[row, 1])
    assert torch.allclose(blurred(torch.ones(1, 3, 8, 8), torch.ones(1)), torch.ones(1, 3, 8, 8))
    for deviation in (-0.1, 0.7):
        with pytest.raises(ValueError, match="it learnt blur from 0 to 0.6"):
            LowConfig(side=8, augment="blur", strongest=0.6).check(deviation, "sr1.level")


@pytest.mark.parametrize("augment", ["noise", "blur", "none"])
def test_a_residual_is_around_the_best_linear_guess(augment):
    low = PIXELS_VARIANCE**0.5 * pictures()
    config = LowConfig(side=8, augment=augment, strongest=0.9, residual=True)
    assert "mean" not in told(LowConfig(side=8, augment=augment), torch.zeros(64), low)[1]
    for level in (0.0, 0.6):
        strength = torch.full((64,), level)
        _, cond = told(config, strength, low)
        mean = cond["mean"]
        assert mean.shape == (64, 3, 16, 16)
        if augment != "noise" or not level:
            assert torch.allclose(mean, enlarged(cond["low"], 16), atol=1e-6)
            continue
        errors = [
            (enlarged(cond["low"] * k, 16) - enlarged(low, 16)).square().mean().item()
            for k in torch.linspace(0, 1.5, 31)
        ]
        assert (mean - enlarged(low, 16)).square().mean().item() < min(errors) + 1e-3


def test_without_augmentation_what_is_told_is_the_picture_itself():
    low = pictures()
    _, cond = told(LowConfig(side=8, augment="none"), torch.full((64,), 0.3), low)
    assert torch.equal(cond["low"], low)
    assert cond["level"].abs().max() == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"side": 0}, "low.side: got 0"),
        ({"side": 8, "strongest": 1.5}, "wanted 0 to 1 for noise"),
        ({"side": 8, "augment": "blur", "strongest": 5.0}, "wanted 0 to 4 for blur"),
    ],
)
def test_what_cannot_be_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        LowConfig(**given)
