"""Encoding is a pure function of (shard, encoder), made once, and refuses what does not fit."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import images, manifest, storage
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.load import mapped, unpack_keys
from pipeline.schema import EncoderSpec
from pipeline.shards import ShardSample, write_shard

LOCAL = Executor(kind="local")
MEANS = EncoderSpec("means", "image", "means01", {"batch": 3}, side=4)
WORDS = EncoderSpec("words", "text", "words01", {"batch": 2})
CAPTIONS = (
    ("a cat", "one cat, asleep"),
    ("a dog",),
    ("a cat",),
    ("a dog", "a dog", "a longer dog"),
)


def means(pixels):
    assert pixels.dtype == np.uint8
    assert pixels.shape[1:] == (3, 4, 4)
    return {"means": (pixels / 255).mean((2, 3)).astype(np.float16)}


def words(texts):
    """A token per character, two numbers wide; the summary is the length."""
    tokens = [np.array([[ord(c), n] for n, c in enumerate(text)], np.float16) for text in texts]
    return tokens, np.array([[len(text)] for text in texts], np.float16)


def build(spec):
    """Also called by other processes of the tests, which import this file by its path."""
    if log := os.environ.get("BUILD_LOG"):
        with open(log, "a") as file:
            file.write(f"{spec.name}\n")
    return {"means": means, "words": words}[spec.name]


def dataset(folder, shards=2, samples=7):
    made = []
    for shard in range(shards):
        rows = []
        for row in range(samples):
            rng = np.random.default_rng([shard, row])
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (6 + row, 8, 3), np.uint8)).save(out, "PNG")
            key = hashlib.blake2b(out.getvalue(), digest_size=16).hexdigest()
            captions = CAPTIONS[(shard + row) % len(CAPTIONS)]
            rows.append(ShardSample(key, out.getvalue(), "png", captions, {"label": {"row": row}}))
        split = "heldout" if shard == shards - 1 and shards > 1 else "train"
        made.append(write_shard(rows, str(folder), split))
    manifest.publish(manifest.Manifest(str(folder), 1, None, tuple(made)))
    return manifest.read(str(folder), 1)


def files(folder):
    root = Path(folder, "encodings")
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def encoded(data, shard, spec):
    return mapped(Path(data.dataset, "encodings", spec.fingerprint, f"{shard.name}.safetensors"))


def test_every_row_is_the_encoders_answer_to_its_sample(tmp_path):
    from pipeline.shards import read_shard

    data, pixels = dataset(tmp_path), pixels_spec(5)
    progress = []
    done = encode(
        data, [MEANS, pixels, WORDS], build, LOCAL, lambda *counts: progress.append(counts)
    )
    assert {name: e.fingerprint for name, e in done.items()} == {
        "means": "means01",
        "pixels": pixels.fingerprint,
        "words": "words01",
    }
    assert progress[-1] == (2, 2)
    for shard in data.shards:
        samples = list(read_shard(data.url("shards", f"{shard.name}.tar")))
        small, wide, text = (encoded(data, shard, spec)[0] for spec in (MEANS, pixels, WORDS))
        for arrays in (small, wide, text):
            assert unpack_keys(arrays["keys"]) == [sample.key for sample in samples]
        assert len(text["pooled"]) == len({c for sample in samples for c in sample.captions})
        for row, sample in enumerate(samples):
            picture, _ = images.decode(sample.image)
            np.testing.assert_array_equal(wide["pixels"][row], images.fit(picture, 5))
            np.testing.assert_array_equal(
                small["means"][row], means(images.fit(picture, 4)[None])["means"][0]
            )
            first, last = text["sample_offsets"][row : row + 2]
            assert last - first == len(sample.captions)
            for caption, number in zip(
                sample.captions, text["caption_rows"][first:last], strict=True
            ):
                begin, end = text["offsets"][number : number + 2]
                (tokens,), pooled = words([caption])
                np.testing.assert_array_equal(text["tokens"][begin:end], tokens)
                np.testing.assert_array_equal(text["pooled"][number], pooled[0])


def test_only_what_is_missing_is_made_and_the_bytes_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("BUILD_LOG", str(tmp_path / "log"))
    data = dataset(tmp_path / "data")
    encode(data, [MEANS], build, LOCAL, splits=["train"])
    encode(data, [MEANS, WORDS], build, LOCAL)
    whole = files(data.dataset)
    assert len(whole) == 2 * 3
    Path(data.dataset, "encodings", "words01", f"{data.shards[0].name}.safetensors").unlink()
    encode(data, [WORDS, MEANS], build, LOCAL)
    assert files(data.dataset) == whole
    assert (tmp_path / "log").read_text().split() == ["means", "words", "means", "words"]
    assert json.loads(whole["words01/encoder.json"]) == {
        "name": "words",
        "kind": "text",
        "fingerprint": "words01",
        "side": None,
        "fields": {
            "tokens": {"dtype": "float16", "shape": [2]},
            "pooled": {"dtype": "float16", "shape": [1]},
        },
    }


def test_nothing_is_started_when_nothing_is_missing(tmp_path):
    """Not even imported: asking costs a listing per encoder."""
    data, pixels = dataset(tmp_path), pixels_spec(4)
    encode(data, [pixels], None, LOCAL)
    code = f"""
