"""Encoding is a pure function of (shard, encoder), made once, and refuses what does not fit."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import images, manifest, storage
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.load import mapped, unpack_keys
from pipeline.schema import EncoderSpec, Encoding
from pipeline.shards import ShardSample, read_shard, write_shard

LOCAL = Executor(kind="local")
MEANS = EncoderSpec("means", "image", "means01", {"batch": 3}, side=4)
WORDS = EncoderSpec("words", "text", "words01", {"batch": 2})
BUCKETS = ((4, 6), (4, 4), (6, 4))  # each has some pictures of every shard of `dataset`
REDS = EncoderSpec("reds", "image", "reds01", {"batch": 2}, side=4, buckets=BUCKETS)
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


def reds(pixels):
    return {"reds": pixels[:, :1].astype(np.float16)}


def words(texts):
    """A token per character, two numbers wide; the summary is the length."""
    tokens = [np.array([[ord(c), n] for n, c in enumerate(text)], np.float16) for text in texts]
    return tokens, np.array([[len(text)] for text in texts], np.float16)


def build(spec):
    """Also called by other processes of the tests, which import this file by its path."""
    if log := os.environ.get("BUILD_LOG"):
        with open(log, "a") as file:
            file.write(f"{spec.name}\n")
    return {"means": means, "reds": reds, "words": words}[spec.name]


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


def encoded(data, shard, spec, bucket=None):
    encoding = Encoding.at(data.dataset, spec.name, spec.kind, spec.fingerprint)
    return mapped(Path(encoding.arrays_url(shard.name, bucket)))


def test_every_row_is_the_encoders_answer_to_its_sample(tmp_path):
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


def test_each_picture_is_decoded_once_for_all_encoders(tmp_path, monkeypatch):
    data, decodes, decode = dataset(tmp_path), [], images.decode
    monkeypatch.setattr(images, "decode", lambda *it: decodes.append(1) or decode(*it))
    reds = EncoderSpec("reds", "image", "reds01", side=6)
    encode(data, [MEANS, reds, pixels_spec(5), WORDS], build, LOCAL)
    assert len(decodes) == 14
    assert len(files(tmp_path)) == 4 * 3
    encode(data, [MEANS, WORDS], build, LOCAL)
    assert len(decodes) == 14, "decoded for nothing"


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


def test_each_picture_is_in_the_bucket_nearest_to_its_shape(tmp_path):
    data = dataset(tmp_path)
    done = encode(data, [REDS, MEANS, WORDS], build, LOCAL)
    for shard in data.shards:
        samples = list(read_shard(data.url("shards", f"{shard.name}.tar")))
        pictures = [images.decode(sample.image)[0] for sample in samples]
        index, metadata = encoded(data, shard, REDS)
        assert index.keys() == {"keys", "bucket"}
        assert unpack_keys(index["keys"]) == [sample.key for sample in samples]
        assert json.loads(metadata["darkroom"])["fingerprint"] == "reds01"
        numbers = [images.nearest(BUCKETS, *picture.size) for picture in pictures]
        assert index["bucket"].tolist() == numbers
        assert set(numbers) == {0, 1, 2}
        for number, bucket in enumerate(BUCKETS):
            arrays, _ = encoded(data, shard, REDS, bucket)
            rows = [row for row, own in enumerate(numbers) if own == number]
            assert unpack_keys(arrays["keys"]) == [samples[row].key for row in rows]
            wanted = np.stack([images.fit(pictures[row], bucket) for row in rows])
            np.testing.assert_array_equal(arrays["reds"], reds(wanted)["reds"])
        means_alone = [means(images.fit(p, 4)[None])["means"][0] for p in pictures]
        np.testing.assert_array_equal(encoded(data, shard, MEANS)[0]["means"], means_alone)
    stated = {"name": "reds", "kind": "image", "fingerprint": "reds01", "side": 4}
    stated["buckets"] = [[4, 6], [4, 4], [6, 4]]
    fields = {"bucket": {"dtype": "uint8", "shape": []}}
    assert storage.read_json(done["reds"].stated_url()) == stated | {"fields": fields}
    fields = {"reds": {"dtype": "float16", "shape": [1, 6, 4]}}
    assert storage.read_json(done["reds"].stated_url((4, 6))) == stated | {"fields": fields}


def test_a_bucket_without_pictures_has_no_file(tmp_path):
    data = dataset(tmp_path, shards=1)
    encode(data, [pixels_spec(4, ((4, 4), (400, 4)))], None, LOCAL)
    names = [Path(name).name for name in files(data.dataset)]
    (shard,) = data.shards
    assert sorted(names) == sorted(
        [f"{shard.name}.4x4.safetensors", f"{shard.name}.safetensors"]
        + ["encoder.4x4.json", "encoder.json"]
    )


def test_buckets_and_flip_are_another_encoding(tmp_path):
    specs = [
        pixels_spec(4),
        pixels_spec(4, BUCKETS),
        pixels_spec(4, BUCKETS[:2]),
        pixels_spec(4, flip=True),
    ]
    assert len({spec.fingerprint for spec in specs}) == 4
    assert pixels_spec(4, ((4, 4),)) == pixels_spec(4)
    assert pixels_spec(32).fingerprint == "665bf8a69354f785"  # what is encoded stays encoded
    data = dataset(tmp_path)
    encode(data, [REDS], build, LOCAL, splits=["train"])
    before = files(data.dataset)
    for other, message in (
        (replace(REDS, buckets=BUCKETS[:2]), r"buckets \[\[4, 6\], \[4, 4\], \[6, 4\]\], but reds"),
        (replace(REDS, buckets=()), "but reds .reds01. has buckets None"),
        (replace(REDS, flip=True), "flip None, but reds .reds01. has flip True"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(data, [other], build, LOCAL)
    assert files(data.dataset) == before


@pytest.mark.parametrize("buckets", [(), BUCKETS])
def test_mirrored_pictures_are_a_second_view(tmp_path, buckets):
    data = dataset(tmp_path, shards=1)
    spec = replace(REDS, fingerprint="reds02", buckets=buckets, flip=True)
    for each in (replace(spec, fingerprint="reds01", flip=False), spec):
        encode(data, [each], build, LOCAL)
    (shard,) = data.shards
    for bucket in buckets or [None]:
        once, _ = encoded(data, shard, REDS, bucket)
        twice, _ = encoded(data, shard, spec, bucket)
        np.testing.assert_array_equal(twice["keys"], once["keys"])
        np.testing.assert_array_equal(twice["reds"][::2], once["reds"])
        np.testing.assert_array_equal(twice["reds"][1::2], once["reds"][..., ::-1])


def test_a_picture_is_rejected_for_either_view_in_any_bucket(tmp_path):
    data = dataset(tmp_path, shards=1)
    (shard,) = data.shards
    samples = list(read_shard(data.url("shards", f"{shard.name}.tar")))
    bad = {0: False, 3: True, 6: True}  # row -> whether it is its mirror image that fails
    failing = []
    for row, mirrored in bad.items():
        picture, _ = images.decode(samples[row].image)
        pixels = images.fit(picture, BUCKETS[images.nearest(BUCKETS, *picture.size)])
        failing.append((pixels[..., ::-1] if mirrored else pixels).tobytes())

    def broken(_):
        def encoder(pixels):
            fields = reds(pixels)
            fields["reds"][[rows.tobytes() in failing for rows in pixels], 0, 2, 1] = np.nan
            return fields

        return encoder

    spec = replace(REDS, flip=True)
    with pytest.raises(ValueError, match="3 of 7 samples gave NaN or Inf"):
        encode(data, [spec], broken, LOCAL)
    encode(data, [spec], broken, LOCAL, max_rejected_share=0.5)
    listed = storage.read_json(f"{data.dataset}/encodings/reds01/{shard.name}.rejected.json")
    assert listed["rows"] == [0, 3, 6]
    assert listed["keys"] == [samples[row].key for row in bad]
    for bucket in BUCKETS:
        assert np.isfinite(encoded(data, shard, spec, bucket)[0]["reds"]).all()


def exhausting(limit, error, sizes):
    """Builds encoders that `error` ends when they are handed more than `limit` rows."""

    def build_one(spec):
        encoder = build(spec)

        def limited(rows):
            sizes.append(len(rows))
            if len(rows) > limit:
                error()
            return encoder(rows)

        return limited

    return build_one


def no_memory():
    raise MemoryError


def no_torch_memory():
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def no_cuda_memory():
    import torch

    raise torch.OutOfMemoryError("CUDA: tried to allocate 2.00 GiB")


@pytest.mark.parametrize("error", [no_memory, no_torch_memory, no_cuda_memory])
@pytest.mark.parametrize("spec", [MEANS, WORDS, replace(REDS, flip=True)], ids=lambda s: s.name)
def test_out_of_memory_halves_the_batch_for_good(tmp_path, spec, error):
    whole, halved, sizes = dataset(tmp_path / "a"), dataset(tmp_path / "b"), []
    spec = replace(spec, options={"batch": 7})
    encode(whole, [spec], build, LOCAL)
    encode(halved, [spec], exhausting(2, error, sizes), LOCAL)
    assert files(halved.dataset) == files(whole.dataset)
    tried = [size for size in sizes if size > 2]
    assert sizes[: len(tried)] == tried  # after the first success it is never asked for more
    assert 1 <= len(tried) <= 2
    assert max(sizes[len(tried) :]) <= 2


@pytest.mark.parametrize("error", [no_memory, no_torch_memory, no_cuda_memory])
@pytest.mark.parametrize(
    ("spec", "where"), [(MEANS, ", rows from 0"), (WORDS, "")], ids=["images", "text"]
)
def test_a_row_that_alone_is_too_large_ends_the_run(tmp_path, spec, where, error):
    data, sizes = dataset(tmp_path), []
    spec = replace(spec, options={"batch": 5})
    message = rf"encoder {spec.name}, shard train-\w+{where}: not enough memory for a single row \("
    with pytest.raises(ValueError, match=message):
        encode(data, [spec], exhausting(0, error, sizes), LOCAL)
    assert sizes == ([5, 2, 1] if spec.kind == "image" else [4, 2, 1])  # four captions are unique
    assert not [name for name in files(data.dataset) if name.endswith("safetensors")]


def test_an_error_that_is_not_about_memory_is_not_tried_again(tmp_path):
    data, sizes = dataset(tmp_path), []

    def other_error():
        raise RuntimeError("the weights are gone")

    with pytest.raises(RuntimeError, match="the weights are gone"):
        encode(data, [MEANS], exhausting(0, other_error, sizes), LOCAL)
    assert sizes == [3]


def test_killed_before_any_of_its_files_a_shard_in_buckets_is_not_there_yet(tmp_path):
    """Each child dies on its way to make one more file visible."""
    whole = dataset(tmp_path / "whole")
    encode(whole, [REDS], build, LOCAL)
    wanted = files(whole.dataset)
    code = f"""
