"""CLIP's stage: open_clip's model, a vocabulary of the first merges, a loss over all workers."""

import math
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.encode import pixels_spec
from training import checkpoint, contrastive, results, stages
from training.contrastive import ClipStage, ClipStageConfig, compare, names, tokenizer
from training.job import Job, run
from training.loop import World
from training.supervision import Stopped

TEXTS = (
    "A red  Circle at the top",
    "it's 3 o'clock, caf\u00e9 &amp; th\u00e9 \u2014 \u65e5\u672c",
    "",
    "photosynthesis of hippopotamuses " * 12,
)


def test_the_full_vocabulary_is_open_clips_tokenizer():
    import open_clip

    wanted = open_clip.SimpleTokenizer(context_length=32)(list(TEXTS)).numpy()
    np.testing.assert_array_equal(tokenizer(contrastive.FULL_VOCABULARY, 32)(TEXTS), wanted)


@pytest.mark.parametrize("vocabulary", [contrastive.SPECIAL, 1024, 8192])
def test_the_first_merges_are_a_vocabulary_in_their_own_right(vocabulary):
    import open_clip

    whole = open_clip.SimpleTokenizer(context_length=200)
    ids = tokenizer(vocabulary, 200)(TEXTS)
    assert ids.max() == vocabulary - 1
    assert (ids.argmax(1) > 0).all()
    names_of = list(whole.encoder)
    for text, row in zip(TEXTS, ids, strict=True):
        words = row[1 : row.argmax()]
        spelt = "".join(names_of[i] for i in words)
        full = "".join(names_of[i] for i in whole.encode(text))
        assert full.startswith(spelt)
        assert len(spelt) == len(full) or len(words) == 198  # all of it, or as much as fits


def test_the_quick_way_of_cleaning_changes_nothing():
    import open_clip

    whole = open_clip.SimpleTokenizer(context_length=64)
    texts = [
        " Tabs\tand  CAPS ",
        "a&b",
        "x &lt;3",
        "plain",
        "don't 'quote' \"this\"",
        "a_b-c/d\\e~",
    ]
    np.testing.assert_array_equal(
        tokenizer(contrastive.FULL_VOCABULARY, 64)(texts), whole(texts).numpy()
    )


def test_its_learning_makes_the_right_caption_likelier(line):
    losses = [record["loss"] for record in line.history("clip")]
    assert losses[0] < math.log(16) * 1.3
    assert losses[-1] < losses[0] - 0.5


def test_a_loaded_stage_is_the_trained_one_and_open_clips_own_class(line, scenes):
    from open_clip.model import CLIP
    from safetensors.torch import load_file

    pixels, captions = scenes
    stage = stages.load(line.stages["clip"])
    stored = load_file(f"{line.stages['clip']}/weights.safetensors")
    model = CLIP(**contrastive.model_config(stage.config)).eval()
    model.load_state_dict({name.removeprefix("model."): t for name, t in stored.items()})
    with torch.no_grad():
        x = torch.from_numpy(pixels).float() / 127.5 - 1
        wanted = model.encode_image(x, normalize=True)
        ids = stage.tokens(captions)
        words = model.encode_text(ids, normalize=True)
    torch.testing.assert_close(stage.images(torch.from_numpy(pixels)), wanted)
    torch.testing.assert_close(stage.texts(captions), words)
    assert not any(p.requires_grad for p in stage.parameters())


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_both_towers_give_a_loss_for_each_row(kind, scenes):
    pixels, captions = scenes
    image = (
        {"kind": kind, "side": 32, "width": 32, "layers": 1}
        if kind == "vit"
        else {"kind": kind, "width": 8}
    )
    config = {
        "image": image,
        "embed": 16,
        "text": {"vocabulary": 600, "width": 16, "heads": 2, "layers": 1},
    }
    torch.manual_seed(0)
    stage = stages.create("clip", config)
    big = torch.from_numpy(pixels[:4]).repeat_interleave(2, 2).repeat_interleave(2, 3)
    out = stage({"pixels": big, "caption": captions[:4]})
    assert out["loss"].shape == (4,)
    out["loss"].sum().backward()
    assert all(p.grad is not None for p in stage.parameters())


