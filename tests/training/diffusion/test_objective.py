"""Objectives: weights, times, score matching and bounds, against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from training.diffusion import PREDICTIONS, Model, edm, flow, loss, normal, table, uniform, ve, vp
from training.diffusion.objective import (
    Uncertainty,
    Weight,
    denoising_score_matching,
    directional,
    discrete_times,
    elbo,
    explicit_score_matching,
    gaussian_log_prob,
    hybrid_loss,
    kl,
    logit_normal_times,
    lognormal_times,
    sliced_score_matching,
    trace,
    uniform_times,
    variance_bound,
    weight,
)  # fmt: skip
from training.diffusion.path import named_betas

ROWS = torch.arange(4000)
QUANTILES = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


def batch(mixture, path, rows: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    x0, eps = mixture.draw(rows)[0], normal(0, "eps", ROWS[:rows], (2,)).double()
    return x0, 0.05 + 0.9 * uniform(0, "t", ROWS[:rows]).double(), eps


def weighing(name: str, **options) -> Weight:
    named = weight(name, **options)
    assert named is not None
    return named


def exact(mixture, path, prediction) -> Model:
    """A model whose network says what makes its estimate the mixture's."""

    def network(x: Tensor, label: Tensor, cond) -> Tensor:
        ratio = (4 * label).exp()  # labels are unclamped on the times used here
        t = path.inv(ratio)
        a, s = path.at(t, x)
        x = x * (s**2 + (a * prediction.sigma_data) ** 2).sqrt()
        k, o = prediction.solve((a, s))
        return (mixture.denoiser(path)(x, t, cond) - k * x) / o

    return Model(network, path, prediction)


@pytest.mark.parametrize("name", PREDICTIONS)
@pytest.mark.parametrize("weigh", ["x0", "snr", "v", "flow", "edm", "min_snr"])
def test_a_weighted_loss_is_the_same_for_every_prediction(mixture, name, weigh):
    path = vp()
    x0, t, eps = batch(mixture, path)
    model = exact(mixture, path, PREDICTIONS[name])
    got = loss(model, x0, t, eps, weight=weight(weigh))
    error = (x0 - mixture.denoiser(path)(path.noise(x0, eps, t), t, {})).square().mean(1)
    torch.testing.assert_close(got, weighing(weigh)(path.snr(t)) * error, rtol=1e-7, atol=1e-9)


def test_plain_error_of_the_noise_is_ddpm_s(mixture):
    path = vp()
    x0, t, eps = batch(mixture, path)
    model = Model(lambda x, label, cond: x.sin(), path, PREDICTIONS["eps"])
    wanted = (path.noise(x0, eps, t).sin() - eps).square().mean(1)
    c_in = 1.0  # a^2 + s^2 = 1 here
    torch.testing.assert_close(loss(model, x0, t, eps), wanted * c_in)
    torch.testing.assert_close(loss(model, x0, t, eps, weight=weighing("snr")), wanted)


def test_ncsn_s_score_loss_is_ddpm_s_noise_loss(mixture):
    path = ve()
    x0, t, eps = batch(mixture, path)
    _, s = path.at(t, x0)

    def network(x: Tensor, label: Tensor, cond) -> Tensor:
        return x.cos() / s

    got = loss(Model(network, path, PREDICTIONS["score"]), x0, t, eps, weight=weighing("snr"))
    score = (path.noise(x0, eps, t) * (s**2 + 1).rsqrt()).cos() / s
    torch.testing.assert_close(got, (s**2 * (score + eps / s).square()).mean(1))


def test_the_exact_denoiser_has_the_least_loss(gaussian):
    """On N(m, v I): E|x0 - D|^2 per element = v s^2 / (a^2 v + s^2)."""
    path, rows = vp(), 4000
    x0, eps = gaussian.draw(rows)[0], normal(0, "eps", ROWS, (2,)).double()
    t = torch.full((rows,), 0.3, dtype=torch.float64)
    best = loss(exact(gaussian, path, PREDICTIONS["v"]), x0, t, eps, weight=weighing("x0")).mean()
    a, s = path(t[0])
    assert best.item() == pytest.approx((0.36 * s**2 / (a**2 * 0.36 + s**2)).item(), rel=0.05)
    worse = Model(
        lambda x, label, cond: 1.05 * exact_network(x, label, cond), path, PREDICTIONS["v"]
    )
    assert loss(worse, x0, t, eps, weight=weighing("x0")).mean() > best


def exact_network(x: Tensor, label: Tensor, cond) -> Tensor:
    """v on N((.7, -.4), .36 I) in the vp gauge, where its input is x itself."""
    path = vp()
    a, s = path.at(path.inv((4 * label).exp()), x)
    mean = torch.tensor([0.7, -0.4], dtype=torch.float64)
    x0 = mean + a * 0.36 / (a**2 * 0.36 + s**2) * (x - a * mean)
    return (a * x - x0) / s


