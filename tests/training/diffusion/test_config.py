"""Configs: plain names and numbers that survive JSON and refuse what cannot work."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from training.diffusion import DiffusionConfig, SamplerConfig, flow, normal
from training.diffusion.config import PATHS

CONFIGS = [
    DiffusionConfig(),
    DiffusionConfig(path="ddpm_linear", prediction="eps", times="discrete", table_steps=200),
    DiffusionConfig(
        path="ddpm_scaled_linear", zero_terminal_snr=True, prediction="v", weight="min_snr"
    ),
    DiffusionConfig(path="edm", prediction="edm", times="lognormal", times_mean=-1.2),
    DiffusionConfig(prediction="x0", weight="flow", weight_limit=100.0, shift=3.0, stratified=True),
    DiffusionConfig(path="vp", prediction="score", weight="likelihood", times="uniform"),
    SamplerConfig(),
    SamplerConfig(kind="ddim", eta=1.0, guidance=3.0, guidance_interval=(0.1, 0.9)),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_json_round_trip(config):
    assert type(config)(**json.loads(json.dumps(asdict(config)))) == config
    assert hash(config) == hash(type(config)(**asdict(config)))


@pytest.mark.parametrize("config", CONFIGS[:6])
def test_a_config_builds_what_it_names(config):
    """A loss that is finite, and that the network can lower, at the times that the config draws."""
    position = torch.arange(64)
    x0, eps = normal(0, "x0", position, (3, 4)), normal(0, "eps", position, (3, 4))
    t = config.draw_times(0, position)
    assert t.shape == (64,)
    assert ((t > 0) & (t <= 1)).all()
    assert not torch.equal(t, config.draw_times(1, position))
    assert torch.equal(t[5:9], config.draw_times(0, position[5:9]))

    from training.diffusion import loss

    model = config.build_model(lambda x, label, cond: torch.zeros_like(x))
    values = loss(model, x0, t, eps, weight=config.build_weight())
    assert values.shape == (64,)
    assert values.isfinite().all()
    assert (values > 0).all()


def test_every_path_is_named():
    for name in (*PATHS, "ddpm_linear", "ddpm_scaled_linear", "ddpm_cosine", "ddpm_sigmoid"):
        config = replace(CONFIGS[0], path=name, prediction="v")
        assert config.build_path().name == name
        assert config.build_path() is config.build_path()
    assert DiffusionConfig(shift=3.0).build_path().name == "flow*3"


def test_sigma_data_reaches_the_prediction():
    assert DiffusionConfig(path="edm", prediction="edm").build_prediction().sigma_data == 0.5
    assert DiffusionConfig().build_prediction().sigma_data == 1
    assert DiffusionConfig(sigma_data=0.7).build_prediction().sigma_data == 0.7


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "vpp"}, "path: got 'vpp', wanted one of flow"),
        ({"prediction": "eps"}, r"'v', 'flow' or 'x0'"),
        ({"path": "ddpm_linear", "zero_terminal_snr": True, "prediction": "eps"}, r"a\(1\) = 0"),
        ({"zero_terminal_snr": True}, "ddpm_ path"),
        ({"t_min": 0.0}, "t_min"),
        ({"uniform_share": 1.0}, "uniform_share"),
        ({"shift": -1.0}, "above 0"),
    ],
)
def test_what_cannot_work_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "euler"}, "dpmpp2m"),
        ({"steps": 0}, "at least 1"),
        ({"eta": 1.5}, "deterministic"),
        ({"guidance_interval": [0.8, 0.2]}, r"got \(0.8, 0.2\), wanted two times in order"),
        ({"guidance_interval": [20, 80]}, r"got \(20, 80\), wanted two times"),
        ({"guidance_interval": [-0.1, 1.0]}, "from 0 to 1"),
        ({"guidance": math.nan}, "guidance: got nan, wanted a finite scale"),
        ({"guidance": math.inf}, "guidance: got inf"),
        ({"guidance_rescale": 1.1}, "guidance_rescale: got 1.1, wanted 0 to 1"),
        ({"guidance_rescale": -0.1}, "guidance_rescale: got -0.1"),
        ({"threshold_quantile": 0.0}, "threshold_quantile: got 0.0, wanted above 0 and up to 1"),
        ({"threshold_quantile": 99.5}, "threshold_quantile: got 99.5"),
        ({"corrections": -1}, "corrections: got -1, wanted at least 0"),
        ({"step_size": 0.0}, "step_size: got 0.0, wanted a finite number above 0"),
        ({"shift": 0.0}, "shift: got 0.0, wanted a finite number above 0"),
        ({"shift": math.nan}, "shift: got nan"),
        ({"table_steps": 0}, "table_steps: got 0, wanted at least 1"),
        ({"sigma_min": 0.0}, "sigma_min: got 0.0, wanted a finite level above 0"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_max: got 1.0, wanted .* above sigma_min, 2"),
        ({"sigma_max": math.inf}, "sigma_max: got inf"),
        ({"rho": 0.0}, "rho: got 0.0, wanted a finite number above 0"),
    ],
)
def test_samplers_that_cannot_work_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**fields)


def test_the_ends_of_each_range_are_in_it():
    SamplerConfig(guidance_interval=(0.5, 0.5), guidance_rescale=1.0, threshold_quantile=1.0)
    SamplerConfig(guidance=-1.0, sigma_min=1.0, sigma_max=1.5, rho=1.0, table_steps=1)


KINDS = ["ddim", "heun", "dpmpp2m", "unipc", "euler_maruyama", "annealed"]
GRIDS = ["trailing", "leading", "karras", "shifted"]


@pytest.mark.parametrize(
    ("kind", "grid"), [(kind, "uniform") for kind in KINDS] + [("dpmpp2m", grid) for grid in GRIDS]
)
def test_a_sampler_config_samples(mixture, kind, grid):
    """From normal noise to the mixture, whose network predicts flow, at 40 steps of every kind."""
    path = flow()

    def network(x, label, cond):
        t = path.inv((4 * label).exp())
        a, s = path.at(t, x)
        x = x * torch.hypot(a, s)  # undoes c_in
        return (x - mixture.denoiser(path)(x, t, cond)) / s

    config = SamplerConfig(kind=kind, grid=grid, steps=40, sigma_max=60.0, sigma_min=0.01)
    model = DiffusionConfig().build_model(network)
    eps = normal(0, "start", torch.arange(600), (2,)).double()
    noise = lambda x: torch.randn(x.shape, generator=random, dtype=x.dtype)
    random = torch.Generator().manual_seed(0)
    errors = mixture.errors(config.sample(model, eps, noise=noise))
    loose = 3 if kind == "annealed" else 1  # forty Langevin steps of .1 are too few
    assert errors[0] < 0.12 * loose
    assert errors[2] < 0.06 * loose


def test_a_sampler_config_wires_guidance_thresholds_and_corrections():
    calls = []

    def network(x, label, cond):
        calls.append(len(x))
        return -3 * x * cond["keep"].to(x)[:, None]

    model = DiffusionConfig().build_model(network)
    eps, cond = torch.randn(2, 3), {"keep": torch.ones(2, dtype=torch.bool)}
    plain = SamplerConfig(kind="ddim", steps=4)
    plain.sample(model, eps, cond)
    assert calls == [2] * 4
    calls.clear()
    SamplerConfig(kind="ddim", steps=4, guidance=3.0).sample(model, eps, cond)
    assert calls == [4] * 4
    calls.clear()
    SamplerConfig(kind="heun", steps=4, guidance=0.0, corrections=2).sample(model, eps, cond)
    assert calls == [2] * (1 + 2 * 2 + 1 + 2 * 3)  # Heun but at both ends; three are corrected
    for threshold in ("static", "dynamic"):
        bounded = SamplerConfig(kind="ddim", steps=4, guidance=9.0, threshold=threshold)
        assert bounded.sample(model, 9 * eps, cond).abs().max() <= 1
    assert plain.sample(model, 9 * eps, cond).abs().max() > 1
    shut = {"keep": torch.zeros(2, dtype=torch.bool)}
    same = SamplerConfig(kind="ddim", steps=4, guidance=2.0).sample(model, eps, cond, negative=cond)
    torch.testing.assert_close(same, plain.sample(model, eps, cond))
    assert not torch.allclose(same, plain.sample(model, eps, shut))


def test_levels_of_paths_that_explode():
    one = torch.ones((), dtype=torch.float64)
    for changes, last in (
        ({"path": "ve"}, 50),
        ({"path": "ve", "sigma_max": 20.0}, 20),
        ({"path": "edm"}, 80),
        ({"path": "edm", "sigma_max": 20.0}, 20),
    ):
        ratio = DiffusionConfig(prediction="edm", **changes).build_path().ratio(one)
        assert ratio.item() == pytest.approx(last, rel=1e-6)
    narrow = DiffusionConfig(path="ve", prediction="edm", sigma_min=0.5).build_path()
    assert narrow.ratio(one / 2) > 2 * DiffusionConfig(path="ve").build_path().ratio(one / 2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"path": "ve", "sigma_min": 60.0}, "path ve: got sigma_min 60.0 and sigma_max 50.0"),
        ({"path": "ve", "sigma_min": 0.0}, "0 < sigma_min"),
        ({"path": "edm", "sigma_max": -1.0}, "path edm: got sigma_max -1.0"),
        ({"path": "flow", "sigma_max": 3.0}, "'flow' has its own"),
    ],
)
def test_levels_that_are_none_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        DiffusionConfig(**changes)