def test_the_loss_is_open_clips_where_no_caption_repeats(scenes):
    from open_clip.loss import ClipLoss

    torch.manual_seed(1)
    images, texts = (torch.nn.functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    per_image, per_text, own = compare(images, texts, torch.tensor(7.0), torch.arange(6))
    ours = [torch.nn.functional.cross_entropy(x, own) for x in (per_image, per_text)]
    torch.testing.assert_close(sum(ours) / 2, ClipLoss()(images, texts, torch.tensor(7.0)))


def test_the_same_caption_is_no_counterexample():
    images = texts = torch.eye(3)
    captions = torch.tensor([4, 9, 4])
    per_image, per_text, own = compare(images, texts, torch.tensor(2.0), captions)
    inf = -math.inf
    wanted = torch.tensor([[2.0, 0, inf], [0, 2, 0], [inf, 0, 2]])
    torch.testing.assert_close(per_image, wanted)
    torch.testing.assert_close(per_text, wanted)
    assert own.tolist() == [0, 1, 2]


def test_captions_are_told_apart_by_their_tokens():
    ids = torch.from_numpy(tokenizer(1024, 16)(["a b", "b a", "a  B", "a b b"]))
    first, second, third, fourth = names(ids).tolist()
    assert first == third
    assert len({first, second, fourth}) == 3


def _worker(rank, size, place, sent):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=rank, world_size=size
    )
    images, texts = _features()
    rows = slice(rank * 3, rank * 3 + 3)
    mine = [x[rows].clone().requires_grad_() for x in (images, texts)]
    per_image, per_text, own = compare(
        *mine, torch.tensor(5.0), torch.tensor([0, 1, 2, 3, 0, 5])[rows]
    )
    loss = sum(
        torch.nn.functional.cross_entropy(x, own, reduction="sum") for x in (per_image, per_text)
    )
    loss.backward()
    uneven = ""
    try:
        compare(images[: 2 + rank], texts[: 2 + rank], torch.tensor(5.0), torch.arange(2 + rank))
    except ValueError as error:
        uneven = str(error)
    sent.put((rank, loss.detach().numpy(), [x.grad.numpy() for x in mine], uneven))
    torch.distributed.destroy_process_group()


def _features():
    draws = torch.Generator().manual_seed(3)
    return [
        torch.nn.functional.normalize(torch.randn(6, 4, generator=draws), dim=1) for _ in range(2)
    ]


