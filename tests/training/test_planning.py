"""What is planned is what happens: counts against closed forms, against a step that is really made,
and against the tensors of a real training.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from training import accelerators, planning, stages
from training.accelerators import Accelerator
from training.config import TrainingConfig
from training.encoders import shapes
from training.encoders.shapes import Shape, foreseen
from training.loop import train
from training.optimizer import AdamWConfig, MuonConfig
from training.planning import Captions, Kernel, Tally, batch_of, count, estimate

TEXT = {"t5": Shape(24, 16, "pieces", 64), "autoencoder": Shape(4, factor=8)}
SMALL = {
    "dit": {"kind": "dit", "width": 64, "depth": 2, "head_width": 16},
    "joint": {"kind": "dit", "width": 64, "depth": 2, "head_width": 16, "text": "joint"},
    "unet": {"kind": "unet", "channels": 32, "attention": [0, 1], "blocks": 1},
}


def base(network, **config):
    network = {**network, "contexts": [{"name": "t5", "width": 24, "pooled_width": 16}]}
    return stages.config_of("base", {"network": network, **config})


def rows_of(config, rows, size=(64, 64)):
    return batch_of(config, rows, size, Captions(), TEXT)


def moved(stage):
    """The stage with weights that let gradients through everywhere."""
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return stage


# FLOPs and parameters against formulas


@pytest.mark.parametrize(
    ("module", "shape", "forward"),
    [
        (nn.Linear(6, 10), (4, 6), 2 * 4 * 6 * 10),
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 7), 2 * 2 * 5 * 7 * 3 * 8 * 9),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (2, 3, 8, 8), 2 * 2 * 4 * 4 * 3 * 8 * 9),
        (nn.LayerNorm(6), (4, 6), 0),
    ],
)
def test_a_layers_products_are_counted_once_forward_and_twice_backward(module, shape, forward):
    x = torch.randn(shape, requires_grad=True)
    with Tally() as tally:
        y = module(x)
        assert sum(k.flops for k in tally.kernels) == forward
        y.sum().backward()
    assert sum(k.flops for k in tally.kernels) == 3 * forward


def test_attention_is_two_products_forward_and_five_backward_where_logits_are_made_anew():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 7, 7))
    product = 2 * 2 * 3 * 10 * 7 * 8
    with Tally() as tally:
        y = F.scaled_dot_product_attention(q, k, v)
        assert sum(it.flops for it in tally.kernels) == 2 * product
        y.sum().backward()
    assert sum(it.flops for it in tally.kernels) == 7 * product


def test_a_kernel_moves_what_it_reads_and_writes_and_a_view_nothing():
    x = torch.zeros(4, 6)
    with Tally() as tally:
        y = x.t().reshape(3, 8)  # a view, then a copy
        y.add_(1)
        z = y + y
        z.view(-1)
    sizes = [4 * 24 * n for n in (2, 2, 3)]
    assert [kernel.moved for kernel in tally.kernels] == sizes


def dit_parameters(width, depth, channels=4, patch=2, classes=0, text=0):
    """Peebles & Xie's XL/2 without QK-norm; `text`: width of a context of tokens alone."""
    d = width
    embeddings = (channels * patch**2 + 1) * d + (256 + 1) * d + (d + 1) * d
    embeddings += (classes + 1) * d if classes else 0
    block = 6 * d * (d + 1) + 3 * d * (d + 1) + d * (d + 1) + 4 * d * (d + 1) + (4 * d + 1) * d
    if text:  # layer norm, q, kv, out
        block += 2 * d + d * (d + 1) + 2 * d * (d + 1) + d * (d + 1)
        embeddings += 2 * d + 2 * text + (text + 1) * d  # marks, layer norm, projection
        embeddings += 2 * text + (text + 1) * d + (d + 1) * d  # their mean
    return embeddings + depth * block + 2 * d * (d + 1) + (d + 1) * channels * patch**2


