"""Encoders: the stage's own numbers, the pretrained model's own, and a fingerprint for each."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from training import contrastive, encoders, stages
from training.encoders import build, spec_of
from training.encoders.shapes import latent_channels, text_widths
from training.encoders.text import TextEncoder

TEXTS = ["a red circle", "", "a much longer caption about a small blue triangle on the left", "b"]
CLOSE = {"atol": 2e-3, "rtol": 2e-3}  # float16


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> str:
    """A pretrained T5 with its tokenizer, as the hub keeps them."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    folder = str(tmp_path_factory.mktemp("t5"))
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 3}
    T5EncoderModel(T5Config(vocab_size=384, **sizes)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A pretrained CLIP as open_clip publishes it, with its own vocabulary."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    config = contrastive.model_config(
        stages.config_of(
            "clip",
            {
                "embed": 12,
                "image": {"kind": "vit", "side": 16, "width": 32, "layers": 1},
                "text": {"vocabulary": 49408, "context": 20, "width": 16, "heads": 2, "layers": 2},
            },
        )
    )
    torch.manual_seed(0)
    save_file(CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    described = {"model_cfg": config, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.mark.parametrize("name", ["clip", "t5"])
def test_captions_come_back_in_their_order_whatever_their_neighbours(line, name):
    encode = build(spec_of(line.stages[name], name))
    tokens, pooled = encode(TEXTS)
    assert [t.dtype for t in tokens] == [np.float16] * 4
    assert pooled.dtype == np.float16
    for text, states, summary in zip(TEXTS, tokens, pooled, strict=True):
        (alone,), own = encode([text])
        np.testing.assert_allclose(states, alone, **CLOSE)
        np.testing.assert_allclose(summary, own[0], **CLOSE)


def test_t5_gives_its_encoders_last_states_up_to_the_end_token(line):
    tokens, pooled = build(spec_of(line.stages["t5"], "t5"))(TEXTS)
    stage = stages.load(line.stages["t5"])
    for text, states, summary in zip(TEXTS, tokens, pooled, strict=True):
        ids = torch.tensor([[*(b + 3 for b in text.encode()), 1]])
        with torch.no_grad():
            wanted = stage.model.encoder(input_ids=ids).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states, wanted, **CLOSE)
        np.testing.assert_allclose(summary, wanted.mean(0), **CLOSE)


def test_clip_gives_its_words_and_its_towers_states_up_to_the_end_token(line):
    tokens, pooled = build(spec_of(line.stages["clip"], "clip"))(TEXTS)
    stage = stages.load(line.stages["clip"])
    ids = stage.tokens(TEXTS)
    seen = []
    stage.model.ln_final.register_forward_hook(lambda _, __, out: seen.append(out.detach().numpy()))
    wanted = stage.texts(TEXTS).numpy()
    np.testing.assert_allclose(pooled, wanted, **CLOSE)
    for row, states in enumerate(tokens):
        assert len(states) == int(ids[row].argmax()) + 1
        words, states = np.split(states, 2, axis=1)
        np.testing.assert_allclose(states, seen[0][row, : len(states)], **CLOSE)
        with torch.no_grad():
            own = stage.model.token_embedding(ids[row, : len(words)])
        wanted = torch.nn.functional.layer_norm(own, own.shape[-1:]).numpy()
        np.testing.assert_allclose(words, wanted, **CLOSE)


@pytest.mark.parametrize(
    ("kind", "limit"), [("clip stage", 40), ("t5 stage", 96), ("clip", 20), ("t5", 256)]
)
def test_too_long_captions_are_cut_at_a_token_and_told(kind, limit, line, clip, t5):
    """A byte and its end make two tokens of a T5 over bytes; a start token comes before CLIP's."""
    name = kind.split()[0]
    where = {"clip": clip, "t5": t5}[kind] if kind == name else line.stages[name]
    encode = build(spec_of(where, name))
    unit, others = ("b ", 2) if name == "clip" else ("b", 1)
    whole = unit * (limit - others)
    tokens, _ = encode([whole, whole + "b", "mnbvcxz " * 400, "b"])
    assert [len(rows) for rows in tokens] == [limit] * 3 + [1 + others]
    assert encode.truncated([whole, whole + "b", "mnbvcxz " * 400, "b"]).tolist() == [0, 1, 1, 0]
    assert encode.truncated([]).shape == (0,)
    # What is cut ends in an end token: CLIP's knows nothing of what was behind it.
    if name == "clip":
        np.testing.assert_allclose(tokens[1], tokens[0], **CLOSE)


def test_the_stages_autoencoder_gives_its_moments(line, scenes):
    spec = spec_of(line.stages["autoencoder"], "autoencoder", side=16)
    pixels, _ = scenes
    found = build(spec)(pixels)
    stage = stages.load(line.stages["autoencoder"])
    with torch.no_grad():
        wanted = stage.encode(torch.from_numpy(pixels)).numpy()
    assert {n: (v.dtype, v.shape) for n, v in found.items()} == {
        "moments": (np.float16, (32, 6, 4, 4))
    }
    np.testing.assert_allclose(found["moments"], wanted, **CLOSE)
    assert spec.side == 16


def test_a_pretrained_t5_gives_transformers_numbers(t5):
    from transformers import AutoTokenizer, T5EncoderModel

    spec = spec_of(t5, "t5")
    assert spec.options["pretrained"] == t5
    tokens, pooled = build(spec)(TEXTS)
    model, tokenizer = T5EncoderModel.from_pretrained(t5).eval(), AutoTokenizer.from_pretrained(t5)
    for text, states, summary in zip(TEXTS, tokens, pooled, strict=True):
        with torch.no_grad():
            given = tokenizer(text, return_tensors="pt")
            wanted = model(**given).last_hidden_state[0].numpy()
        np.testing.assert_allclose(states, wanted, **CLOSE)
        np.testing.assert_allclose(summary, wanted.mean(0), **CLOSE)


def test_a_pretrained_clip_gives_open_clips_numbers(clip):
    import open_clip

    tokens, pooled = build(spec_of(clip, "clip"))(TEXTS)
    model = open_clip.create_model(f"local-dir:{clip}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{clip}")(TEXTS)
    with torch.no_grad():
        wanted = model.encode_text(ids, normalize=True).numpy()
    np.testing.assert_allclose(pooled, wanted, **CLOSE)
    assert [len(t) for t in tokens] == [int(row.argmax()) + 1 for row in ids]


def test_a_tower_without_a_causal_mask_does_not_look_at_padding():
    from open_clip.model import CustomTextCLIP

    config = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1},
        "text_cfg": {
            "context_length": 12, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1,
            "no_causal_mask": True, "pool_type": "eos", "eos_id": 39,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    model = CustomTextCLIP(**config).eval()
    ids = {"short": [3, 4, 39], "long": [5, 6, 7, 8, 9, 39]}

    def tokenize(texts, limit):
        return np.array([ids[t] + [0] * (limit - len(ids[t])) for t in texts])

    encode = encoders.clip.text_encoder(model, tokenize, "cpu")
    both, _ = encode(["short", "long"])
    (alone,), _ = encode(["short"])
    assert [len(t) for t in both] == [3, 6]
    np.testing.assert_allclose(both[0], alone, **CLOSE)


def test_towers_that_read_in_another_way_are_refused():
    from open_clip.model import CLIP

    config = contrastive.model_config(stages.config_of("clip", {"text": {"vocabulary": 600}}))
    config["text_cfg"]["pool_type"] = "last"
    with pytest.raises(ValueError, match="CLIP pools by 'last'"):
        encoders.clip.text_encoder(CLIP(**config), None, "cpu")


def test_shapes_are_known_without_loading(line, t5, clip):
    assert latent_channels(line.stages["autoencoder"]) == 3
    assert text_widths(line.stages["clip"], "clip") == (64, 24)
    assert text_widths(line.stages["t5"], "t5") == (32, 32)
    assert text_widths(t5, "t5") == (24, 24)
    assert text_widths(clip, "clip") == (32, 12)
    for source, name in ((t5, "t5"), (clip, "clip")):
        tokens, pooled = build(spec_of(source, name))(["x"])
        assert (tokens[0].shape[1], pooled.shape[1]) == text_widths(source, name)


def copied(source: str, target: Path) -> str:
    shutil.copytree(source, target)
    return str(target)


def test_the_fingerprint_names_the_numbers_and_not_the_place(line, t5, tmp_path):
    for source, name in ((line.stages["t5"], "t5"), (t5, "t5")):
        moved = copied(source, tmp_path / Path(source).name)
        assert spec_of(moved, name).fingerprint == spec_of(source, name).fingerprint
    side = [spec_of(line.stages["autoencoder"], "autoencoder", s).fingerprint for s in (16, 32)]
    assert (
        len({*side, spec_of(line.stages["t5"], "t5").fingerprint, spec_of(t5, "t5").fingerprint})
        == 4
    )


def test_other_weights_or_another_config_are_another_encoder(t5, tmp_path):
    from safetensors.torch import load_file, save_file

    moved = Path(copied(t5, tmp_path / "t5"))
    before = spec_of(str(moved), "t5")
    weights = load_file(moved / "model.safetensors")
    weights["shared.weight"][5] += 1
    save_file(weights, moved / "model.safetensors", {"format": "pt"})
    changed = spec_of(str(moved), "t5")
    assert changed.fingerprint != before.fingerprint
    with pytest.raises(ValueError, match=f"are {changed.fingerprint}, the spec names"):
        build(before)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    assert spec_of(str(moved), "t5").fingerprint != changed.fingerprint


def test_specs_and_build_travel_to_other_processes(line):
    spec = spec_of(line.stages["t5"], "t5_bytes")
    assert spec.name == "t5_bytes"
    assert (spec.kind, spec.side) == ("text", None)
    again, made = pickle.loads(pickle.dumps((spec, build)))
    assert again == spec
    assert made is build
    assert json.loads(json.dumps(spec.options)) == spec.options


def test_what_encodes_nothing_is_refused(line, tmp_path):
    with pytest.raises(ValueError, match="a stage of kind 'base' encodes nothing"):
        spec_of(line.stages["base"], "base")
    with pytest.raises(ValueError, match="say the side"):
        spec_of(line.stages["autoencoder"], "autoencoder")
    (tmp_path / "job.json").write_text("{}")
    with pytest.raises(ValueError, match="is not trained yet"):
        spec_of(str(tmp_path), "t5")
    with pytest.raises(ValueError, match="no such folder, and not a hub id"):
        spec_of(str(tmp_path / "nowhere"), "t5")


def test_pickled_weights_are_not_read(t5, tmp_path):
    moved = Path(copied(t5, tmp_path / "t5"))
    (moved / "model.safetensors").rename(moved / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no safetensors file"):
        spec_of(str(moved), "t5")


def test_a_folder_of_several_models_is_addressed_by_its_part(t5, tmp_path):
    copied(t5, tmp_path / "text_encoder")
    spec = spec_of(f"{tmp_path}#text_encoder", "t5")
    assert spec.fingerprint == spec_of(t5, "t5").fingerprint
    assert len(build(spec)(["ab"])[0][0]) == 3


def test_batches_hold_captions_of_like_length_and_no_more_tokens_than_agreed():
    seen = []

    def run(ids, mask):
        seen.append(tuple(ids.shape))
        assert torch.equal(ids != 0, mask)
        return ids[:, :, None].float(), ids.sum(1, keepdim=True).float()

    lengths = np.random.default_rng(0).permutation(np.arange(1, 201))
    encode = TextEncoder(
        lambda texts, _: [np.full(int(t), int(t)) for t in texts], run, 200, torch.device("cpu")
    )
    tokens, pooled = encode([str(n) for n in lengths])
    assert all(rows * width <= 8192 for rows, width in seen)
    assert sum(rows * width for rows, width in seen) < 1.4 * lengths.sum()
    assert [len(t) for t in tokens] == lengths.tolist()
    np.testing.assert_array_equal(pooled[:, 0], lengths.astype(np.float16) ** 2)
    with pytest.raises(ValueError, match="no captions"):
        encode([])


def test_a_spec_of_another_stage_is_refused(line):
    spec = spec_of(line.stages["t5"], "t5")
    elsewhere = replace(spec, options={**spec.options, "stage": line.stages["clip"]})
    with pytest.raises(ValueError, match="the spec names"):
        build(elsewhere)


def test_an_option_that_is_not_set_is_in_no_fingerprint(line, tmp_path):
    """A stage that was trained before there was the option is the same encoder."""
    now = line.root / "autoencoder"
    older = shutil.copytree(now, tmp_path / "older", ignore=shutil.ignore_patterns("checkpoints"))
    described = json.loads((older / "config.json").read_text())
    config = described["config"]
    for options, name in (
        (config, "perceptual"), (config, "adversarial"), (config["network"], "codebook")
    ):  # fmt: skip
        assert options.pop(name) is None
    (older / "config.json").write_text(json.dumps(described))
    found = [spec_of(where, "autoencoder", 16).fingerprint for where in (now, older)]
    assert found[0] == found[1]
    config["l1"] = 0.5
    (older / "config.json").write_text(json.dumps(described))
    assert spec_of(older, "autoencoder", 16).fingerprint != found[0]
