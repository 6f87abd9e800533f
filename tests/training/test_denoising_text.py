"""T5's stage: ByT5's ids, spans drawn fairly, labels that put the text together again."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from training import stages
from training.contrastive import tokenizer
from training.denoising_text import (
    EOS,
    IGNORED,
    OFFSET,
    PAD,
    SENTINEL,
    byte_tokens,
    corrupt_spans,
    smallest,
    tokens_of,
)
from training.diffusion import uniform
from training.encoders import build, spec_of
from training.encoders.shapes import Shape, foreseen, text_widths
from training.results import committed

TEXTS = [
    "a red circle",
    "",
    "caf\u00e9 \u65e5\u672c\u8a9e \U0001f642",
    " two  spaces ",
    "x" * 300,
    "\x00\x7f",
    "b",
]


@pytest.mark.parametrize("limit", [5, 32, 512])
def test_ids_are_byt5s(limit):
    from transformers import ByT5Tokenizer

    wanted = ByT5Tokenizer()(
        TEXTS, padding=True, truncation=True, max_length=limit, return_tensors="pt"
    )
    ids, lengths = byte_tokens(TEXTS, limit)
    assert torch.equal(ids, wanted.input_ids)
    assert torch.equal(lengths, wanted.attention_mask.sum(1))


PIECES = {"vocabulary": 1024, "max_pieces": 12}


def test_pieces_are_clips_with_an_end():
    """Whatever their neighbours; a word of the vocabulary is one of them, and capitals are none."""
    config = stages.config_of("t5", PIECES)
    ids, lengths = tokens_of(["Red  red", "", *TEXTS], config, config.limit)
    assert lengths[:2].tolist() == [3, 1] and lengths.max() == 12
    assert ids[0, 0] == ids[0, 1] >= OFFSET and ids[0, 2:].tolist() == [EOS] + [PAD] * 9
    clips = tokenizer(1024, 13)(TEXTS)
    for row, length, wanted in zip(ids[2:], lengths[2:], clips, strict=True):
        assert row[: length - 1].tolist() == [i + OFFSET for i in wanted[1:length].tolist()]
        assert row[length - 1] == EOS and not row[length:].any()
        assert wanted[length] == 1023
    assert config.sentinel > ids.max()


def test_a_t5_over_pieces_learns_and_is_read(tmp_path, scenes):
    """The encoder that comes from its directory gives the states of the pieces beside them."""
    _, captions = scenes
    stage = stages.create("t5", {**PIECES, "width": 32, "layers": 1, "corrupted": 0.3})
    batch = {"caption": captions[:32], "position": torch.arange(32)}
    optimizer = torch.optim.Adam(stage.parameters(), 3e-3)
    losses = []
    for _ in range(12):
        loss = stage(batch)["loss"].mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    described = {"kind": "t5", "config": asdict(stage.config)}
    (tmp_path / "config.json").write_text(json.dumps(described))
    save_file(stage.exported(), tmp_path / "weights.safetensors")
    encode = build(spec_of(str(tmp_path), "t5"))
    texts = ["a red circle", "x" * 300]
    tokens, pooled = encode(texts)
    ids, lengths = tokens_of(texts[:1], stage.config, 12)
    assert [len(it) for it in tokens] == [int(lengths[0]), 12]
    with torch.no_grad():
        wanted = stage.eval().model.encoder(input_ids=ids).last_hidden_state[0].numpy()
        own = stage.model.shared(ids)[0]
    words, states = np.split(tokens[0], 2, axis=1)
    np.testing.assert_allclose(states, wanted, atol=2e-3, rtol=2e-3)
    np.testing.assert_allclose(pooled[0], wanted.mean(0), atol=2e-3, rtol=2e-3)
    own = torch.nn.functional.layer_norm(own, own.shape[-1:]).numpy()
    np.testing.assert_allclose(words, own, atol=2e-3, rtol=2e-3)
    assert encode.repeats == 32 and text_widths(str(tmp_path), "t5") == (64, 32)
    assert foreseen("t5", stage.config, None) == Shape(64, 32, "pairs", 12, repeats=32)
    assert encode.truncated(texts).tolist() == [False, True]


def test_sentinels_are_byt5s():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert tokenizer("<extra_id_0><extra_id_1>").input_ids == [SENTINEL, SENTINEL + 1, EOS]
    assert len(tokenizer) == SENTINEL + 125


def test_a_caption_cannot_speak_for_the_tokenizer():
    """A "</s>" in a caption is text, and what has no UTF-8 is a question mark."""
    ids, lengths = byte_tokens(["a</s>b<pad>", "\ud800"], 32)
    assert lengths.tolist() == [12, 2]
    assert (ids[0, :11] >= OFFSET).all()
    assert ids[1, 0] == ord("?") + OFFSET


def corrupted(texts, share=0.15, mean_span=3.0, limit=128, seed=0, first=0):
    ids, lengths = byte_tokens(texts, limit)
    draws = uniform(seed, "spans", torch.arange(first, first + len(texts)), (2, limit))
    return corrupt_spans(ids, lengths, draws, share, mean_span)


def put_together(inputs, labels):
    """The text with each sentinel replaced by what the labels say it stood for."""
    said, current = {}, None
    for token in labels[labels != IGNORED].tolist():
        if token >= SENTINEL:
            current = said.setdefault(token, [])
        elif token != EOS:
            current.append(token)
    whole = []
    for token in inputs.tolist():
        whole += said.get(token, [token] if token >= OFFSET and token < SENTINEL else [])
    return bytes(token - OFFSET for token in whole)


@pytest.mark.parametrize(("share", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.3, 8.0), (0.9, 2.0)])
def test_inputs_and_labels_together_are_the_text(share, mean_span):
    texts = ["".join(chr(97 + (k * n) % 26) for k in range(n)) for n in range(60)] + TEXTS
    inputs, labels = corrupted(texts, share, mean_span)
    for text, given, wanted in zip(texts, inputs, labels, strict=True):
        data = text.encode()[:127]
        assert put_together(given, wanted) == data
        if len(data) < 2:
            assert (wanted == IGNORED).all()
            continue
        sentinels = given[given >= SENTINEL].tolist()
        noise = len(data) - int(((given >= OFFSET) & (given < SENTINEL)).sum())
        assert sentinels == list(range(SENTINEL, SENTINEL + len(sentinels)))
        assert wanted[wanted >= SENTINEL].tolist() == sentinels
        assert wanted[wanted != IGNORED][-1] == EOS
        assert noise == min(max(1, round(len(data) * share)), len(data) - 1)
        assert len(sentinels) == min(max(1, round(noise / mean_span)), noise, len(data) - noise + 1)
        after = given[1:][given[:-1] >= SENTINEL]
        assert (after < SENTINEL).all(), "two spans touch"


def test_every_byte_is_as_likely_to_go():
    """With a span of one byte each: uniform over places, the first and the last included."""
    inputs, _ = corrupted(["abcdefghij"] * 4000, share=0.1, mean_span=1.0)
    gone = (inputs >= SENTINEL).float().mean(0)[:10]
    torch.testing.assert_close(gone, torch.full((10,), 0.1), atol=0.02, rtol=0)


def test_spans_are_as_long_as_asked_on_average():
    inputs, _ = corrupted(["x" * 100] * 200, share=0.15, mean_span=3.0)
    assert ((inputs >= SENTINEL).sum(1) == 5).all()  # 15 bytes in 5 spans


def test_a_row_is_drawn_by_its_position_alone():
    texts = ["a small red circle on the left", "blue", "a green diamond in the middle of white"]
    inputs, labels = corrupted(texts)
    alone, said = corrupted(texts[1:2], first=1)
    assert torch.equal(inputs[1, : alone.shape[1]], alone[0])
    assert torch.equal(labels[1, : said.shape[1]], said[0])
    assert not torch.equal(corrupted(texts, seed=1)[0][2], inputs[2])


def test_the_smallest_draws_are_found_in_order():
    draws = torch.tensor([[0.9, 0.1, 0.5, 0.2], [0.9, 0.1, 0.5, 0.2]])
    found = smallest(draws, torch.tensor([4, 3]), torch.tensor([2, 1]), 3)
    assert found.tolist() == [[1, 3, 4], [1, 4, 4]]


def test_its_learning_lowers_the_loss(line):
    losses = [record["loss"] for record in line.history("t5")]
    assert losses[-1] < losses[0] - 1
    measured = committed(line.stages["t5"])["measured"]
    assert measured["heldout_nats"] == pytest.approx(measured["nats"], abs=1)


def test_the_loss_is_transformers_own(line, scenes):
    """Per row here, over all labels there."""
    _, captions = scenes
    stage = stages.load(line.stages["t5"])
    batch = {"caption": captions[:8], "position": torch.arange(8)}
    inputs, labels = corrupted(captions[:8], 0.15, 5.0, limit=96, seed=stage.seed)
    with torch.no_grad():
        ours = stage(batch)["loss"]
        wanted = stage.model(
            input_ids=inputs, attention_mask=(inputs != 0).long(), labels=labels
        ).loss
    count = (labels != IGNORED).sum(1)
    torch.testing.assert_close((ours * count).sum() / count.sum(), wanted)


def test_tied_weights_are_stored_once(line):
    from safetensors.numpy import load_file

    names = [
        n
        for n, t in load_file(f"{line.stages['t5']}/weights.safetensors").items()
        if t.shape == (384, 32)
    ]
    assert names == ["model.shared.weight"]


def test_texts_too_short_to_corrupt_cost_nothing(line):
    stage = stages.load(line.stages["t5"])
    out = stage({"caption": ["", "a"], "position": torch.arange(2)})
    assert out["loss"].tolist() == [0, 0]
    assert np.isfinite(out["accuracy"].item())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corrupted": 1.0}, "corrupted must lie in"),
        ({"mean_span": 0.5}, "mean_span be at least 1"),
        ({"max_bytes": 2}, "max_bytes must lie in 4"),
        ({"max_bytes": 2048, "mean_span": 1.0}, "more than 125 sentinels"),
        ({"vocabulary": 100}, "vocabulary must lie in 514"),
        ({"vocabulary": 1024, "max_pieces": 5000}, "max_pieces must lie in 4"),
        ({"layers": 0}, r"sizes must be at least 1, got \{'layers': 0\}"),
    ],
)
def test_configs_say_why_they_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        stages.config_of("t5", changes)