def test_published_weights():
    snr = torch.tensor([1e-4, 1.0, 4.0, 100.0])
    assert weight("none") is None
    torch.testing.assert_close(weighing("min_snr")(snr), snr.clamp(max=5))
    torch.testing.assert_close(weighing("min_snr", limit=2)(snr), snr.clamp(max=2))
    torch.testing.assert_close(
        weighing("flow", limit=50)(snr), ((1 + snr.sqrt()) ** 2).clamp(max=50)
    )
    sigma = snr.rsqrt()
    torch.testing.assert_close(weighing("edm")(snr), (sigma**2 + 0.25) / (sigma * 0.5) ** 2)
    with pytest.raises(ValueError, match="min_snr"):
        weight("p2")
    with pytest.raises(ValueError, match="with a path"):
        weight("likelihood")


@pytest.mark.parametrize("path", [vp(), edm(), flow()], ids=lambda path: path.name)
def test_likelihood_weight_is_the_slope_of_the_snr(path):
    t = torch.linspace(0.05, 0.95, 50, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(path.snr(t).sum(), t)
    torch.testing.assert_close(weighing("likelihood", path=path)(path.snr(t.detach())), -slope)
    assert weighing("likelihood", path=flow())(torch.zeros(1)) == 0


@pytest.mark.parametrize("weigh", ["none", "x0", "min_snr", "v"])
@pytest.mark.parametrize("name", ["x0", "v", "flow"])
def test_the_loss_is_finite_at_pure_noise(name, weigh):
    x0, eps = torch.randn(2, 3, 4)
    model = Model(lambda x, label, cond: 0 * x, flow(), PREDICTIONS[name])
    assert loss(model, x0, torch.ones(3), eps, weight=weight(weigh)).isfinite().all()


def test_uncertainty_is_least_at_the_log_of_the_loss(mixture):
    x0, t, eps = batch(mixture, flow())
    model = Model(lambda x, label, cond: 0 * x, flow())
    plain = loss(model, x0, t, eps)
    known = loss(model, x0, t, eps, uncertainty=lambda label: plain.log())
    torch.testing.assert_close(known, 1 + plain.log())
    for other in (plain / 2, plain * 2):
        worse = loss(model, x0, t, eps, uncertainty=lambda _, u=other.log(): u)
        assert (worse > known).all()
    head = Uncertainty()
    torch.testing.assert_close(
        loss(model, x0.float(), t.float(), eps.float(), uncertainty=head), plain.float()
    )
    assert sum(p.numel() for p in head.parameters()) == 128


def test_times_have_their_densities():
    flat = uniform_times(0.01)(QUANTILES)
    assert (flat.min().item(), flat.max().item()) == pytest.approx((0.01, 1), abs=1e-3)
    logit = logit_normal_times(0.3, 0.8, t_min=0)(QUANTILES).logit()
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((0.3, 0.8), abs=2e-3)
    log_sigma = edm().ratio(lognormal_times(edm())(QUANTILES)).log()
    assert (log_sigma.mean().item(), log_sigma.std().item()) == pytest.approx((-1.2, 1.2), abs=2e-3)
    states = discrete_times(10)(QUANTILES) * 10
    assert states.unique(return_counts=True)[1].tolist() == [400] * 10
    assert states.unique().tolist() == pytest.approx(range(1, 11))


def test_a_share_of_logit_normal_times_may_be_uniform():
    mixed = logit_normal_times(uniform_share=0.1, t_min=1e-3)(QUANTILES)
    tail = (mixed > 0.99).double().mean().item()
    normal_tail = 1 - torch.special.ndtr(torch.tensor(0.99).logit()).item()
    assert tail == pytest.approx(0.1 * 0.01 + 0.9 * normal_tail, abs=5e-4)
    assert mixed.min() >= 1e-3
    assert mixed.max() < 1


def test_extreme_draws_give_usable_times():
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    for times in (
        uniform_times(), discrete_times(1000), logit_normal_times(), lognormal_times(edm()),
        logit_normal_times(uniform_share=0.1),
    ):  # fmt: skip
        t = times(ends)
        assert ((t > 0) & (t <= 1)).all()
        assert t.dtype == torch.float32


def gaussian_rows(rows: int = 400_000) -> tuple[Tensor, Tensor]:
    """Samples whose own second moment is S exactly, so that minimisers have no sampling error."""
    s = torch.tensor([[1.0, 0.4], [0.4, 0.5]], dtype=torch.float64)
    x = normal(0, "x", torch.arange(rows), (2,)).double()
    whiten = torch.linalg.cholesky(torch.linalg.inv(x.T @ x / rows))
    return x @ whiten @ torch.linalg.cholesky(s).T, s


def minimiser(objective, rows: Tensor) -> Tensor:
    """The P of the score -P x at which the mean objective, a quadratic in P, is least."""
    zero = torch.zeros(4, dtype=torch.float64)
    mean = lambda p: objective(lambda x: -x @ p.reshape(2, 2).T, rows).mean()
    p = zero.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(mean(p), p)
    columns = []
    for unit in torch.eye(4, dtype=torch.float64):
        q = unit.clone().requires_grad_()
        columns.append(torch.autograd.grad(mean(q), q)[0] - gradient)
    return torch.linalg.solve(torch.stack(columns, 1), -gradient).reshape(2, 2)


def test_explicit_and_sliced_score_matching_find_the_inverse_covariance():
    x, s = gaussian_rows()
    torch.testing.assert_close(minimiser(explicit_score_matching, x), torch.linalg.inv(s))
    directions = normal(0, "v", torch.arange(len(x)), (2,)).double()
    sliced = minimiser(lambda score, x: sliced_score_matching(score, x, directions), x)
    torch.testing.assert_close(sliced, torch.linalg.inv(s), rtol=0, atol=0.017)


def test_denoising_score_matching_finds_the_blurred_one():
    x, s = gaussian_rows()
    eps = normal(0, "eps", torch.arange(len(x)), (2,)).double()
    found = minimiser(lambda score, x: denoising_score_matching(score, x, eps, 0.5), x)
    wanted = torch.linalg.inv(s + 0.25 * torch.eye(2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.006)


def test_traces_of_a_known_jacobian():
    matrix = torch.tensor([[2.0, 1.0], [5.0, -3.0]], dtype=torch.float64)
    x = normal(0, "x", torch.arange(5), (2,)).double()
    score = lambda x: x @ matrix.T + x**2
    value, exact_trace = trace(score, x)
    torch.testing.assert_close(value, score(x))
    torch.testing.assert_close(exact_trace, -1 + 2 * x.sum(1))
    v = torch.tensor([[1.0, -1.0]], dtype=torch.float64).expand_as(x)
    torch.testing.assert_close(directional(score, x, v)[1], -1 - 6 + 2 * x.sum(1))


def test_kl_is_torch_s():
    m, l, n, k = normal(0, "kl", torch.arange(5), (4, 3)).unbind(1)
    p = torch.distributions.Normal(m, (l / 2).exp())
    q = torch.distributions.Normal(n, (k / 2).exp())
    torch.testing.assert_close(
        kl(m, l, n, k), torch.distributions.kl_divergence(p, q).sum(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(gaussian_log_prob(n, m, l), p.log_prob(n).sum(1))
    assert kl(m, l, m, l).tolist() == [0] * 5


def test_elbo_of_probabilistic_pca_is_the_evidence_minus_the_gap():
    """x = W z + N(0, .3): with the exact posterior the bound is log p(x); with another it lacks the
    KL."""
    w = torch.tensor([[1.0], [0.5], [-0.7]], dtype=torch.float64)
    x = normal(0, "x", torch.arange(6), (3,)).double()
    noise = 0.3
    variance = 1 / (1 + (w.T @ w).item() / noise)
    posterior = variance / noise * (x @ w)
    evidence = torch.distributions.MultivariateNormal(
        torch.zeros(3, dtype=torch.float64), w @ w.T + noise * torch.eye(3, dtype=torch.float64)
    ).log_prob(x)

    def bound(mean: Tensor, logvar: Tensor) -> Tensor:
        """log p(x | z) is quadratic in z: its expectation is its mean over z = mean +- width."""
        each = [
            gaussian_log_prob(
                x, (mean + sign * (logvar / 2).exp()) @ w.T, torch.full_like(x, math.log(noise))
            )
            for sign in (-1, 1)
        ]
        return elbo((each[0] + each[1]) / 2, mean, logvar)

    logvar = torch.full_like(posterior, math.log(variance))
    torch.testing.assert_close(bound(posterior, logvar), evidence, rtol=0, atol=1e-13)
    other = posterior + 0.4, logvar - 1
    gap = kl(*other, posterior, logvar)
    torch.testing.assert_close(bound(*other), evidence - gap, rtol=0, atol=1e-13)


def test_variance_bound_is_the_kl_of_the_two_posteriors():
    """With the exact x0 and the small variance it is nothing; with a wrong x0 it is the means'
    distance."""
    path = table(named_betas("linear", 100))
    x0 = normal(0, "x0", torch.arange(4), (2, 3)).double()
    t = torch.tensor([0.02, 0.3, 0.5, 1.0], dtype=torch.float64)
    u = t - 0.01
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    assert variance_bound(path, x0, x0, zero, t, u).abs().max() < 1e-12
    small, large = path.posterior(t, u)
    ratio = (small / large) ** 2
    torch.testing.assert_close(
        variance_bound(path, x0, x0, one, t, u), (ratio - 1 - ratio.log()) / 2
    )
    (a, s), (a_u, s_u) = path(t), path(u)
    shrink = a_u - (s_u**2 - small**2).sqrt() * a / s
    torch.testing.assert_close(
        variance_bound(path, x0, x0 + 0.1, zero, t, u), (0.1 * shrink / small) ** 2 / 2
    )


def test_at_the_data_the_bound_is_a_likelihood():
    path = table(named_betas("linear", 100))
    x0 = normal(0, "x0", torch.arange(4), (2, 3)).double()
    first = torch.full((4,), 0.01, dtype=torch.float64)
    got = variance_bound(path, x0, x0 + 0.1, torch.zeros_like(x0), first, 0 * first)
    beta = named_betas("linear", 100)[0]
    wanted = ((2 * math.pi * beta).log() + 0.01 / beta) / 2
    torch.testing.assert_close(got, wanted.expand(4))


def test_the_bound_teaches_the_variance_and_not_the_mean():
    path = table(named_betas("linear", 100))
    parts = torch.randn(2, 1, 2, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, fraction = (part.requires_grad_() for part in parts.unbind())
    model = Model(
        lambda x, label, cond: torch.cat([(mean * x), fraction.expand_as(x)], 1),
        path, PREDICTIONS["eps"], learned_variance=True,
    )  # fmt: skip
    x0, eps = normal(0, "x", torch.arange(3), (2, 2, 4)).double().unbind(1)
    t = torch.tensor([0.5, 0.2, 0.9], dtype=torch.float64)
    gradient = lambda share: torch.autograd.grad(
        hybrid_loss(model, x0, t, eps, steps=100, share=share).sum(), (mean, fraction)
    )
    simple, hybrid = gradient(0.0), gradient(1.0)
    assert torch.equal(simple[0], hybrid[0])
    assert (simple[1] == 0).all()
    assert (hybrid[1] != 0).all()
    plain = Model(lambda x, label, cond: mean * x, path, PREDICTIONS["eps"])
    torch.testing.assert_close(
        hybrid_loss(model, x0, t, eps, steps=100, share=0.0), loss(plain, x0, t, eps)
    )


def test_the_bound_s_best_variance_is_the_analytic_one(gaussian):
    """Analytic-DPM (Bao et al. 2022, eq. 8): what q has, and what is not known of x0, carried over.

    The paper's L_vlb is the sum over all steps: `hybrid_loss` weighs a step by their number.
    """
    path, rows = table(named_betas("linear", 100)), 4000
    x0, eps = gaussian.draw(rows)[0], normal(0, "eps", ROWS, (2,)).double()
    denoise = gaussian.denoiser(path)
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, label: Tensor, cond) -> Tensor:
        time = path.inv((4 * label).exp())
        return torch.cat([denoise(x, time, cond), torch.tanh(logit).expand_as(x)], 1)

    model = Model(network, path, PREDICTIONS["x0"], learned_variance=True)
    for state in (20, 60):
        t, u = (torch.full((rows,), k / 100, dtype=torch.float64) for k in (state, state - 1))
        enough = {"max_iter": 50, "tolerance_grad": 1e-12, "tolerance_change": 1e-15}
        optimizer = torch.optim.LBFGS([logit], line_search_fn="strong_wolfe", **enough)

        def closure(t=t, optimizer=optimizer):
            optimizer.zero_grad()
            value = hybrid_loss(model, x0, t, eps, steps=100).mean()
            value.backward()
            return value

        optimizer.step(closure)
        (a, s), (small, large) = path(t[0]), path.posterior(t[0], u[0])
        share = (torch.tanh(logit.detach()) + 1) / 2
        got = (small ** (1 - share) * large**share) ** 2
        unknown = 0.36 * s**2 / (a**2 * 0.36 + s**2)
        shrink = path.back(torch.zeros(1, 1), torch.ones(1, 1), t[:1], u[:1], small)
        estimate = denoise(path.noise(x0, eps, t), t, {})
        missed = small**2 + shrink**2 * (x0 - estimate).square().mean()
        assert got.item() == pytest.approx(missed.item(), rel=1e-4)
        assert got.item() == pytest.approx((small**2 + shrink**2 * unknown).item(), rel=0.03)
        bound = variance_bound(path, x0, estimate, share.expand_as(x0), t, u)
        simple = loss(model, x0, t, eps)
        hybrid = hybrid_loss(model, x0, t, eps, steps=100)
        torch.testing.assert_close(hybrid.detach() - simple.detach(), 0.1 * bound)
