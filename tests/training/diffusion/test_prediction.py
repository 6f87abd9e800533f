"""Predictions: one 2 x 2 system read both ways, and the denoiser made of a network."""

import pytest
import torch
from torch import Tensor

from training.diffusion import (
    PREDICTIONS,
    Model,
    Path,
    Prediction,
    cosine,
    edm,
    flow,
    subvp,
    ve,
    vp,
)
from training.diffusion.objective import loss
from training.diffusion.path import like, named_betas, table, zero_terminal_snr
from training.diffusion.prediction import regauge

PATHS = [vp(), subvp(), ve(), edm(), cosine(), flow()]
T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
every_prediction = pytest.mark.parametrize("name", PREDICTIONS)


def pair() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(T), 3, generator=random, dtype=torch.float64)
    return x0, eps


@every_path
@every_prediction
def test_the_target_read_back_is_x0(path: Path, name: str):
    x0, eps = pair()
    level = path.at(T, x0)
    k, o = PREDICTIONS[name].solve(level)
    target = PREDICTIONS[name].target(x0, eps, level)
    read = k * path.noise(x0, eps, T) + o * target
    torch.testing.assert_close(read, x0, rtol=0, atol=1e-9 if path.name == "edm" else 1e-11)


def test_targets_are_what_their_names_say():
    x0, eps = pair()
    a, s = vp().at(T, x0)
    for name, wanted in {
        "x0": x0,
        "eps": eps,
        "score": -(vp().noise(x0, eps, T) - a * x0) / s**2,
        "v": a * eps - s * x0,
        "flow": eps - x0,
    }.items():
        torch.testing.assert_close(PREDICTIONS[name].target(x0, eps, (a, s)), wanted)


def test_edm_of_unit_data_is_minus_v_in_the_vp_gauge():
    x0, eps = pair()
    level = vp().at(T, x0)
    unit = Prediction("edm", PREDICTIONS["edm"].row, sigma_data=1.0)
    torch.testing.assert_close(
        unit.target(x0, eps, level), -PREDICTIONS["v"].target(x0, eps, level)
    )


def test_edm_preconditioning_is_the_published_one():
    """c_skip = .25/(sigma^2 + .25), c_out = .5 sigma/sqrt(sigma^2 + .25) (Karras et al. 2022)."""
    sigma = edm()(T)[1]
    k, o = PREDICTIONS["edm"].solve((torch.ones_like(sigma), sigma))
    torch.testing.assert_close(k, 0.25 / (sigma**2 + 0.25))
    torch.testing.assert_close(o, 0.5 * sigma / (sigma**2 + 0.25).sqrt())


@pytest.mark.parametrize(
    ("name", "path", "weight"),
    [
        ("x0", vp(), lambda r: torch.ones_like(r)),
        ("eps", vp(), lambda r: r),
        ("eps", edm(), lambda r: r),
        ("v", vp(), lambda r: r + 1),
        ("flow", flow(), lambda r: (1 + r.sqrt()) ** 2),
        ("edm", edm(), lambda r: (1 / r + 0.25) / (0.25 / r)),
    ],
)
def test_plain_error_weighs_x0_by_the_published_weight(name: str, path: Path, weight):
    snr = path.snr(T)
    torch.testing.assert_close(1 / PREDICTIONS[name].solve(path(T))[1] ** 2, weight(snr))


def test_score_error_is_snr_times_a_power_of_s():
    a, s = ve()(T)
    torch.testing.assert_close(1 / PREDICTIONS["score"].solve((a, s))[1] ** 2, a**2 / s**4)


@every_prediction
def test_at_the_data_the_denoiser_is_the_identity(name: str):
    k, o = PREDICTIONS[name].solve((torch.ones(()), torch.zeros(())))
    assert (k.item(), o.item()) == pytest.approx((0, 1) if name == "x0" else (1, 0), abs=1e-20)


@pytest.mark.parametrize("name", ["eps", "score"])
@pytest.mark.parametrize(
    "path",
    [flow(), cosine(), table(zero_terminal_snr(named_betas("linear")))],
    ids=lambda p: p.name,
)
def test_eps_and_score_are_refused_where_no_signal_is_left(name: str, path: Path):
    with pytest.raises(ValueError, match=r"'v', 'flow' or 'x0'"):
        Model(lambda x, label, cond: x, path, PREDICTIONS[name])