import sys
from pipeline import manifest
from pipeline.encode import encode, pixels_spec
done = encode(manifest.latest({data.dataset!r}), [pixels_spec(4)], None, None)
assert done["pixels"].fingerprint == {pixels.fingerprint!r}
print(sorted({{"torch", "ray", "PIL", "pyarrow", "webdataset"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_picture_in_two_sizes_does_not_depend_on_its_company(tmp_path):
    together, alone = dataset(tmp_path / "a"), dataset(tmp_path / "b")
    encode(together, [pixels_spec(3), MEANS], build, LOCAL)
    encode(alone, [pixels_spec(3)], build, LOCAL)
    assert files(alone.dataset).items() < files(together.dataset).items()


@pytest.mark.parametrize("kind", ["image", "text"])
def test_rows_that_are_not_finite_are_rejected_up_to_a_share(tmp_path, kind):
    data = dataset(tmp_path, shards=1, samples=20)
    spec = MEANS if kind == "image" else WORDS

    def broken(_):
        calls = iter(range(1000))

        def image(pixels):
            fields = means(pixels)
            if next(calls) == 2:
                fields["means"][1, 2] = np.inf  # row 7
            return fields

        def text(texts):
            tokens, pooled = words(texts)
            for caption, rows in zip(texts, tokens, strict=True):
                if caption == "one cat, asleep":
                    rows[3, 0] = np.nan
            return tokens, pooled

        return image if kind == "image" else text

    bad = [7] if kind == "image" else [0, 4, 8, 12, 16]
    share = 0.9 * len(bad) / 20
    message = rf"encoder {spec.name}, shard train-\w+: {len(bad)} of 20 samples gave NaN or Inf"
    with pytest.raises(ValueError, match=message):
        encode(data, [spec], broken, LOCAL, max_rejected_share=share)
    assert not [name for name in files(data.dataset) if name.endswith("safetensors")]
    encode(data, [spec], broken, LOCAL, max_rejected_share=len(bad) / 20)
    (shard,) = data.shards
    listed = storage.read_json(
        f"{data.dataset}/encodings/{spec.fingerprint}/{shard.name}.rejected.json"
    )
    arrays, _ = encoded(data, shard, spec)
    keys = unpack_keys(arrays["keys"])
    assert listed == {"reason": "not_finite", "rows": bad, "keys": [keys[row] for row in bad]}
    assert all(np.isfinite(rows).all() for rows in arrays.values() if rows.dtype.kind == "f")


def wider(_):
    return lambda pixels: {"means": np.concatenate([means(pixels)["means"]] * 2, 1)}


@pytest.mark.parametrize(
    ("spec", "builder", "message"),
    [
        (MEANS, wider, r"fields .*\[3\].*means01.*\[6\]"),
        (replace(MEANS, side=5), wider, "side 4, but means .* side 5"),
        (EncoderSpec("words", "text", "means01"), build, "kind image, but words .* kind text"),
    ],
)
def test_another_encoder_under_the_same_fingerprint_is_refused(tmp_path, spec, builder, message):
    data = dataset(tmp_path)
    encode(data, [MEANS], build, LOCAL, splits=["train"])
    before = files(data.dataset)
    with pytest.raises(ValueError, match=message):
        encode(data, [spec], builder, LOCAL)
    assert files(data.dataset) == before


def test_a_directory_that_tells_of_another_encoder_is_refused_naming_both(tmp_path):
    data = dataset(tmp_path)
    encode(data, [MEANS], build, LOCAL)
    Path(data.dataset, "encodings", "means01").rename(Path(data.dataset, "encodings", "means02"))
    with pytest.raises(ValueError, match="fingerprint means01, but means .means02."):
        encode(data, [replace(MEANS, fingerprint="means02")], build, LOCAL)


def rows_missing(_):
    return lambda pixels: {"means": means(pixels)["means"][1:]}


def captions_missing(_):
    return lambda texts: (words(texts)[0][1:], words(texts)[1])


def width_of_its_own(_):
    return lambda texts: (
        [np.zeros((2, 3 + ("dog" in t)), np.float16) for t in texts],
        words(texts)[1],
    )


def no_tokens(_):
    return lambda texts: ([np.zeros((0, 3), np.float16) for _ in texts], words(texts)[1])


@pytest.mark.parametrize(
    ("spec", "builder", "message"),
    [
        (MEANS, rows_missing, r"encoder means, shard train-\w+, rows from 0: .* 2 rows, wanted 3"),
        (WORDS, captions_missing, "encoder words, .*: 1 token arrays for 2 captions"),
        (WORDS, width_of_its_own, r"caption '.*': tokens are float16\[2, .\], wanted"),
        (WORDS, no_tokens, "at least one row"),
        (MEANS, None, "encoder means: only pixels can do without a build"),
    ],
)
def test_encoders_that_do_not_keep_the_contract(tmp_path, spec, builder, message):
    data = dataset(tmp_path)
    with pytest.raises(ValueError, match=message):
        encode(data, [spec], builder, LOCAL)


def test_a_damaged_picture_names_its_shard_and_key(tmp_path):
    data = dataset(tmp_path, shards=1)
    path = Path(data.url("shards", f"{data.shards[0].name}.tar"))
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT")
    content[at + 8 : at + 20] = bytes(12)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shards/train-\w+\.tar, sample \w{32}: .*decoded"):
        encode(data, [MEANS], build, LOCAL)


def test_names_are_unique(tmp_path):
    with pytest.raises(ValueError, match="name of its own, got means, means"):
        encode(dataset(tmp_path), [MEANS, replace(MEANS, fingerprint="x")], build, LOCAL)


def _start(data, slow):
    code = f"""
import importlib.util, time
spec = importlib.util.spec_from_file_location("toys", {__file__!r})
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
means = toys.means
def slowly(pixels):
    time.sleep({slow})
    return means(pixels)
toys.means = slowly
data = toys.manifest.latest({data.dataset!r})
print("ready", flush=True)
toys.encode(data, [toys.MEANS, toys.WORDS, toys.pixels_spec(4)], toys.build, toys.LOCAL)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path):
    whole = dataset(tmp_path / "whole", shards=5)
    with _start(whole, 0) as process:
        assert process.wait() == 0
    wanted = files(whole.dataset)
    assert len(wanted) == 3 * 6
    early = 0
    for target in range(1, len(wanted), 2):
        data = dataset(tmp_path / str(target), shards=5)
        with _start(data, 0.05) as process:
            while len(list(Path(data.dataset, "encodings").rglob("*.*"))) < target:
                time.sleep(0.001)
            time.sleep(0.02 * np.random.default_rng(target).random())
            process.send_signal(signal.SIGKILL)
        early += files(data.dataset).keys() != wanted.keys()
        encode(data, [MEANS, WORDS, pixels_spec(4)], build, LOCAL)
        assert files(data.dataset) == wanted  # nothing hidden is left over either
    assert early, "each kill came too late to tell anything"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
@pytest.mark.usefixtures("ray_session")
def test_on_ray_the_bytes_are_the_same(tmp_path):
    here, there = dataset(tmp_path / "here", shards=3), dataset(tmp_path / "there", shards=3)
    encode(here, [pixels_spec(4)], None, LOCAL)
    encode(there, [pixels_spec(4)], None, Executor(kind="ray", workers=2))
    assert files(there.dataset) == files(here.dataset)