def test_two_workers_have_the_gradients_of_one(tmp_path):
    # Autograd refuses to work in the fork of a process where other tests have used its threads.
    fresh = multiprocessing.get_context("spawn")
    sent, meet = fresh.Queue(), tmp_path / "meet"
    workers = [fresh.Process(target=_worker, args=(r, 2, meet, sent)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = {rank: rest for rank, *rest in (sent.get(timeout=200) for _ in workers)}
    for worker in workers:
        worker.join(timeout=60)
    whole = [x.requires_grad_() for x in _features()]
    per_image, per_text, own = compare(*whole, torch.tensor(5.0), torch.tensor([0, 1, 2, 3, 0, 5]))
    loss = sum(
        torch.nn.functional.cross_entropy(x, own, reduction="sum") for x in (per_image, per_text)
    )
    loss.backward()
    np.testing.assert_allclose(found[0][0] + found[1][0], loss.detach().numpy(), rtol=1e-5)
    for which in range(2):
        together = np.concatenate([found[rank][1][which] for rank in range(2)])
        np.testing.assert_allclose(together, whole[which].grad.numpy(), rtol=1e-4, atol=1e-6)
    assert "rows" in found[0][2]
    assert "workers divide" in found[1][2]


def test_a_shift_moves_a_picture_and_draws_its_edge_out():
    picture = torch.arange(25.0).reshape(1, 1, 5, 5).expand(200, 3, 5, 5)
    moved = contrastive.shifted(picture, 1, 0, torch.arange(200))
    pads = torch.nn.functional.pad(picture[:1], (1, 1, 1, 1), mode="replicate")
    wanted = {(r, c): pads[0, :, r : r + 5, c : c + 5] for r in range(3) for c in range(3)}
    found = [next(k for k, v in wanted.items() if torch.equal(v, m)) for m in moved]
    assert set(found) == set(wanted), "each of the nine moves happens"
    assert torch.equal(contrastive.shifted(picture[:1], 1, 0, torch.tensor([7]))[0], moved[7])
    assert torch.equal(contrastive.shifted(picture, 0, 0, torch.arange(200)), picture)


RESNET = {
    "image": {"kind": "resnet", "width": 8},
    "embed": 16,
    "text": {"vocabulary": 600, "context": 90, "width": 16, "heads": 2, "layers": 1},
}


def test_batch_norms_end_with_the_statistics_of_the_final_weights(line):
    """Whatever they saw on the way: measured again over the training pictures, batch for batch."""
    torch.manual_seed(0)
    stage = stages.create("clip", RESNET)
    norm = stage.model.visual.bn1
    norm.running_mean.fill_(5.0)
    loader = Enlarged(line.loader("pixels"))
    seen = []
    hook = stage.model.visual.conv1.register_forward_hook(lambda _, __, out: seen.append(out))
    measured = stage.finish(loader)
    hook.remove()
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert norm.momentum == 0.1
    assert measured["among"] == 64
    assert "heldout_accuracy" not in measured, "this loader tells of no held-out pictures"


def test_batch_norms_are_settled_for_as_long_as_it_takes_to_measure(line):
    """And then know what they did, bit for bit, for the weights that go on to be trained."""
    torch.manual_seed(0)
    stage = stages.create("clip", RESNET).train()
    for norm in stage._norms():
        norm.running_mean.normal_()
    stage.model.visual.layer1.eval()
    before = {name: t.clone() for name, t in stage.state_dict().items()}
    modes = {name: m.training for name, m in stage.named_modules()}
    norm, seen = stage.model.visual.bn1, []
    hook = stage.model.visual.conv1.register_forward_hook(lambda _, __, out: seen.append(out))
    with stage.settled(Enlarged(line.loader("pixels"))):
        torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    hook.remove()
    assert all(torch.equal(t, before[name]) for name, t in stage.state_dict().items())
    assert {name: m.training for name, m in stage.named_modules()} == modes


def test_a_heldout_loss_does_not_depend_on_what_batch_norms_have_seen(line, tmp_path):
    """Of several workers only the first one's statistics are in a checkpoint: the others go on with
    other ones than they had."""
    spec = pixels_spec(16)
    job = Job(
        kind="clip",
        fingerprint="f",
        config=RESNET,
        training={
            "images": 96, "batch": 16, "learning_rate": 3e-3, "log_images": 32,
            "checkpoint_images": 48, "heldout_pictures": 16, "heldout_images": 32, "threads": 1,
        },
        dataset=line.data.dataset,
        version=1,
        encodings=({"name": spec.name, "kind": spec.kind, "fingerprint": spec.fingerprint},),
        output=str(tmp_path / "undisturbed"),
    )  # fmt: skip
    run(job)
    resumed = replace(job, output=str(tmp_path / "resumed"))
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        run(resumed, World(stop=lambda: next(asked)))
    checkpoints = tmp_path / "resumed" / results.CHECKPOINTS
    state = checkpoint.newest(checkpoints)
    assert state is not None
    moved = [name for name in state.tensors if name.endswith("running_mean")]
    for name in moved:
        state.tensors[name] += 5
    checkpoint.save(checkpoints, state, "f")
    run(resumed)
    told = [
        [(it["loss"], it.get("heldout_loss")) for it in results.history(tmp_path / name)]
        for name in ("undisturbed", "resumed")
    ]
    assert moved and len(told[0]) == 3 and all(loss for _, loss in told[0])
    assert told[0] == told[1]
    stored = [(tmp_path / it / results.WEIGHTS).read_bytes() for it in ("undisturbed", "resumed")]
    assert stored[0] == stored[1]


class Enlarged:
    """A loader whose pictures are twice as large."""

    def __init__(self, loader):
        self.whole, self.samples = loader, loader.samples

    def rows(self, indices):
        batch = self.whole.rows(indices)
        return batch | {"pixels": batch["pixels"].repeat(2, 2).repeat(2, 3)}


def test_pictures_of_another_side_are_resized_and_only_squares_are_taken(line, scenes):
    stage = stages.load(line.stages["clip"])
    pixels = torch.from_numpy(scenes[0])
    twice = pixels.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(stage.images(twice), stage.images(pixels), atol=0.1)
    with pytest.raises(ValueError, match="square"):
        stage.images(torch.zeros(2, 3, 16, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": {"kind": "vit", "side": 30, "patch": 4}}, "patch must divide side"),
        ({"image": {"kind": "resnet", "side": 48}}, "multiple of 32"),
        ({"text": {"vocabulary": 100}}, "vocabulary must lie in 514"),
        ({"temperature": 0.001}, "temperature at least 0.01"),
        ({"shift": 32}, "shift must lie in 0 to 31 pixels"),
    ],
)
def test_configs_say_why_they_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        stages.config_of("clip", changes)


def test_what_it_measures_is_retrieval_among_a_hundred(line):
    from training.results import committed

    measured = committed(line.stages["clip"])["measured"]
    assert measured["among"] == 64
    assert 3 / 64 < measured["accuracy"] <= 1
    assert 0 <= measured["heldout_accuracy"] <= 1
    assert isinstance(ClipStage(ClipStageConfig()), torch.nn.Module)