def test_two_gauges_show_the_network_the_same_numbers():
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, label: Tensor, cond) -> Tensor:
        seen.append((x, label))
        return x.tanh()

    x0, eps = pair()
    estimates = []
    for path in PATHS:
        t = path.inv(vp().ratio(T).clamp(max=40))
        estimates.append(Model(network, path, PREDICTIONS["edm"])(path.noise(x0, eps, t), t))
    for (x, label), estimate in zip(seen, estimates, strict=True):
        torch.testing.assert_close(x, seen[0][0])
        torch.testing.assert_close(label, seen[0][1])
        torch.testing.assert_close(estimate, estimates[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["x0", "v", "flow", "edm"])
def test_a_mean_moves_the_data_and_nothing_else(name):
    """Around a mean a model is the model of x0 - mean: what its network sees, says and should say,
    and the estimate is moved back."""
    x0, eps = pair()
    mean = torch.randn_like(x0)
    t = torch.full((len(x0),), 0.3, dtype=torch.float64)
    seen: list[Tensor] = []

    def network(x: Tensor, label: Tensor, cond) -> Tensor:
        seen.append(x)
        return torch.tanh(x)

    path = vp()
    model = Model(network, path, PREDICTIONS[name])
    plain = model(path.noise(x0 - mean, eps, t), t)
    moved = model(path.noise(x0, eps, t), t, {"mean": mean})
    torch.testing.assert_close(seen[1], seen[0])
    torch.testing.assert_close(moved, plain + mean)
    level = path.at(t, x0)
    torch.testing.assert_close(
        model.target(x0, eps, level, {"mean": mean}), model.target(x0 - mean, eps, level)
    )
    torch.testing.assert_close(
        loss(model, x0, t, eps, {"mean": mean}), loss(model, x0 - mean, t, eps)
    )


def test_labels_are_a_quarter_of_log_noise_and_bounded():
    model = Model(lambda x, label, cond: x, flow())
    x = torch.zeros(3, 2)
    t = torch.tensor([0.0, 0.5, 1.0])
    assert model.labels(t, x).tolist() == [-2, 0, 2]
    assert model.labels(torch.tensor(0.5, dtype=torch.float64), x).tolist() == [0, 0, 0]
    assert Model(model.network, flow(), label="time").labels(t, x).tolist() == t.tolist()


def test_state_and_coefficients_stay_in_float32_around_a_bfloat16_network():
    network = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    model = Model(lambda x, label, cond: network(x), flow(), dtype=torch.bfloat16)
    x = torch.randn(4, 64)
    t = torch.full((4,), 1e-3)
    estimate = model(x, t)
    assert estimate.dtype == torch.float32
    # A thousandth of F is what is left to the network here; x itself must come through unrounded.
    k, o = model.prediction.solve(flow()(t[0]))
    assert (estimate - k * x).abs().max() < 4 * o.abs()
    assert model(x.bfloat16(), t).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert Model(lambda x, label, cond: x @ torch.eye(64), flow())(x, t).dtype == torch.float32


def test_a_network_of_the_wrong_width_is_refused():
    """Broadcasting one channel, or guiding three of four, is a silent error elsewhere."""
    x, t = torch.randn(2, 4, 3, 3), torch.tensor(0.5)
    with pytest.raises(ValueError, match="wanted 4 channels"):
        Model(lambda x, label, cond: x[:, :1], flow())(x, t)
    with pytest.raises(ValueError, match="wanted 8 channels"):
        Model(lambda x, label, cond: x, flow(), learned_variance=True)(x, t)


def test_learned_variance_is_the_second_half_of_the_channels():
    def network(x: Tensor, label: Tensor, cond) -> Tensor:
        return torch.cat([x.tanh(), torch.full_like(x, -1.0)], 1)

    x, t = torch.randn(2, 4, 3, 3), torch.tensor(0.5)
    model = Model(network, flow(), learned_variance=True)
    assert model(x, t).shape == x.shape
    estimate, fraction = model.estimate(x, t)
    assert torch.equal(estimate, model(x, t))
    assert fraction is not None
    assert (fraction == 0).all()


def test_regauge_gives_the_other_path_its_denoiser(mixture):
    x0, eps = mixture.draw(len(T))[0], pair()[1][:, :2]
    for source in PATHS:
        for target in PATHS:
            t = target.inv(vp().ratio(T).clamp(max=40))
            x = target.noise(x0, eps, t)
            torch.testing.assert_close(
                regauge(source, target)(mixture.denoiser(source))(x, t, {}),
                mixture.denoiser(target)(x, t, {}),
                rtol=0,
                atol=1e-11,
            )


def test_regauge_holds_at_pure_noise(mixture):
    one = torch.ones((), dtype=torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64)
    there = regauge(flow(), cosine())(mixture.denoiser(flow()))(x, one, {})
    torch.testing.assert_close(there, (mixture.shares @ mixture.means).expand(5, 2))
    assert like(one, x).ndim == 0