@pytest.mark.parametrize(("classes", "text"), [(0, 0), (1000, 0), (0, 2048)])
def test_parameters_of_a_full_dit_xl_are_those_of_the_closed_form(classes, text):
    contexts = [{"name": "t5", "width": text}] if text else []
    network = {"kind": "dit", "qk_norm": False, "classes": classes, "contexts": contexts}
    config = stages.config_of("base", {"network": network})
    with torch.device("meta"):
        stage = stages.create("base", config)
    expected = dit_parameters(1152, 28, classes=classes, text=text)
    assert sum(p.numel() for p in stage.parameters()) == expected
    if classes:  # the paper counts 675 M: with positions (fixed) and twice as many outputs
        assert expected + 256 * 1152 + 1153 * 16 == pytest.approx(675e6, rel=1e-3)


def test_a_dits_forward_is_what_the_formula_says():
    d, n, depth, rows = 64, 64, 2, 5  # tokens: (128 / 8 / 2)^2
    network = SMALL["dit"]
    config = stages.config_of("base", {"network": network})
    update = count(
        "base", config, TrainingConfig(batch=rows), lambda: rows_of(config, rows, (128, 128))
    )
    block = n * 2 * 12 * d * d + 4 * n * n * d + 2 * 6 * d * d
    ends = n * 2 * (16 * d + d * 16) + 2 * (256 * d + d * d) + 2 * 2 * d * d
    assert update.forward_flops == rows * (depth * block + ends)


# An update of no content against one that is really made


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", SMALL)
def test_what_is_counted_without_content_is_what_a_real_step_does(kind, precision):
    config, rows = base(SMALL[kind], data="moments"), 6
    training = TrainingConfig(batch=rows, precision=precision)
    planned = count("base", config, training, lambda: rows_of(config, rows))
    stage = moved(stages.create("base", config))
    made = planning.carry_out(stage, training, rows_of(config, rows))
    assert planned.parameters == made.parameters
    assert planned.flops_per_image == made.flops_per_image
    assert planned.forward_flops == made.forward_flops
    a, b = planned.replicated, made.replicated
    assert replace(a, activations=0) == replace(b, activations=0)
    # A CPU's convolutions keep workspaces that have no shape of their own.
    assert a.activations == pytest.approx(b.activations, rel=0.02)
    assert planned.checkpoint == made.checkpoint


def test_auto_is_the_faster_one_of_the_device():
    config = base(SMALL["unet"], data="moments")

    def seconds(precision, bf16):
        device = Accelerator("one", {"bf16": bf16, "fp32": 1e12}, 1e12, 1e12)
        training = TrainingConfig(batch=4, precision=precision)
        made = estimate(
            "base", config, training, lambda c, rows: rows_of(c, rows), device, workers=1
        )
        return made.seconds, made.memory

    assert seconds("auto", 1e13) == seconds("bf16", 1e13) != seconds("fp32", 1e13)
    assert seconds("auto", 1e10) == seconds("fp32", 1e10) != seconds("bf16", 1e10)


@pytest.mark.parametrize("kind", ["autoencoder", "classifier", "t5", "clip", "noisy_clip"])
def test_every_kind_of_stage_can_be_counted(kind):
    config = stages.config_of(kind, {})
    training = TrainingConfig(batch=8, precision="bf16")
    update = count(kind, config, training, lambda: rows_of(config, 8, (32, 32)))
    stage = stages.create(kind, config)
    assert update.parameters == sum(p.numel() for p in stage.parameters())
    assert 2.5 < update.flops_per_image * 8 / update.forward_flops < 3.5
    assert update.replicated.activations > 0


def test_flops_are_those_of_torchs_own_counter():
    config = base(SMALL["unet"], data="moments")
    training = TrainingConfig(batch=4)
    planned = count("base", config, training, lambda: rows_of(config, 4))
    stage = moved(stages.create("base", config))
    with FlopCounterMode(display=False) as counter:
        stage(rows_of(config, 4))["loss"].sum().backward()
    assert planned.flops_per_image * 4 == counter.get_total_flops()


@pytest.mark.parametrize("optimizer", [AdamWConfig(), MuonConfig()], ids=lambda it: it.kind)
def test_bytes_are_those_of_a_real_trainings_tensors(optimizer):
    config = base(SMALL["dit"], data="moments")
    training = TrainingConfig(images=8, batch=4, optimizer=optimizer)
    batch = {k: v.numpy() if torch.is_tensor(v) else v for k, v in rows_of(config, 4).items()}

    class Loader:
        def batches(self, start_step):
            while True:
                yield batch

    stage = stages.create("base", config)
    for progress in train(stage, Loader(), training):
        state = progress.state
    update = count("base", config, training, lambda: rows_of(config, 4))

    def size(part):
        return sum(t.numel() * t.element_size() for t in state.part(part).values())

    memory = update.replicated
    assert memory.weights == size("weights")
    assert memory.optimizer == size("optimizer")
    assert memory.averages == memory.gradients == size("ema")
    assert update.checkpoint == sum(map(size, ("weights", "ema", "optimizer")))