import importlib.util, itertools, os, sys
spec = importlib.util.spec_from_file_location("toys", {__file__!r})
toys = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toys)
for count in itertools.count():
    data = toys.dataset(os.path.join({str(tmp_path)!r}, str(count)))
    if not os.fork():
        made = itertools.count()
        def deadly(publish):
            return lambda *names: os._exit(9) if next(made) == count else publish(*names)
        os.replace, os.link = deadly(os.replace), deadly(os.link)
        toys.encode(data, [toys.REDS], toys.build, toys.LOCAL)
        os._exit(0)
    if (code := os.waitstatus_to_exitcode(os.wait()[1])) != 9:
        print(count)
        sys.exit(code)
"""
    child = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE)
    assert int(child.stdout) >= len(wanted)
    partial = 0
    for count in range(int(child.stdout)):
        data = manifest.read(str(tmp_path / str(count)), 1)
        there = {name for name in files(data.dataset) if "/." not in name}
        assert len(there) < len(wanted)
        for shard in data.shards:
            done = f"reds01/{shard.name}.safetensors" in there
            parts = {name for name in there if shard.name in name}
            assert len(parts) == 4 if done else len(parts) < 4
            partial += bool(parts) and not done
        encode(data, [REDS], build, LOCAL)
        assert files(data.dataset) == wanted  # nothing hidden is left over either
    assert partial == 2 * 3


def test_two_runs_at_once_give_one_result(tmp_path):
    """In lock-step: each batch is begun once the other is there, so both commit the same files."""
    specs = [MEANS, WORDS, REDS, pixels_spec(4)]
    alone, data = dataset(tmp_path / "alone"), dataset(tmp_path / "both")
    encode(alone, specs, build, LOCAL)
    together = multiprocessing.get_context("fork").Barrier(2, timeout=30)

    def in_step(spec):
        encoder = build(spec)

        def stepping(rows):
            together.wait()
            return encoder(rows)

        return stepping

    def run():
        if pid := os.fork():
            return pid
        try:
            encode(data, specs, in_step, LOCAL)
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)

    both = [run(), run()]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in both] == [0, 0]
    assert files(data.dataset) == files(alone.dataset)  # nothing hidden is left over either
    encode(data, specs, None, LOCAL)  # without encoders: there is nothing left to do


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


def test_an_odd_sample_does_not_keep_a_small_shard_from_being_encoded(tmp_path):
    """A twentieth of three samples is none, and of one that was added alone too."""
    data, bad = dataset(tmp_path, samples=3), [1]

    def broken(_):
        def image(pixels):
            fields = means(pixels)
            fields["means"][[row for row in bad if row < len(pixels)]] = np.nan
            return fields

        return image

    encode(data, [MEANS], broken, LOCAL)
    for shard in data.shards:
        listed = storage.read_json(f"{data.dataset}/encodings/means01/{shard.name}.rejected.json")
        assert listed["rows"] == [1]
    alone = dataset(tmp_path / "alone", shards=1, samples=1)
    bad[:] = [0]
    encode(alone, [MEANS], broken, LOCAL)
    assert not encoded(alone, alone.shards[0], MEANS)[0]["means"].any()
    bad[:] = [0, 2]
    with pytest.raises(ValueError, match="2 of 3 samples .*, at most 5% of 20 may"):
        encode(dataset(tmp_path / "two", samples=3), [MEANS], broken, LOCAL)
    strict, bad[:] = dataset(tmp_path / "strict", samples=3), [1]
    with pytest.raises(ValueError, match="1 of 3 samples .*, at most 0% of 20 may"):
        encode(strict, [MEANS], broken, LOCAL, max_rejected_share=0)


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


def test_what_ingest_let_in_is_read_whatever_its_size(tmp_path):
    """Its rules may have allowed more than decoding does where nobody says anything."""
    large = images.encode(Image.new("L", (7100, 7100), 200).convert("RGB"), "png")
    with pytest.raises(images.Rejected, match="7100 x 7100 pixels"):
        images.decode(large)
    url = str(tmp_path / "data")
    shard = write_shard([ShardSample("0" * 32, large, "png", ("grey",))], url, "train")
    data = manifest.Manifest(url, 1, None, (shard,))
    encode(data, [pixels_spec(8)], build, LOCAL)
    (it,) = encoded(data, shard, pixels_spec(8))[0]["pixels"]
    assert (it == 200).all()


def test_names_are_unique(tmp_path):
    with pytest.raises(ValueError, match="name of its own, got means, means"):
        encode(dataset(tmp_path), [MEANS, replace(MEANS, fingerprint="x")], build, LOCAL)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_anywhere_and_run_again_gives_the_same_bytes(
    tmp_path, rounds, killed_at, measured, kills
):
    specs = [MEANS, WORDS, pixels_spec(4), REDS]
    whole = dataset(tmp_path / "whole", shards=5)
    encode(whole, specs, build, LOCAL)
    wanted = files(whole.dataset)
    assert len(wanted) == 3 * 6 + 4 * 6
    timed = dataset(tmp_path / "timed", shards=5)
    steps, each = measured(lambda: encode(timed, specs, build, LOCAL))
    numbers, early = itertools.count(), []

    def kill(step, seconds):
        data = dataset(tmp_path / str(next(numbers)), shards=5)
        status = killed_at(step, lambda: encode(data, specs, build, LOCAL), seconds)
        assert status in (0, -signal.SIGKILL)
        early.append(files(data.dataset).keys() != wanted.keys())
        encode(data, specs, build, LOCAL)
        assert files(data.dataset) == wanted  # nothing hidden is left over either
        shutil.rmtree(data.dataset)
        return status != 0

    kills(rounds(9, 94), random.Random(4), steps, each, kill)
    assert sum(early) > len(early) // 2, "too many came too late to tell anything"
