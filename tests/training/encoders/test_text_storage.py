"""What stored text takes: each caption once and unpadded, against fp16 padded to the limit."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import manifest
from pipeline.encode import encode
from pipeline.execute import Executor
from pipeline.load import text_storage
from pipeline.schema import EncoderSpec, Encoding
from pipeline.shards import ShardSample, write_shard
from training import contrastive, stages
from training.encoders import build, spec_of

WIDTH = 64


def captioned(folder, captions: list[list[str]], shard_samples: int = 1024) -> manifest.Manifest:
    """A data set of grey pixels with these captions."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    samples = [
        ShardSample(f"{number:032x}", out.getvalue(), "png", tuple(texts))
        for number, texts in enumerate(captions)
    ]
    made = tuple(
        write_shard(samples[first : first + shard_samples], str(folder), "train")
        for first in range(0, len(samples), shard_samples)
    )
    manifest.publish(manifest.Manifest(str(folder), 1, None, made))
    return manifest.read(str(folder), 1)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A small CLIP with the whole vocabulary and 77 tokens, as open_clip publishes it."""
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("clip")
    text = {"vocabulary": 49408, "context": 77, "width": WIDTH, "heads": 2, "layers": 1}
    image = {"kind": "vit", "side": 16, "width": 32, "layers": 1}
    config = stages.config_of("clip", {"embed": WIDTH, "image": image, "text": text})
    described = {"model_cfg": contrastive.model_config(config), "preprocess_cfg": {}}
    torch.manual_seed(0)
    save_file(CLIP(**described["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return str(folder)


def t5(folder, tokenizer) -> str:
    """A small T5 with its tokenizer, as transformers publishes it."""
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(tokenizer), **sizes)
    T5EncoderModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pieces(texts: list[str]):
    """T5's tokenizer with pieces learnt from `texts`: its own are not to be had offline."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import T5Tokenizer

    learner = Tokenizer(models.Unigram())
    learner.normalizer = normalizers.NFKC()
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    learner.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=8000, special_tokens=special, unk_token="<unk>", show_progress=False
        ),
    )
    vocabulary = json.loads(learner.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[(piece, score) for piece, score in vocabulary])


def test_the_storybooks_text_takes_a_fourth_of_padded_text(clip, real_data, tmp_path):
    """T5's pieces are learnt from other texts, and few: the real ones are longer."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import ByT5Tokenizer

    def rows(name: str) -> list[dict]:
        lines = (real_data(name) / "captions.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    captions = [row["caption"] for row in rows("storybooks")]
    data = captioned(tmp_path / "data", [[caption] for caption in captions])
    prompts = (real_data("prompts") / "PartiPrompts.tsv").read_text().splitlines()
    known = pieces([row["long_caption"] for row in rows("exercises_pd")] + prompts)
    sources = {
        "clip": clip,
        "t5": t5(tmp_path / "t5", known),
        "t5_bytes": t5(tmp_path / "bytes", ByT5Tokenizer()),
    }
    specs = [spec_of(where, name) for name, where in sources.items()]
    made = encode(data, specs, build, Executor(kind="local"))
    unique, cut = sorted(set(captions)), {}
    for spec in specs:
        cut[spec.name] = int(build(spec).truncated(unique).sum())
    read = SimpleTokenizer()
    assert cut["clip"] == sum(len(read.encode(caption)) + 2 > 77 for caption in unique) > 0
    assert cut["t5_bytes"] == sum(len(caption.encode()) + 1 > 256 for caption in unique) > 0

    found = {n: text_storage(data, it, 77 if n == "clip" else 512) for n, it in made.items()}
    for spec in specs:  # of all samples, not of unique captions
        assert found[spec.name].cut == int(build(spec).truncated(captions).sum())
    for name, it in found.items():
        print(
            f"{name}: {it.captions} captions, {it.stored} stored ({cut[name]} of {len(unique)} "
            f"cut), {it.tokens / it.stored:.1f} tokens each; {it.stored_bytes / 1e6:.2f} MB, "
            f"padded {it.padded_bytes / 1e6:.2f} MB: {it.padded_bytes / it.stored_bytes:.2f} times"
        )

    def times(*names: str) -> float:
        padded = sum(found[name].padded_bytes for name in names)
        return padded / sum(found[name].stored_bytes for name in names)

    assert times("clip", "t5") > 4
    assert times("t5") > 4
    assert times("t5_bytes") > 4
    # Its captions have 32 tokens of 77, and of these the words' own half is stored once a word.
    assert times("clip") > 4


def grey(texts: list[str]) -> tuple[list[np.ndarray], np.ndarray]:
    """As many tokens of width 3 as a text has letters."""
    return [np.ones((len(t), 3), np.float16) for t in texts], np.ones((len(texts), 2), np.float16)


class Short:
    """Reads three letters of a text."""

    limit = 3

    def __call__(self, texts):
        return grey([text[:3] for text in texts])

    def truncated(self, texts):
        assert all(len(text) >= 3 for text in texts), "asked of those alone that fill the limit"
        return np.array([len(text) > 3 for text in texts])


def test_captions_that_were_cut_are_counted_sample_by_sample(tmp_path):
    """Bad input 22. A caption that is stored once counts as often as it is shown."""
    captions = [["aaaa", "bb"], ["aaaa"], ["ccc"], ["bb", "aaaa", "ddddd"]]
    data = captioned(tmp_path, captions, shard_samples=2)
    spec = EncoderSpec("text", "text", "short")
    made = encode(data, [spec], lambda _: Short(), Executor(kind="local"))["text"]
    found = text_storage(data, made, padded_to=3)
    assert (found.captions, found.stored, found.cut) == (7, 6, 4)
    whole = encode(data, [replace(spec, fingerprint="grey")], lambda _: grey, Executor())["text"]
    assert text_storage(data, whole, padded_to=3).cut == 0


def test_text_storage_counts_what_lies_on_disk(tmp_path):
    captions = [["aaa", "bb"], ["aaa"], ["cccccc"], ["bb", "aaa"]]
    data = captioned(tmp_path, captions, shard_samples=2)
    spec = EncoderSpec("text", "text", "grey")
    made = encode(data, [spec], lambda _: grey, Executor(kind="local"))["text"]
    files = [tmp_path / "encodings" / "grey" / f"{s.name}.safetensors" for s in data.shards]
    found = text_storage(data, made, padded_to=10)
    assert (found.captions, found.stored, found.tokens) == (6, 5, 3 + 2 + 6 + 2 + 3)
    assert found.stored_bytes == sum(file.stat().st_size for file in files)
    assert found.padded_bytes == 6 * 10 * 3 * 2
    images = Encoding(made.name, "image", made.fingerprint, made.url)
    with pytest.raises(ValueError, match="images have no captions to pad"):
        text_storage(data, images, 10)
    files[0].unlink()
    with pytest.raises(FileNotFoundError):
        text_storage(data, made, 10)