def test_activations_grow_by_the_row_and_gradients_are_not_among_them():
    config = base(SMALL["dit"], data="moments")
    sizes = [
        count(
            "base", config, TrainingConfig(batch=n), lambda n=n: rows_of(config, n)
        ).replicated.activations
        for n in (2, 6, 10)
    ]
    assert sizes[1] - sizes[0] == pytest.approx(sizes[2] - sizes[1], rel=0.02)
    wide = stages.config_of("base", {"network": {"kind": "dit", "width": 1152, "depth": 1}})
    memory = count("base", wide, TrainingConfig(batch=2), lambda: rows_of(wide, 2)).replicated
    assert memory.activations < memory.gradients / 2


# FSDP


def test_a_sharded_worker_holds_its_share_and_what_is_whole_for_a_while():
    config = base(SMALL["dit"], data="moments")
    training = TrainingConfig(batch=8)
    update = count("base", config, training, lambda: rows_of(config, 2), workers=4)
    stage = stages.create("base", config)
    trained = [p for p in stage.parameters() if p.requires_grad]
    share = sum(max(c.numel() for c in p.chunk(4)) * 4 for p in trained)  # as FSDP2 cuts
    whole, shard = update.replicated, update.sharded
    assert shard.gradients == shard.averages == share
    assert shard.weights == share + sum(b.numel() * b.element_size() for b in stage.buffers())
    assert shard.activations == whole.activations
    network = stage.network
    blocks = [sum(p.numel() * 4 for p in block.parameters()) for block in network.blocks]
    told = [sum(p.numel() * 4 for p in it.parameters()) for it in network.conditioning.contexts]
    rest = sum(p.numel() * 4 for p in trained) - sum(blocks) - sum(told)
    assert shard.gathered == rest + 3 * max(*blocks, *told)
    buffers = sum(b.numel() * b.element_size() for b in stage.buffers())
    everything = sum(p.numel() * 4 for p in trained)
    measuring = shard.weights + shard.optimizer + shard.averages + everything + buffers
    assert shard.unsharded == max(2 * everything + buffers, measuring)
    assert whole.unsharded == 0
    assert replace(shard, activations=0, gathered=0).total == shard.unsharded


def test_what_cannot_start_whole_does_not_fit_sharded_either():
    made, nothing, device = asked(1e12, batch=64, workers=8, fsdp=True)
    assert nothing == ""
    whole_once = replace(made.memory, unsharded=2 * 10**12)
    tight = replace(made, update=replace(made.update, sharded=whole_once))
    assert not tight.fits(device)
    assert "each worker starts with the whole model and its gradients" in tight.advice(device)
    assert "which takes 2e+03 GB" in tight.advice(device)


def test_averages_by_power_functions_count_each():
    config = base(SMALL["dit"], data="moments")
    plain, more = (
        count("base", config, TrainingConfig(batch=8, **given), lambda: rows_of(config, 2), 4)
        for given in ({}, {"ema_sigma_rel": (0.05, 0.1)})
    )
    assert more.replicated.averages == 3 * plain.replicated.averages
    assert more.sharded.averages == 3 * plain.sharded.averages
    assert more.checkpoint == plain.checkpoint + 2 * plain.replicated.averages
    assert len(more.applied) > len(plain.applied)


def test_where_everything_divides_a_share_is_the_whole_over_the_workers():
    linear = torch.nn.ParameterList(torch.zeros(s) for s in ((8, 3), (16, 4, 2), (4,)))
    whole, share = (planning._bytes(linear, w) for w in (1, 4))
    assert whole == 4 * (24 + 128 + 4) == 4 * share
    assert planning._bytes([torch.zeros(10, 3), torch.zeros(())], 4) == 4 * (3 * 3 + 1)


# Time, devices, advice


