"""What every network that reads captions promises: exact masks, one null, rows apart."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.networks import CONFIGS, NETWORKS, ContextConfig, build
from training.networks.conditioning import Context

KINDS = ("unet", "dit", "mmdit", "efficient_unet", "prior")
NONE = torch.zeros(3, dtype=torch.bool)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def network(kind, tiny, awake):
    return awake(tiny(kind))


@pytest.fixture
def inputs(kind) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 6) if kind == "prior" else torch.randn(3, 4, 8, 8), torch.rand(3)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def differ(a: Tensor, b: Tensor) -> None:
    """In every row, by more than rounding."""
    assert (a - b).abs().flatten(1).amax(1).min() > 1e-4


def test_the_output_is_zero_at_first(kind, tiny, inputs, cond):
    out = build(tiny(kind))(*inputs, cond)
    assert out.shape == inputs[0].shape
    assert (out == 0).all()


def test_every_condition_reaches_the_output(network, inputs, cond):
    out = network(*inputs, cond)
    for key in ("clip_tokens", "clip_pooled", "t5_tokens"):
        changed = cond[key] + torch.randn_like(cond[key])
        differ(network(*inputs, {**cond, key: changed}), out)
    differ(network(inputs[0], inputs[1] + 0.3, cond), out)
    differ(network(inputs[0] + 1, inputs[1], cond), out)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_masked_tokens_do_not_count(network, inputs, cond, name):
    """Whatever padding holds, and however much of it there is."""
    out = network(*inputs, cond)
    tokens, mask = cond[f"{name}_tokens"], cond[f"{name}_mask"]
    for filler in (1e4, float("nan"), float("inf")):
        filled = tokens.masked_fill(~mask[:, :, None], filler)
        same(network(*inputs, {**cond, f"{name}_tokens": filled}), out)
    longer = {
        f"{name}_tokens": F.pad(tokens, (0, 0, 0, 3), value=9.0),
        f"{name}_mask": F.pad(mask, (0, 3)),
    }
    same(network(*inputs, {**cond, **longer}), out)


def test_the_order_of_tokens_does_not_count(network, inputs, cond):
    order = torch.randperm(6)
    turned = {key: cond[key][:, order] for key in ("t5_tokens", "t5_mask")}
    same(network(*inputs, {**cond, **turned}), network(*inputs, cond))


@pytest.mark.parametrize("standardized", [False, True])
def test_each_standardized_word_is_read_before_their_mean_is_taken(standardized):
    """Two words and twice what lies between them have one mean: a layer for each tells them apart
    (deep sets)."""
    context = Context(ContextConfig("t5", 4, standardized=standardized), 6, 5)
    context.tokens[0] = torch.nn.Identity()
    words = torch.tensor([[[3.0, 0, 0, 1], [0, 3, 1, 0]]])
    keep = torch.ones(1, dtype=torch.bool)
    one, other = (
        context(torch.zeros(1), keep, {"t5_tokens": it})[0]
        for it in (words, words.mean(1, keepdim=True).expand(-1, 2, -1))
    )
    assert torch.allclose(one, other, atol=1e-5) != standardized


def test_a_missing_mask_means_all_tokens(network, inputs, cond):
    cond["t5_mask"] = torch.ones_like(cond["t5_mask"])
    without = {key: value for key, value in cond.items() if key != "t5_mask"}
    same(network(*inputs, without), network(*inputs, cond))


def test_dropped_absent_and_wholly_masked_are_one_null(network, inputs, cond):
    null = network(*inputs, {})
    assert null.isfinite().all()
    same(network(*inputs), null)
    same(network(*inputs, {**cond, "keep": NONE}), null)
    same(network(*inputs, {**cond, "clip_keep": NONE, "t5_keep": NONE}), null)
    silent = {k: torch.zeros_like(v) if k.endswith("mask") else v for k, v in cond.items()}
    del silent["clip_pooled"]
    same(network(*inputs, silent), null)
    differ(network(*inputs, cond), null)


def test_keep_drops_its_own_rows_alone(network, inputs, cond):
    keep = torch.tensor([True, False, True])
    mixed = network(*inputs, {**cond, "keep": keep})
    same(mixed[keep], network(*inputs, cond)[keep])
    same(mixed[~keep], network(*inputs, {})[~keep])


def test_one_context_can_be_dropped(network, inputs, cond):
    without = {key: value for key, value in cond.items() if not key.startswith("t5")}
    dropped = network(*inputs, {**cond, "t5_keep": NONE})
    same(dropped, network(*inputs, without))
    differ(dropped, network(*inputs, cond))


def test_every_parameter_learns_and_dropped_rows_teach_nothing(network, inputs, cond):
    """Not even when not finite; and no parameter is without gradient, which DDP would refuse."""
    for key in ("clip_tokens", "clip_pooled", "t5_tokens"):
        cond[key][1] = float("nan")
    cond["keep"] = torch.tensor([True, False, True])
    network(*inputs, cond).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_rows_do_not_see_each_other(network, inputs, cond):
    alone = {key: value[1:2] for key, value in cond.items()}
    out = network(inputs[0][1:2], inputs[1][1:2], alone)
    same(out, network(*inputs, cond)[1:2])


def test_classes_have_the_same_null(kind, tiny, awake, inputs):
    network = awake(tiny(kind, classes=5, contexts=tiny("unet").contexts))
    y = torch.tensor([0, 4, 2])
    null = network(*inputs)
    same(network(*inputs, {"y": y, "keep": NONE}), null)
    differ(network(*inputs, {"y": y}), null)


def test_pooled_vectors_can_be_tokens(kind, tiny, awake, inputs):
    network = awake(tiny(kind, contexts=(ContextConfig("clip", 0, 10, 4),)))
    pooled = {"clip_pooled": torch.randn(3, 10)}
    told = network.conditioning(inputs[1], pooled)
    assert told.mask.tolist() == [[True] * 4 + [False]] * 3
    assert network.conditioning(inputs[1], {}).mask.tolist() == [[True]] * 3
    differ(network(*inputs, pooled), network(*inputs))


def test_bfloat16_autocast_stays_close(network, inputs, cond):
    exact = network(*inputs, cond)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(*inputs, cond)
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_half_precision_weights_work(network, inputs, cond):
    exact = network(*inputs, cond)
    out = network.bfloat16()(inputs[0].bfloat16(), inputs[1], cond)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.slow
def test_compiles_without_a_break(network, inputs, cond):
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    same(compiled(*inputs, cond), network(*inputs, cond))


def test_vectors_of_another_width_are_refused(tiny):
    with pytest.raises(ValueError, match="7 wide, the prior was made for 6"):
        build(tiny("prior"))(torch.zeros(3, 7), torch.zeros(3))


def test_a_foreign_encoder_is_refused(network, inputs):
    with pytest.raises(ValueError, match="9 wide, the network was made for 7"):
        network(*inputs, {"t5_tokens": torch.randn(3, 6, 9)})


def test_configs_survive_json_and_can_be_compared(kind, tiny):
    config = tiny(kind)
    again = CONFIGS[config.kind](**json.loads(json.dumps(dataclasses.asdict(config))))
    assert again == config
    assert hash(again) == hash(config)


def test_contexts_of_one_name_are_refused(kind, tiny):
    with pytest.raises(ValueError, match="different names"):
        tiny(kind, contexts=(ContextConfig("t5", 7), ContextConfig("t5", 9)))


def test_each_config_has_its_network():
    assert set(CONFIGS) == {
        "unet", "dit", "efficient_unet", "prior", "classifier", "autoencoder", "discriminator"
    }  # fmt: skip
    assert set(CONFIGS.values()) == set(NETWORKS)
