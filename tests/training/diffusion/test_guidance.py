"""Guidance: what it samples on a mixture with exact classifiers, and what it costs in calls."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from training.diffusion import (
    PREDICTIONS,
    Path,
    classifier,
    classifier_free,
    ddim,
    dynamic_threshold,
    edm,
    flow,
    heun,
    normal,
    sample,
    vp,
)  # fmt: skip
from training.diffusion.guidance import (
    autoguidance,
    clip_log_prob,
    clip_loss,
    compose,
    linear_inverse,
    reconstruction,
    stack,
    static_threshold,
)  # fmt: skip
from training.diffusion.prediction import NULL, Cond, Denoiser
from training.diffusion.samplers import karras_grid, prior, uniform_grid

ROWS = torch.arange(1500)
HALF = torch.tensor(0.5, dtype=torch.float64)


class Counted:
    """A denoiser that notes the batch size of each of its calls."""

    def __init__(self, denoise: Denoiser):
        self.denoise, self.calls = denoise, []

    def __call__(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        self.calls.append(len(x))
        return self.denoise(x, t, cond)


def points(rows: int = 7) -> Tensor:
    return 2 * normal(0, "points", torch.arange(rows), (2,)).double()


def of_class(y: int, rows: int) -> Cond:
    return {"y": torch.full((rows,), y)}


def classify(mixture, path: Path, y: int):
    """log p(y | x_t), exact."""

    def log_prob(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        joint = mixture.log_joint(x, *path(t))
        return joint[:, y] - joint.logsumexp(1)

    return log_prob


def drawn(mixture, denoise: Denoiser, path: Path, cond: Cond = NULL, steps: int = 40) -> Tensor:
    start = prior(path, normal(0, "start", ROWS, (2,)).double(), torch.ones(()))
    return sample(denoise, ddim(path), start, uniform_grid(steps), cond)


def test_scale_zero_and_one_are_exact_and_cost_one_call(mixture):
    x, cond = points(), of_class(1, 7)
    null = {**cond, "keep": torch.zeros(7, dtype=torch.bool)}
    for scale, wanted in ((0, null), (1, cond)):
        counted = Counted(mixture.denoiser(flow()))
        got = classifier_free(scale)(counted)(x, HALF, cond)
        assert torch.equal(got, mixture.denoiser(flow())(x, HALF, wanted))
        assert counted.calls == [7]


def test_both_estimates_come_from_one_call(mixture):
    x, cond, denoise = points(), of_class(1, 7), mixture.denoiser(flow())
    counted = Counted(denoise)
    got = classifier_free(3)(counted)(x, HALF, cond)
    free, held = denoise(x, HALF, NULL), denoise(x, HALF, cond)
    torch.testing.assert_close(got, free + 3 * (held - free))
    assert counted.calls == [14]
    per_row = classifier_free(3)(counted)(x, HALF.expand(7), cond)
    torch.testing.assert_close(per_row, got)


def test_rows_already_null_stay_null(mixture):
    """A batch may hold captions and none: a null row is its own unconditional estimate at any
    scale."""
    x = points()
    keep = torch.tensor([True, False] * 3 + [True])
    cond = {**of_class(1, 7), "keep": keep}
    got = classifier_free(5)(mixture.denoiser(flow()))(x, HALF, cond)
    torch.testing.assert_close(got[~keep], mixture.denoiser(flow())(x, HALF, NULL)[~keep])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_guiding_any_prediction_is_guiding_x0(mixture, name):
    """D is linear in F, so mixing scores, noises or velocities is mixing estimates of x0."""
    x, cond, denoise = points(), of_class(1, 7), mixture.denoiser(vp())
    free, held = denoise(x, HALF, NULL), denoise(x, HALF, cond)
    k, o = PREDICTIONS[name].solve(vp().at(HALF, x))
    mixed = torch.lerp((free - k * x) / o, (held - k * x) / o, 4.0)
    torch.testing.assert_close(
        classifier_free(4)(denoise)(x, HALF, cond), k * x + o * mixed, rtol=0, atol=1e-12
    )


def test_a_negative_condition_removes_its_class(mixture):
    path, cond = flow(), {"y": torch.zeros(len(ROWS), dtype=torch.long)}
    share = lambda x: (mixture.component(x) == 1).double().mean().item()
    # From the unconditional model away from class 1: the condition of every row is null.
    free = {**cond, "keep": torch.zeros(len(ROWS), dtype=torch.bool)}
    negative = {**of_class(1, len(ROWS)), "keep": torch.ones(len(ROWS), dtype=torch.bool)}
    shares = [
        share(drawn(mixture, classifier_free(scale, negative)(mixture.denoiser(path)), path, free))
        for scale in (1, 2, 4)
    ]
    assert shares[0] == pytest.approx(0.3, abs=0.04)
    assert shares[1] < 0.07
    assert shares[2] < 0.003


def test_guidance_trades_diversity_for_fidelity(mixture):
    """Ho & Salimans 2021, fig. 2: with the scale, p(y | x) grows, the spread shrinks, the mean
    moves off."""
    path, y = flow(), 2
    mixture = replace(mixture, widths=2.5 * mixture.widths)  # whose components overlap
    cond = of_class(y, len(ROWS))
    certain, spread, moved = [], [], []
    for scale in (1, 2, 4, 8):
        x = drawn(mixture, classifier_free(scale)(mixture.denoiser(path)), path, cond)
        zero = torch.zeros((), dtype=torch.float64)
        certain.append(classify(mixture, edm(), y)(x, zero, NULL).exp().mean().item())
        spread.append(torch.logdet(torch.cov(x.T)).item())
        moved.append((x.mean(0) - mixture.means[y]).norm().item())
    assert certain == sorted(certain)
    assert certain[0] < 0.97 < 0.99 < certain[-1]
    assert spread == sorted(spread, reverse=True)
    assert moved == sorted(moved)
    assert moved[0] < 0.05 < 0.2 < moved[-1]


def test_a_guide_of_scale_zero_is_not_asked(mixture):
    def asked(*_):
        raise AssertionError("a classifier of scale 0 was asked")

    denoise = mixture.denoiser(vp())
    assert classifier(vp(), asked, 0.0)(denoise) is denoise
    assert reconstruction(vp(), asked, 0.0)(denoise) is denoise


def test_outside_its_interval_guidance_is_off_and_free(mixture):
    path, cond = flow(), of_class(0, 7)
    counted = Counted(mixture.denoiser(path))
    guided = classifier_free(4, interval=(0.3, 0.7))(counted)
    sample(guided, ddim(path), points(), uniform_grid(10), cond)
    assert counted.calls == [7] * 3 + [14] * 5 + [7] * 2
    t = torch.linspace(0.1, 0.9, 7, dtype=torch.float64)
    inside = (t >= 0.3) & (t <= 0.7)
    mixed = guided(points(), t, cond)
    off, on = (
        mixture.denoiser(path)(points(), t, cond),
        classifier_free(4)(mixture.denoiser(path)),
    )
    torch.testing.assert_close(mixed[~inside], off[~inside])
    torch.testing.assert_close(mixed[inside], on(points(), t, cond)[inside])


def test_rescale_restores_each_row_s_contrast():
    x = normal(0, "x", torch.arange(3), (1, 8, 8))

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return x * (1 + cond["keep"].to(x))[:, None, None, None]

    cond = {"keep": torch.ones(3, dtype=torch.bool)}
    std = lambda x: x.flatten(1).std(1)
    torch.testing.assert_close(std(classifier_free(5)(denoise)(x, HALF, cond)), 6 * std(x))
    for rescale, factor in ((1, 2), (0.7, 0.7 * 2 + 0.3 * 6)):
        guided = classifier_free(5, rescale=rescale)(denoise)(x, HALF, cond)
        torch.testing.assert_close(std(guided), factor * std(x))


def test_conditions_are_stacked_with_their_sequences_padded():
    short = {"tokens": torch.ones(2, 3, 4), "mask": torch.ones(2, 3, dtype=torch.bool)}
    long = {"tokens": torch.ones(2, 5, 4), "mask": torch.ones(2, 5, dtype=torch.bool)}
    both = stack(short, long, torch.zeros(2))
    assert both["tokens"].shape == (4, 5, 4)
    assert both["mask"].sum(1).tolist() == [3, 3, 5, 5]
    assert both["keep"].all()
    with pytest.raises(ValueError, match="mask"):
        stack({"tokens": short["tokens"]}, long, torch.zeros(2))
    with pytest.raises(ValueError, match="only the length"):
        stack({"tokens": torch.ones(2, 3, 5)}, {"tokens": torch.ones(2, 3, 4)}, torch.zeros(2))


def test_autoguidance_moves_away_from_the_weak_model(mixture):
    strong, x = mixture.denoiser(flow()), points()
    weak = lambda x, t, cond: strong(x, t, cond) + 0.5
    torch.testing.assert_close(
        autoguidance(3, weak)(strong)(x, HALF, NULL), strong(x, HALF, NULL) - 1
    )
    assert torch.equal(autoguidance(1, weak)(strong)(x, HALF, NULL), strong(x, HALF, NULL))
    limited = autoguidance(3, weak, interval=(0.6, 1))(strong)
    assert torch.equal(limited(x, HALF, NULL), strong(x, HALF, NULL))


@pytest.mark.parametrize("path", [vp(), edm(), flow()], ids=lambda path: path.name)
@pytest.mark.parametrize("scale", [0, 1, 2, 4, 8])
def test_an_exact_classifier_guides_as_classifier_free_does(mixture, path, scale):
    """log p(y | x) = log p(x | y) - log p(x): s on the unconditional model is the scale s, and on
    the conditional one 1 + s."""
    x, cond, denoise = points(), of_class(1, 7), mixture.denoiser(path)
    t = path.inv(torch.tensor(0.8, dtype=torch.float64))
    x = x * path(t)[0]
    by_class = classifier(path, classify(mixture, path, 1), scale)
    lift = lambda cond: lambda denoise: lambda x, t, _: denoise(x, t, cond)
    for base, equal in ((NULL, scale), (cond, 1 + scale)):
        got = by_class(lift(base)(denoise))(x, t, NULL)
        torch.testing.assert_close(
            got, classifier_free(equal)(denoise)(x, t, cond), rtol=0, atol=1e-12
        )


def test_classifier_guidance_does_not_depend_on_the_step_count(mixture):
    """Adding the raw gradient after each step, as tutorials do, moves the mean with the number of
    steps."""
    path = vp()
    guided = classifier(path, classify(mixture, path, 0), 3.0)(mixture.denoiser(path))
    start = prior(path, normal(0, "start", ROWS, (2,)).double(), torch.ones(()))
    means = [
        sample(guided, heun(path), start, uniform_grid(steps)).mean(0)
        for steps in (50, 100, 200, 400)
    ]
    away = [(mean - means[-1]).abs().max().item() for mean in means]
    assert away[0] < 0.02
    assert away[2] < 0.002
    plain = drawn(mixture, mixture.denoiser(path), path).mean(0)
    assert (means[0] - plain).norm() > 1

    def as_tutorials_do(steps: int) -> Tensor:
        log_prob, step = classify(mixture, path, 0), ddim(path)
        x = prior(path, normal(0, "start", ROWS, (2,)).double(), torch.ones(()))
        for t, u in itertools.pairwise(uniform_grid(steps)):
            leaf = x.detach().requires_grad_()
            gradient = torch.autograd.grad(log_prob(leaf, t, NULL).sum(), leaf)[0]
            x = step(mixture.denoiser(path), x, t, u, NULL, torch.randn_like, [])
            x = x + 0.05 * gradient
        return x.mean(0)

    assert (as_tutorials_do(50) - as_tutorials_do(400)).norm() > 0.3


def test_at_pure_noise_a_classifier_leaves_the_estimate_alone(mixture):
    one = torch.ones((), dtype=torch.float64)
    guided = classifier(flow(), classify(mixture, flow(), 0), 3.0)(mixture.denoiser(flow()))
    x = points()
    assert torch.equal(guided(x, one, NULL), mixture.denoiser(flow())(x, one, NULL))


def test_clip_log_prob_is_the_scaled_cosine_and_can_guide():
    text = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    log_prob = clip_log_prob(lambda x, t: x, text, temperature=10.0)
    x = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    torch.testing.assert_close(log_prob(x, HALF, NULL), torch.tensor([10.0, 0.0]))
    guided = classifier(flow(), log_prob)(lambda x, t, cond: x)
    moved = guided(x, HALF, NULL) - x
    assert moved[1, 1] > 0
    torch.testing.assert_close(moved[0], torch.zeros(2), rtol=0, atol=1e-5)


def test_clip_loss_of_parallel_orthogonal_and_opposite_changes():
    zero = torch.zeros(3, 2)
    image = torch.tensor([[2.0, 0.0], [0.0, 0.5], [-3.0, 0.0]])
    text = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    torch.testing.assert_close(clip_loss(image, zero, text, zero), torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("operator", "gram"), [([[1.2, 1.6]], 4.0), ([[1.0, 0.0]], 1.0), ([[0.5, 0.5]], 0.5)],
    ids=["any", "mask", "mean"],
)  # fmt: skip
def test_a_linear_inverse_problem_has_its_posterior(operator, gram):
    """y = H x0 + n on N(m, v I), H of orthogonal rows: the samples are p(x0 | y), mean and
    covariance."""
    mean, std, noise_std = torch.tensor([0.5, -0.3], dtype=torch.float64), 0.8, 0.5
    h = torch.tensor(operator, dtype=torch.float64)
    measured = torch.tensor([[1.0]], dtype=torch.float64)
    path = edm()

    def denoise(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return mean + std**2 / (std**2 + path(t)[1] ** 2) * (x - mean)

    guide = linear_inverse(path, lambda x: x @ h.T, measured, noise_std, gram=gram, data_std=std)
    grid = karras_grid(path, 120, sigma_max=40.0)
    eps = normal(0, "start", torch.arange(4000), (2,)).double()
    covariance = torch.linalg.inv(torch.eye(2) / std**2 + h.T @ h / noise_std**2)
    posterior = covariance @ (mean / std**2 + (h.T @ measured[0]) / noise_std**2)
    # The flow is affine: starts that have exactly the moments of p(x_t | y) leave its error alone.
    eps = (eps - eps.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(eps.T))).T
    wide = covariance + path.ratio(grid[0]) ** 2 * torch.eye(2)
    start = posterior + eps @ torch.linalg.cholesky(wide).T
    x = sample(guide(denoise), heun(path), start, grid)
    assert (x.mean(0) - posterior).abs().max() < 0.003
    assert (torch.cov(x.T) - covariance).abs().max() < 0.003


def test_an_exact_measurement_model_gives_the_exact_posterior_of_a_mixture(mixture):
    """With p(y | x_t) itself any problem is a classifier of scale 1: here, which half-plane x0 is
    near."""
    path = vp()

    def log_prob(x: Tensor, t: Tensor, cond: Cond) -> Tensor:  # y: "component 0 or 2", exactly
        joint = mixture.log_joint(x, *path(t))
        return joint[:, [0, 2]].logsumexp(1) - joint.logsumexp(1)

    x = drawn(mixture, classifier(path, log_prob)(mixture.denoiser(path)), path, steps=100)
    shares = torch.bincount(mixture.component(x), minlength=3) / len(x)
    assert (shares - torch.tensor([2 / 7, 0, 5 / 7])).abs().max() < 0.04


def test_dynamic_threshold_follows_each_row_s_quantile():
    x = (
        normal(0, "x", torch.arange(3), (3, 8, 8))
        * torch.tensor([0.2, 1.0, 4.0])[:, None, None, None]
    )
    same = lambda x, t, cond: x
    got = dynamic_threshold(0.9)(same)(x, HALF, NULL)
    for row, out in zip(x, got, strict=True):
        size = torch.quantile(row.abs(), 0.9).clamp(min=1)
        torch.testing.assert_close(out, row.clamp(-size, size) / size)
    assert torch.equal(got[0], x[0])
    assert got.abs().max() <= 1
    torch.testing.assert_close(dynamic_threshold(0.9)(same)(x[1:], HALF, NULL), got[1:])
    assert torch.equal(dynamic_threshold(0.9, ceiling=1)(same)(x, HALF, NULL), x.clamp(-1, 1))
    assert torch.equal(static_threshold(0.5)(same)(x, HALF, NULL), x.clamp(-0.5, 0.5))


def test_guides_compose_outwards():
    double = lambda denoise: lambda x, t, cond: 2 * denoise(x, t, cond)
    x = torch.full((1, 2), 0.8)
    same = lambda x, t, cond: x
    assert (compose(double, static_threshold())(same)(x, HALF, NULL) == 1).all()
    assert (compose(static_threshold(), double)(same)(x, HALF, NULL) == 1.6).all()