def test_a_kernel_takes_its_products_or_its_bytes():
    device = Accelerator("toy", {"fp32": 100.0}, 10.0, 1e9, utilisation=0.5)
    config = stages.config_of("autoencoder", {})
    update = count("autoencoder", config, TrainingConfig(batch=1), lambda: rows_of(config, 1))
    kernels = (Kernel(500.0, 20.0), Kernel(50.0, 80.0), Kernel(0.0, 30.0))
    toy = replace(update, kernels=kernels, applied=(Kernel(0.0, 40.0),))
    assert toy.seconds(device, "fp32", compiled=False) == 10 + 8 + 3 + 4
    assert toy.seconds(device, "fp32", compiled=True) == 10 + 8 + 4
    assert toy.seconds(device, "fp32", compiled=False, micro_batches=3) == 3 * 21 + 4


def test_an_unknown_device_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"no device 'h10'; did you mean 'h100'\? \(known: a100,"):
        accelerators.accelerator("h10")
    h100 = accelerators.accelerator("h100")
    assert h100.matmul["bf16"] == pytest.approx(1979e12 / 2, rel=1e-3)  # half of "with sparsity"
    assert h100.usable == pytest.approx(72e9)


def test_the_probe_finds_rates():
    found = accelerators.probe(seconds=0.1)
    assert found.measured
    assert found.matmul.keys() == {"bf16", "fp32"}
    assert min(found.matmul.values()) > 1e8 and found.bandwidth > 1e8
    assert found.precision in found.matmul
    assert found.memory > 1e9


