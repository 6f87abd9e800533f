"""The loop against a bare one, against itself resumed, and against numbers that are none."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from training import checkpoint, health
from training.accelerators import native_precision
from training.checkpoint import TrainState
from training.config import TrainingConfig
from training.loop import Diverged, World, train
from training.optimizer import AdamWConfig, MuonConfig
from training.stage import Stage

CONFIG = TrainingConfig(
    images=8 * 20,
    batch=8,
    learning_rate=1e-2,
    warmup_images=40,
    schedule="cosine",
    optimizer=AdamWConfig(weight_decay=0.1),
    max_grad_norm=0.5,
    ema_halflife_images=100,
)


class Regression(Stage):
    """A small network with dropout; `noise` depends on the position alone."""

    def __init__(self, dropout: float = 0.0):
        super().__init__(None)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Dropout(dropout), nn.Linear(32, 1))
        self.frozen = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, batch):
        noise = torch.sin(batch["position"].double() * 12.9898).float()[:, None]
        y = self.net(batch["x"] * self.frozen + 0.01 * noise)[:, 0].float()
        loss = (y - batch["y"]).square()
        return {"loss": loss, "error": (y - batch["y"]).detach().abs().mean()}


class Rows:
    """Some `rows` of endless batches, in `parts`; `poison` (step -> row) holds values that are not
    numbers."""

    def __init__(
        self, batch: int = 8, rows: slice = slice(None), poison: dict | None = None, parts: int = 1
    ):
        self.batch_size, self.rows, self.poison = batch, rows, poison or {}
        self.parts = [slice(batch * n // parts, batch * (n + 1) // parts) for n in range(parts)]
        self.closed, self.asked = False, []

    def batch(self, step: int):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(self.batch_size, 6, generator=generator)
        if step in self.poison:
            x[self.poison[step], 0] = float("nan")
        position = step * self.batch_size + torch.arange(self.batch_size)
        whole = {
            "x": x.numpy(),
            "y": x[:, :3].sum(1).numpy(),
            "position": position.numpy(),
            "key": [f"k{p}" for p in position.tolist()],
        }
        return {name: value[self.rows] for name, value in whole.items()}

    def batches(self, start_step: int = 0, prefetch: int = 2):
        try:
            for step in itertools.count(start_step):
                self.asked.append(step)
                whole = self.batch(step)
                for part in self.parts:
                    yield {name: value[part] for name, value in whole.items()}
        finally:
            self.closed = True


def weights(stage: Stage) -> dict:
    return {n: p.detach().clone() for n, p in stage.named_parameters()}


def test_it_does_what_a_bare_loop_does():
    stage, bare = Regression(), Regression()
    losses = [float(p.loss) for p in train(stage, Rows(), CONFIG)]

    matrices = [p for p in bare.net.parameters() if p.ndim > 1]
    vectors = [p for p in bare.net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
        betas=(0.9, 0.99),
    )
    expected, average = [], weights(bare)
    for step in range(20):
        seen = 8 * step
        done = (seen - 40) / (160 - 40)
        warm = min(1, (seen + 8) / 40)
        rate = 1e-2 * (warm if seen < 40 else 0.5 + 0.5 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = {k: torch.as_tensor(v) for k, v in Rows().batch(step).items() if k != "key"}
        loss = bare(batch)["loss"].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.net.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
        decay = 0.5 ** (8 / min(100, 0.05 * (seen + 8)))
        average = {n: decay * average[n] + (1 - decay) * p for n, p in weights(bare).items()}

    assert losses == pytest.approx(expected, rel=1e-5)
    for name, p in weights(stage).items():
        torch.testing.assert_close(p, weights(bare)[name], rtol=1e-4, atol=1e-6)

    ema = list(train(Regression(), Rows(), CONFIG))[-1].ema.tensors()
    assert "frozen" not in ema
    for name, p in ema.items():
        torch.testing.assert_close(p, average[name], rtol=1e-4, atol=1e-6)


def test_it_learns():
    config = replace(CONFIG, images=64 * 300, batch=64, max_grad_norm=0.0)
    losses = [float(p.loss) for p in train(Regression(), Rows(64), config)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("optimizer", [AdamWConfig(), MuonConfig()], ids=lambda c: c.kind)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resuming_anywhere_is_bit_identical(tmp_path, optimizer, precision):
    config = replace(CONFIG, optimizer=optimizer, precision=precision)
    unbroken = Regression(dropout=0.5)
    steps = list(train(unbroken, Rows(), config))
    for stop in (1, 7, 19):
        stage = Regression(dropout=0.5)
        progress = next(itertools.islice(train(stage, Rows(), config), stop - 1, None))
        checkpoint.save(tmp_path / str(stop), progress.state)
        torch.rand(3)  # what else draws random numbers does not matter
        resumed = Regression(dropout=0.5)
        nn.init.zeros_(next(resumed.net.parameters()))
        state = checkpoint.newest(tmp_path / str(stop))
        later = list(train(resumed, Rows(), config, state=state))
        assert [float(p.loss) for p in later] == [float(p.loss) for p in steps[stop:]]
        assert all(p.equal(weights(unbroken)[n]) for n, p in weights(resumed).items())
        final, wanted = later[-1].state, steps[-1].state
        assert all(t.equal(wanted.tensors[n]) for n, t in final.tensors.items())
        assert later[-1].images_seen == config.images


def test_a_finished_state_has_no_more_steps():
    state = list(train(Regression(), Rows(), CONFIG))[-1].state
    rows = Rows()
    assert list(train(Regression(), rows, CONFIG, state=state)) == []
    assert rows.asked == []


def test_the_loader_is_closed_when_the_caller_stops():
    rows = Rows()
    progress = train(Regression(), rows, CONFIG)
    next(progress)
    progress.close()
    assert rows.closed


def test_masters_stay_float32_in_bf16():
    stage, seen = Regression(), []
    stage.net[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    progress = list(train(stage, Rows(), replace(CONFIG, precision="bf16")))
    assert set(seen) == {torch.bfloat16}
    tensors = progress[-1].state.tensors
    assert {t.dtype for n, t in tensors.items() if n != "weights/frozen"} == {torch.float32}
    exact = list(train(Regression(), Rows(), CONFIG))
    assert float(progress[0].loss) == pytest.approx(float(exact[0].loss), rel=0.05)
    assert float(progress[0].loss) != float(exact[0].loss)


def test_auto_is_what_the_device_computes_itself():
    precision = native_precision("cpu")
    assert CONFIG.precision_on("cpu") == "fp32"
    found, wanted = (
        [float(it.loss) for it in train(Regression(), Rows(), replace(CONFIG, precision=named))]
        for named in ("auto", precision)
    )
    assert found == wanted


def test_an_update_that_is_not_finite_is_not_applied():
    stage = Regression()
    before = weights(stage)
    for progress in train(stage, Rows(poison={3: 5}), CONFIG):
        changed = any(not p.equal(before[n]) for n, p in weights(stage).items())
        assert changed != (progress.step == 4)
        assert bool(progress.skipped) == (progress.step == 4)
        assert all(t.isfinite().all() for t in progress.state.tensors.values())
        before = weights(stage)


def test_a_gradient_that_overflows_is_not_applied_either():
    class Steep(Regression):
        def forward(self, batch):
            out = super().forward(batch)
            steep = 1e38 if 24 in batch["position"] else 1.0
            return {"loss": steep * out["loss"]}

    skipped = [bool(p.skipped) for p in train(Steep(), Rows(), CONFIG)]
    assert [n for n, s in enumerate(skipped) if s] == [3]


def test_too_many_in_a_row_stop_and_name_the_samples():
    rows = Rows(poison={5: 0, 6: 1, 7: 2, 8: 3})
    told = r"step 8 \(64 images\).*4 updates in a row.*k40, k49, k58, k67"
    with pytest.raises(Diverged, match=told) as caught:
        list(train(Regression(), rows, CONFIG))
    assert rows.asked[-1] == 8
    assert caught.value.keys == ["k40", "k49", "k58", "k67"]


@pytest.mark.parametrize("optimizer", [AdamWConfig(), MuonConfig()], ids=lambda c: c.kind)
def test_who_looks_now_and_then_stops_the_same_training_at_the_same_state(monkeypatch, optimizer):
    """As on a GPU: what follows is finite, and is not applied before somebody looks."""
    config = replace(CONFIG, images=8 * 40, optimizer=optimizer)
    poison, found = {12: 0, **dict.fromkeys(range(19, 23), 1)}, []
    for every, looked in ((1, 22), (16, 32)):
        monkeypatch.setattr(health, "looks_every", lambda _, every=every: every)
        rows, stage, skipped = Rows(poison=poison), Regression(dropout=0.5), []
        with pytest.raises(Diverged, match=r"step 22 \(176 images\).* in 4 updates in a") as caught:
            skipped += (bool(p.skipped) for p in train(stage, rows, config))
        assert rows.asked[-1] == looked
        assert skipped[22:] == [True] * (looked - 22)
        assert caught.value.step == 22
        assert caught.value.keys == [f"k{8 * step + 1}" for step in range(19, 23)]
        found.append(caught.value)
    one, other = (error.state for error in found)
    assert str(found[0]) == str(found[1])
    assert (one.step, one.images_seen, one.numbers) == (22, 176, {"skipped": 4})
    assert (other.step, other.images_seen, other.numbers) == (22, 176, {"skipped": 4})
    assert one.tensors.keys() == other.tensors.keys()
    for name, tensor in one.tensors.items():
        assert name.startswith("ema/") or tensor.equal(other.tensors[name]), name


def test_who_looks_now_and_then_goes_on_with_what_recovers(monkeypatch):
    config = replace(CONFIG, images=8 * 40)
    poison = dict.fromkeys((2, 3, 4, 17, 18, 19, 21, 30, 31, 33), 0)
    losses, final = [], []
    for every in (1, 16):
        monkeypatch.setattr(health, "looks_every", lambda _, every=every: every)
        stage = Regression(dropout=0.5)
        losses.append([float(p.loss) for p in train(stage, Rows(poison=poison), config)])
        final.append(weights(stage))
    assert len(losses[0]) == 40
    torch.testing.assert_close(*losses, rtol=0, atol=0, equal_nan=True)
    assert all(p.equal(final[1][name]) for name, p in final[0].items())


def test_a_run_that_recovers_is_not_stopped_where_fewer_may_be_skipped_now():
    rows = Rows(poison=dict.fromkeys(range(4, 7), 0))
    state = next(itertools.islice(train(Regression(), rows, CONFIG), 6, None)).state
    assert state.numbers == {"skipped": 3}
    strict = replace(CONFIG, max_skipped=1)
    assert len(list(train(Regression(), rows, strict, state=state))) == 13
    with pytest.raises(Diverged, match="step 7"):
        list(train(Regression(), Rows(poison={7: 0}), strict, state=state))


def test_a_finite_update_in_between_starts_the_count_anew():
    poison = {2: 0, 3: 0, 4: 0, 6: 0, 7: 0, 8: 0}
    assert len(list(train(Regression(), Rows(poison=poison), CONFIG))) == 20


def test_the_count_survives_resuming():
    rows = Rows(poison=dict.fromkeys(range(4, 8), 0))
    progress = next(itertools.islice(train(Regression(), rows, CONFIG), 5, None))
    assert progress.state.numbers == {"skipped": 2}
    with pytest.raises(Diverged, match="step 7"):
        list(train(Regression(), rows, CONFIG, state=progress.state))


def test_where_no_row_is_to_blame_all_are_named():
    class Broken(Regression):
        def forward(self, batch):
            out = super().forward(batch)
            zero = next(self.net.parameters()).sum() * 0
            return {"loss": out["loss"] + zero.sqrt()}  # finite, but its gradient is not

    with pytest.raises(Diverged, match=r"Their samples: k0, .* and 16 more") as e:
        list(train(Broken(), Rows(), CONFIG))
    assert e.value.keys == [f"k{n}" for n in range(32)]


def test_a_worker_averages_over_the_global_batch():
    """Shares of 3 and 5 rows: what they add up is sums, not means of means."""
    whole = next(train(Regression(), Rows(), CONFIG))
    summed = []
    for rank, rows in enumerate((slice(0, 3), slice(3, 8))):
        world = World(rank, 2, sum=lambda tensor: summed.append(tensor) or tensor)
        next(train(Regression(), Rows(rows=rows), CONFIG, world))
    loss, error, stop = (summed[0] + summed[1]) / 8
    assert stop == 0
    assert loss == pytest.approx(float(whole.loss), rel=1e-6)
    assert error == pytest.approx(float(whole.metrics["error"]), rel=1e-6)


@pytest.mark.parametrize(("micro_batch", "parts"), [(1, 8), (3, 3), (4, 2), (7, 2)])
def test_micro_batches_add_up_to_the_update_of_the_whole_batch(micro_batch, parts):
    """Losses, norms and metrics within 1e-5 of their value (fp32), weights within 1e-5 of their
    norm; also where the micro-batches differ in size."""
    whole, cut = Regression(), Regression()
    one = list(train(whole, Rows(), CONFIG))
    config = replace(CONFIG, micro_batch=micro_batch)
    other = list(train(cut, Rows(parts=parts), config))
    for a, b in zip(one, other, strict=True):
        assert float(b.loss) == pytest.approx(float(a.loss), rel=1e-5)
        assert float(b.grad_norm) == pytest.approx(float(a.grad_norm), rel=1e-5)
        assert float(b.metrics["error"]) == pytest.approx(float(a.metrics["error"]), rel=1e-5)
        assert (a.images_seen, a.learning_rate) == (b.images_seen, b.learning_rate)
    for name, p in weights(whole).items():
        assert (p - weights(cut)[name]).norm() <= 1e-5 * p.norm(), name


def test_one_micro_batch_is_the_whole_batch_bit_for_bit():
    whole, cut = Regression(dropout=0.5), Regression(dropout=0.5)
    one = [float(p.loss) for p in train(whole, Rows(), CONFIG)]
    other = [float(p.loss) for p in train(cut, Rows(), replace(CONFIG, micro_batch=9))]
    assert one == other
    assert all(p.equal(weights(whole)[n]) for n, p in weights(cut).items())


def test_resuming_in_micro_batches_is_bit_identical():
    config = replace(CONFIG, micro_batch=3)
    unbroken = Regression(dropout=0.5)
    steps = list(train(unbroken, Rows(parts=3), config))
    progress = next(itertools.islice(train(Regression(0.5), Rows(parts=3), config), 6, None))
    state = progress.state
    resumed = Regression(dropout=0.5)
    later = [float(p.loss) for p in train(resumed, Rows(parts=3), config, state=state)]
    assert later == [float(p.loss) for p in steps[7:]]
    assert all(p.equal(weights(unbroken)[n]) for n, p in weights(resumed).items())


def test_dropout_differs_between_micro_batches():
    class Masks(Regression):
        def forward(self, batch):
            seen.append(self.net[2](torch.ones(2, 32)))
            return super().forward(batch)

    seen = []
    next(train(Masks(0.5), Rows(parts=4), replace(CONFIG, micro_batch=2)))
    assert len(seen) == 4
    assert not any(a.equal(b) for a, b in itertools.combinations(seen, 2))


def test_a_bad_micro_batch_skips_the_whole_update_and_is_named():
    config = replace(CONFIG, micro_batch=3)
    rows = Rows(poison={3: 7, 5: 0, 6: 3, 7: 5, 8: 7}, parts=3)
    skipped = []
    with pytest.raises(Diverged, match="step 8") as caught:
        skipped += (bool(p.skipped) for p in train(Regression(), rows, config))
    assert caught.value.keys == ["k40", "k51", "k61", "k71"]
    alone = Rows(poison={3: 7}, parts=3)
    skipped = [bool(p.skipped) for p in train(Regression(), alone, config)]
    assert [n for n, s in enumerate(skipped) if s] == [3]


@pytest.mark.parametrize(
    ("rank", "rows", "parts", "told"),
    [
        (0, slice(0, 2), 1, ["alone", "k0", "together", "k0"]),
        (1, slice(2, 8), 2, ["alone", "k2", "together", "k6"]),
    ],
)
def test_workers_add_up_their_gradients_once_per_update(rank, rows, parts, told):
    """Of three micro-batches the first of two workers has one, and repeats it to keep step."""
    order = []

    @contextmanager
    def alone(module):
        order.append("alone")
        yield
        order.append("together")

    class Told(Regression):
        def forward(self, batch):
            order.append(batch["key"][0])
            return super().forward(batch)

    world = World(rank, 2, alone=alone)
    next(train(Told(), Rows(rows=rows, parts=parts), replace(CONFIG, micro_batch=3), world))
    assert order == told


def compiled(backend: str | Callable[..., object]) -> Regression:
    class Compiled(Regression):
        def compile(self, *args, **kwargs):
            super().compile(*args, backend=backend, **kwargs)

    return Compiled()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_it_trains_as_it_does_otherwise():
    """From the graphs that are traced, run as they are: the same losses and weights."""
    graphs = []

    def as_it_is(graph, inputs):
        graphs.append(graph)
        return graph.forward

    plain, traced = Regression(), compiled(as_it_is)
    wanted = [float(p.loss) for p in train(plain, Rows(), CONFIG)]
    assert [float(p.loss) for p in train(traced, Rows(), replace(CONFIG, compile=True))] == wanted
    assert graphs
    assert all(p.equal(weights(traced)[name]) for name, p in weights(plain).items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("micro_batch", "parts"), [(0, 1), (3, 3)])
def test_compiled_for_this_machine_its_losses_are_those(micro_batch, parts):
    """Within 1e-5 of their value over 20 updates, also with micro-batches of two sizes."""
    config = replace(CONFIG, micro_batch=micro_batch)
    wanted = [float(p.loss) for p in train(Regression(), Rows(parts=parts), config)]
    config, stage = replace(config, compile=True), compiled("inductor")
    found = [float(p.loss) for p in train(stage, Rows(parts=parts), config)]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_what_compares_rows_is_not_cut():
    class Comparing(Regression):
        kind, compares_rows = "comparing", True

    with pytest.raises(ValueError, match="comparing: its loss compares.*set micro_batch to 0"):
        next(train(Comparing(), Rows(), replace(CONFIG, micro_batch=8)))
    assert list(train(Comparing(), Rows(), CONFIG))
    elastic = replace(CONFIG, workers=4, min_workers=2)
    with pytest.raises(ValueError, match="3 workers .* do not divide 8: .* a multiple of 12"):
        next(train(Comparing(), Rows(), elastic))
    assert elastic.micro_batches(2, compares_rows=True) == 2
    replace(elastic, batch=24).check_comparing("comparing")


def test_who_is_lost_leaves_the_others_no_larger_micro_batches():
    elastic = replace(CONFIG, workers=4, min_workers=2)
    assert [elastic.micro_batches(n) for n in (4, 3, 2)] == [4, 4, 4]
    assert elastic.rows_at_once == 2
    assert [CONFIG.micro_batches(n) for n in (4, 3, 2)] == [4, 3, 2]


def test_more_workers_than_micro_batches_are_refused():
    with pytest.raises(ValueError, match="worker 2 of 3 at 2 micro-batches"):
        next(train(Regression(), Rows(), replace(CONFIG, micro_batch=4), World(2, 3)))


def test_a_state_of_another_network_is_refused():
    state = TrainState({"weights/net.0.weight": torch.zeros(2)}, 1, 8, {"skipped": 0})
    with pytest.raises(ValueError, match="the checkpoint is of another network: frozen"):
        next(train(Regression(), Rows(), CONFIG, state=state))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.25, 0.5, 0.75, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_learning_rates(schedule, expected):
    config = TrainingConfig(
        images=80, batch=10, learning_rate=1.0, warmup_images=40, schedule=schedule
    )
    rates = [config.rate(seen) for seen in range(0, 80, 10)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("learning_rate", -1.0, "learning_rate must be greater than 0, got -1.0"),
        ("learning_rate", float("nan"), "learning_rate must be greater than 0"),
        ("warmup_images", -5, "warmup_images must be finite and not negative"),
        ("ema_halflife_images", math.inf, "ema_halflife_images must be finite"),
        ("schedule", "step", "schedule must be one of constant, cosine, linear, got 'step'"),
        ("workers", 9, "batch 8 is smaller than workers 9"),
        ("ema_sigma_rel", (0.05, 0.4), "sigma_rel must lie between 0 and 0.2887"),
        ("ema_sigma_rel", (0.1, 0.1), "ema_sigma_rel must be different lengths"),
        ("keep_last", 0, "keep_last must be greater than 0"),
        ("keep_best", True, "keep_best goes by the held-out loss: set heldout_pictures"),
        ("min_workers", 2, "min_workers 2 is more than workers 1"),
        ("micro_batch", -1, "micro_batch must be finite and not negative"),
        ("accelerator", "H10", r"accelerator: there is no 'H10'; did you mean 'h100'\? .*probe"),
    ],
)
def test_configs_refuse_what_cannot_work(field, value, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **{field: value})


def test_a_micro_batch_that_leaves_workers_idle_is_refused():
    told = "micro_batch 4 cuts a batch of 8 into 2, too few for 3 workers: lower it to 2 or less"
    with pytest.raises(ValueError, match=told):
        replace(CONFIG, micro_batch=4, workers=3)


@pytest.mark.gpu
def test_the_gpu_does_what_the_cpu_does():
    cpu = [float(p.loss) for p in train(Regression(), Rows(), CONFIG)]
    gpu = [float(p.loss) for p in train(Regression().cuda(), Rows(poison={}), CONFIG)]
    assert gpu == pytest.approx(cpu, rel=1e-3)
    with pytest.raises(Diverged):
        list(train(Regression().cuda(), Rows(poison=dict.fromkeys(range(20), 0)), CONFIG))