class Operands(TorchDispatchMode):
    """What products and copies are made of."""

    def __init__(self):
        super().__init__()
        self.seen: dict[str, torch.Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("mm", "copy_"):
            operand = args[0] if name == "mm" else args[1]
            self.seen[f"{name} {operand.dtype}"] = operand
        return func(*args, **(kwargs or {}))


def test_the_probe_computes_with_numbers_as_a_training_has_them():
    """With constant ones a GPU draws less power, clocks higher, and is promised to be faster than
    it is. The draws of whoever trains stay what they were."""
    torch.manual_seed(3)
    wanted = torch.randn(4)
    torch.manual_seed(3)
    with Operands() as operands:
        accelerators.probe(seconds=0.01)
    assert torch.equal(torch.randn(4), wanted)
    assert {"mm torch.bfloat16", "mm torch.float32", "copy_ torch.float32"} <= operands.seen.keys()
    for name in ("mm torch.bfloat16", "mm torch.float32", "copy_ torch.float32"):
        sample = operands.seen[name].flatten()[:65536].float()
        assert sample.std() == pytest.approx(1, abs=0.05), name
        assert abs(sample.mean()) < 0.05, name


def asked(memory, batch=32, workers=1, fsdp=False):
    device = Accelerator("small", {"fp32": 1e12}, 1e11, memory)
    config = base({**SMALL["dit"], "depth": 1}, data="moments")
    training = TrainingConfig(batch=batch, fsdp=fsdp)
    made = estimate("base", config, training, lambda c, rows: rows_of(c, rows), device, workers)
    return made, made.advice(device), device


def test_what_does_not_fit_is_told_with_what_helps():
    room, nothing, _ = asked(1e12)
    assert nothing == ""
    total, kept = room.update.replicated.total, room.update.replicated.kept
    tight, advice, device = asked((kept + (total - kept) / 2) / 0.9)
    assert "do not fit small" in advice
    assert 12 <= tight.fitting_rows <= 16
    assert f"{tight.fitting_rows} rows at once would, not 32" in advice
    again, _, _ = asked(device.memory, batch=tight.fitting_rows)
    assert again.fits(device)
    more, _, _ = asked(device.memory, batch=tight.fitting_rows + 2)
    assert not more.fits(device)
    full, advice, _ = asked(kept / 0.9, batch=8)
    assert full.fitting_rows == 0
    assert "whatever the rows" in advice
    shared, advice, _ = asked(kept / 0.9, batch=64, workers=8)
    assert shared.fitting_rows_sharded > 0
    told = f"{shared.fitting_rows_sharded} rows with FSDP over 8 workers (training.fsdp=true)"
    assert told in advice
    followed, advice, device = asked(kept / 0.9, batch=64, workers=8, fsdp=True)
    assert followed.memory == shared.update.sharded
    assert followed.fits(device) == (advice == "")
    assert followed.fitting_rows == shared.fitting_rows_sharded


def test_images_a_second_are_those_of_all_workers():
    one, _, _ = asked(1e12, batch=8)
    four, _, _ = asked(1e12, batch=32, workers=4)
    assert four.update.rows == one.update.rows == 8
    assert four.images_per_second == pytest.approx(4 * one.images_per_second)
    assert four.device_hours == pytest.approx(4 * four.hours)
    assert one.hours * 3600 * one.images_per_second == pytest.approx(one.images)


# Encoders and captions


def test_captions_are_cut_into_tokens_and_stored_unpadded():
    clip, pieces = Shape(32, 8, "pairs", 77), Shape(32, 0, "bytes", 100)
    twenty = Captions(20)
    assert twenty.tokens(clip) == 28
    assert twenty.longest(clip) == 54
    assert Captions(200).tokens(clip) == 77
    assert twenty.tokens(pieces) == 100
    assert twenty.stored_bytes(clip) == 2 * 28 * 32 + 2 * 8 + 8
    words_once = replace(clip, repeats=16)
    assert twenty.stored_bytes(words_once) == 28 * (2 * 16 + 4) + 2 * 8 + 8


def test_the_tokens_of_real_captions_are_about_as_many(line):
    """Of the drawn scenes' captions; ours are bytes for T5."""
    _, captions = line_captions(line)
    words = sum(len(caption.split()) for caption in captions) / len(captions)
    spelled = sum(len(caption.encode()) + 1 for caption in captions) / len(captions)
    shape = foreseen("t5", stages.config_of("t5", {"max_bytes": 512}), None)
    assert Captions(round(words)).tokens(shape) == pytest.approx(spelled, rel=0.25)


def line_captions(line):
    batch = line.loader("pixels").batch(0)
    return batch["pixels"], batch["caption"]


def test_what_an_untrained_line_is_planned_with_is_what_it_has_when_trained(line):
    configs = {n: stages.load(line.stages[n]).config for n in ("autoencoder", "clip", "t5")}
    planned = {n: foreseen(n, config, None) for n, config in configs.items()}
    given = {n: foreseen(n, None, line.stages[n]) for n in planned}
    assert planned == given
    trained = stages.load(line.stages["base"]).config
    asked = replace(trained, network=replace(trained.network, in_channels=4, contexts=()))
    assert planning.informed(asked, planned) == trained
    batch = line.loader("autoencoder", "clip", "t5").batch(0)
    made = batch_of(trained, len(batch["position"]), (16, 16), Captions(), planned)
    for name, value in made.items():
        if name in batch and isinstance(batch[name], np.ndarray):
            wild = 1 if name.endswith(("tokens", "mask")) else None
            shape = [n for i, n in enumerate(value.shape) if i != wild]
            assert shape == [n for i, n in enumerate(batch[name].shape) if i != wild], name


def test_a_pretrained_encoder_is_read_where_it_is_and_else_assumed_without_the_network(
    tmp_path, monkeypatch
):
    import huggingface_hub

    def only_here(where, **options):
        assert options.get("local_files_only") is True
        raise FileNotFoundError(where)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", only_here)
    known = foreseen("t5", None, "google/flan-t5-xxl")
    assert (known.width, known.known) == (4096, "as published")
    unknown = foreseen("t5", None, "somebody/their-t5")
    assert (unknown.width, unknown.known) == (shapes.USUAL["t5"].width, "assumed")
    assert foreseen("clip", None, "./not-there").known == "assumed"

    vae = {"_class_name": "AutoencoderKL", "latent_channels": 16, "block_out_channels": [8] * 4}
    (tmp_path / "config.json").write_text(json.dumps(vae))
    assert foreseen("autoencoder", None, str(tmp_path)) == Shape(16, factor=8)
    tiny = {"_class_name": "AutoencoderTiny", "latent_channels": 4}
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    assert foreseen("autoencoder", None, str(tmp_path)) == Shape(4, factor=8, posterior=False)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 48}))
    (tmp_path / "model.safetensors").touch()
    assert foreseen("t5", None, str(tmp_path)) == Shape(48, 48, "pieces", 256)
