"""A batch holds what the encoders said of the samples of the plan, whoever loads it."""

import hashlib
import io
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from pipeline import images, load, manifest, storage, tokens
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.load import _KEPT, Loader, mapped, text_storage
from pipeline.plan import BatchPlan
from pipeline.schema import EncoderSpec, check
from pipeline.shards import ShardSample, write_shard

IMAGES = EncoderSpec("codes", "image", "codes01", side=4)
CHARACTERS = EncoderSpec("chars", "text", "chars01")
ONCE = EncoderSpec("once", "text", "once01")
WORDS = EncoderSpec("words", "text", "words01")
BUCKETS = ((4, 8), (4, 4), (8, 4))
BUCKETED = replace(IMAGES, fingerprint="codes02", buckets=BUCKETS)
LOCAL = Executor(kind="local")
GREY = Image.new("RGB", (1, 1), (9, 9, 9))


def codes(pixels):
    return {"code": pixels[:, 0].astype(np.float16), "mean": pixels.mean((1, 2, 3)).astype("f4")}


def characters(texts):
    tokens = [np.array([[ord(c), n] for n, c in enumerate(text)], np.float16) for text in texts]
    return tokens, np.array([[len(text)] for text in texts], np.float16)


class Once:
    """`characters`, which says that a token's first number is of its character alone."""

    repeats = 1

    def __call__(self, texts):
        return characters(texts)


def words(texts):
    tokens = [np.array([[len(w)] for w in text.split()], np.float16) for text in texts]
    return tokens, np.array([[len(t), 1, 2] for t in tokens], np.float16)


def build(spec):
    return {"codes": codes, "chars": characters, "once": Once(), "words": words}[spec.name]


def square(n):
    return 4, 4


def shape(n):
    """5 pictures in 13 are tall, 6 square and 2 wide; the middle shard of `write` has but one."""
    return BUCKETS[(1, 0, 1, 0, 2, 1, 0, 1, 0, 1, 2, 0, 1)[n]]


def write(folder, sizes=(7, 1, 5), splits=("train", "train", "train"), shape=square):
    """Sample n of all is a grey picture of level n with 1 + n % 3 captions."""
    made, n = [], 0
    for size, split in zip(sizes, splits, strict=True):
        rows = []
        for _ in range(size):
            out = io.BytesIO()
            Image.new("RGB", shape(n), (n, n, n)).save(out, "PNG")
            key = hashlib.blake2b(out.getvalue(), digest_size=16).hexdigest()
            captions = tuple(f"number {n}" + " again" * k for k in range(1 + n % 3))
            label = {"n": n} if n % 2 else None
            rows.append(ShardSample(key, out.getvalue(), "png", captions, {"label": label}))
            n += 1
        made.append(write_shard(rows, str(folder), split))
    manifest.publish(manifest.Manifest(str(folder), 1, None, tuple(made)))
    return manifest.read(str(folder), 1)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data")


@pytest.fixture
def encodings(data):
    done = encode(data, [IMAGES, CHARACTERS, WORDS], build, Executor(kind="local"))
    return list(done.values())


def equal(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, b[name])
            assert value.dtype == b[name].dtype
        else:
            assert value == b[name]


def test_every_row_is_one_sample_with_one_of_its_captions(data, encodings):
    loader = Loader(data, encodings, global_batch=8, seed=3)
    assert loader.samples == 13
    seen, shown = [], set()
    for step in range(40):
        batch = loader.batch(step)
        check("batch", batch, loader.fields, 8)
        np.testing.assert_array_equal(batch["position"], step * 8 + np.arange(8))
        assert batch["epoch"] == step * 8 // 13
        for row in range(8):
            n = int(batch["mean"][row])
            seen.append(n)
            assert (batch["code"][row] == n).all()
            label, caption = batch["label"][row], batch["caption"][row]
            assert label == ({"n": n} if n % 2 else None)
            head, *again = caption.split(" again")
            assert head == f"number {n}"
            assert len(again) <= n % 3
            shown.add((n, len(again)))
            for name, encoder in (("chars", characters), ("words", words)):
                (tokens,), pooled = encoder([caption])
                mask = batch[f"{name}_mask"][row]
                assert mask[: len(tokens)].all()
                assert mask.sum() == len(tokens)
                np.testing.assert_array_equal(batch[f"{name}_tokens"][row][mask], tokens)
                assert not batch[f"{name}_tokens"][row][~mask].any()
                np.testing.assert_array_equal(batch[f"{name}_pooled"][row], pooled[0])
    for epoch in range(40 * 8 // 13):
        assert sorted(seen[epoch * 13 : (epoch + 1) * 13]) == list(range(13))
    assert shown == {(n, k) for n in range(13) for k in range(1 + n % 3)}
    keys = [batch["key"] for batch in map(loader.batch, range(2))]
    assert all(len(key) == 32 for batch in keys for key in batch)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_workers_share_the_batch_of_one(data, encodings, workers):
    whole = Loader(data, encodings, global_batch=8, seed=0)
    parts = [
        Loader(data, encodings, global_batch=8, seed=0, worker=worker, workers=workers)
        for worker in range(workers)
    ]
    for step in (0, 1, 17):
        one, shares = whole.batch(step), [part.batch(step) for part in parts]
        for name in ("key", "caption", "label"):
            assert [value for share in shares for value in share[name]] == one[name]
        for name in ("position", "code", "mean", "words_pooled"):
            np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), one[name])
        tokens = [
            row[m]
            for s in shares
            for row, m in zip(s["chars_tokens"], s["chars_mask"], strict=True)
        ]
        for row, mask, got in zip(one["chars_tokens"], one["chars_mask"], tokens, strict=True):
            np.testing.assert_array_equal(row[mask], got)


def test_micro_batches_are_the_same_for_any_number_of_workers(data, encodings):
    def taken(workers: int) -> list[list]:
        """By step, all micro-batches in order, as the workers get them from step 3 on."""
        loaders = [
            Loader(
                data,
                encodings,
                global_batch=10,
                seed=0,
                worker=worker,
                workers=workers,
                micro_batches=4,
            )
            for worker in range(workers)
        ]
        own = [4 * (n + 1) // workers - 4 * n // workers for n in range(workers)]
        streams = [loader.batches(start_step=3) for loader in loaders]
        steps = [
            [next(stream) for n, stream in zip(own, streams, strict=True) for _ in range(n)]
            for _ in range(6)
        ]
        for stream in streams:
            stream.close()
        return steps

    alone = taken(1)
    assert [len(batch["key"]) for batch in alone[0]] == [2, 3, 2, 3]
    whole = Loader(data, encodings, global_batch=10, seed=0)
    for step, batches in enumerate(alone, 3):
        assert [key for b in batches for key in b["key"]] == whole.batch(step)["key"]
        found = np.concatenate([batch["position"] for batch in batches])
        np.testing.assert_array_equal(found, np.arange(10 * step, 10 * step + 10))
    for workers in (2, 3, 4):
        for batches, wanted in zip(taken(workers), alone, strict=True):
            for batch, expected in zip(batches, wanted, strict=True):
                equal(batch, expected)  # captions are padded alike too
    with pytest.raises(ValueError, match="worker 4 of 5 at 4 micro-batches"):
        Loader(data, global_batch=10, seed=0, worker=4, workers=5, micro_batches=4)


def test_loading_goes_on_from_any_step(data, encodings):
    loader = Loader(data, encodings, global_batch=6, seed=1)
    unbroken = list(islice(loader.batches(prefetch=0), 12))
    resumed = Loader(data, encodings, global_batch=6, seed=1).batches(start_step=7, prefetch=3)
    for expected in unbroken[7:]:
        equal(next(resumed), expected)
    resumed.close()


def test_prefetching_ends_with_its_reader_and_hands_over_errors(data, encodings):
    loader = Loader(data, encodings, global_batch=4, seed=0)
    before = threading.active_count()
    batches = loader.batches(prefetch=2)
    equal(next(batches), loader.batch(0))
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
    fresh = Loader(data, encodings, global_batch=4, seed=0)
    for shard in data.shards:
        storage.delete(f"{encodings[0].url}/{shard.name}.safetensors")
    with pytest.raises(FileNotFoundError):
        next(fresh.batches(prefetch=2))
    assert threading.active_count() == before


def test_memory_is_used_again_once_nobody_holds_it(data, encodings, monkeypatch):
    monkeypatch.setattr("pipeline.load._LARGE", 1)
    loader, other = (Loader(data, encodings, global_batch=6, seed=1) for _ in range(2))
    names = ("code", "words_tokens")

    def places(batch):
        return {batch[name].ctypes.data for name in names}

    used = places(loader.batch(0)) | places(loader.batch(1))
    assert used & places(loader.batch(2))
    held, views, wanted = [], [], []
    for step, batch in zip(range(20), loader.batches(), strict=False):
        wanted.append(other.batch(step))
        if step % 3 == 0:
            held.append((step, batch))
        elif step % 3 == 1:  # a piece of a piece, whatever it is handed to
            views += [(step, name, memoryview(batch[name][2:][:1])) for name in names]
    for step, batch in held:
        equal(batch, wanted[step])
    for step, name, view in views:
        np.testing.assert_array_equal(np.asarray(view), wanted[step][name][2:3])


def test_memory_is_kept_for_a_few_batches_alone(data, encodings, monkeypatch):
    monkeypatch.setattr("pipeline.load._LARGE", 1)
    loader = Loader(data, encodings, global_batch=13, seed=0)
    all_held = [loader.batch(step) for step in range(20)]
    for step, batch in enumerate(all_held):
        equal(batch, Loader(data, encodings, global_batch=13, seed=0).batch(step))
    assert len(loader._memory._kept) == _KEPT


def test_large_batches_hold_what_small_ones_do(shaped, monkeypatch):
    """They are put together otherwise."""
    specs = [replace(BUCKETED, flip=True), pixels_spec(4, BUCKETS, flip=True), WORDS]
    loader = Loader(shaped, [*encode(shaped, specs, build, LOCAL).values()], global_batch=4, seed=0)
    small = [loader.batch(step) for step in range(8)]
    monkeypatch.setattr(load, "_LARGE", 1)
    for step, batch in enumerate(small):
        equal(loader.batch(step), batch)


def test_chosen_rows_are_the_same_each_time(data, encodings):
    loader = Loader(data, encodings, global_batch=4, seed=0)
    batch = loader.rows([12, 0, 5, 5])
    assert batch["mean"].tolist() == [12, 0, 5, 5]
    assert batch["position"].tolist() == [12, 0, 5, 5]
    equal(loader.rows(np.array([12, 0, 5, 5])), batch)
    assert loader.rows([5])["caption"][0] == batch["caption"][2]
    for wrong in ([], [13], [-1]):
        with pytest.raises(ValueError, match="indices from 0 to 12"):
            loader.rows(wrong)


def test_fewer_images_than_a_batch_and_captions_alone(tmp_path):
    """Bad input 42: one picture is enough."""
    data = write(tmp_path, (1,), ("train",))
    loader = Loader(data, global_batch=5, seed=0)
    batch = loader.batch(3)
    assert batch["caption"] == ["number 0"] * 5
    assert batch["epoch"] == 15
    assert loader.fields == {}


def test_an_empty_selection_says_what_there_is(tmp_path):
    data = write(tmp_path)
    with pytest.raises(ValueError, match="no samples in heldout .it has train."):
        Loader(data, global_batch=2, seed=0, splits=("heldout",))
    with pytest.raises(ValueError, match="worker 0 of 3 at a global batch of 2"):
        Loader(data, global_batch=2, seed=0, workers=3)


def test_splits_are_chosen_and_do_not_disturb_each_other(tmp_path):
    data = write(tmp_path, splits=("train", "heldout", "train"))
    loader = Loader(data, global_batch=12, seed=0)
    numbers = [int(caption.split()[1]) for caption in loader.batch(0)["caption"]]
    assert sorted(numbers) == [n for n in range(13) if n != 7]
    assert Loader(data, global_batch=1, seed=0, splits=("heldout",)).samples == 1
    assert Loader(data, global_batch=1, seed=0, splits=("heldout", "train")).samples == 13


def test_rejected_rows_are_left_out(data):
    def broken(spec):
        def code(pixels):
            fields = codes(pixels)
            fields["code"][np.isin(fields["mean"], [2, 9])] = np.nan
            return fields

        return code if spec.kind == "image" else build(spec)

    done = encode(data, [IMAGES, WORDS], broken, Executor(kind="local"), max_rejected_share=0.5)
    loader = Loader(data, list(done.values()), global_batch=11, seed=0)
    assert loader.samples == 11
    for step in range(3):
        batch = loader.batch(step)
        assert sorted(batch["mean"]) == [n for n in range(13) if n not in (2, 9)]
        for row, caption in enumerate(batch["caption"]):
            assert caption.split()[1] == str(int(batch["mean"][row]))
    assert Loader(data, [done["words"]], global_batch=11, seed=0).samples == 13


@pytest.fixture
def shaped(tmp_path):
    """A data set with pictures of three shapes."""
    return write(tmp_path / "data", shape=shape)


@pytest.fixture
def bucketed(shaped):
    return list(encode(shaped, [BUCKETED, CHARACTERS, WORDS], build, LOCAL).values())


def test_a_batch_in_buckets_has_pictures_of_one_size(shaped, bucketed):
    loader = Loader(shaped, bucketed, global_batch=4, seed=3)
    assert loader.samples == 13
    assert loader.fields["code"].shape == (None, None)
    seen, steps = Counter(), 4 * 3 + 1  # of 5, 6 and 2 pictures: 2 + 2 + 1 batches at first
    sizes = set()
    for step in range(steps):
        batch = loader.batch(step)
        check("batch", batch, loader.fields, 4)
        np.testing.assert_array_equal(batch["position"], step * 4 + np.arange(4))
        numbers = batch["mean"].astype(int).tolist()
        seen.update(numbers)
        ((width, height),) = {shape(n) for n in numbers}
        assert batch["code"].shape == (4, height, width)
        sizes.add((width, height))
        for row, n in enumerate(numbers):
            assert (batch["code"][row] == n).all()
            assert batch["label"][row] == ({"n": n} if n % 2 else None)
            assert batch["caption"][row].split(" again")[0] == f"number {n}"
            (tokens,), pooled = words([batch["caption"][row]])
            np.testing.assert_array_equal(
                batch["words_tokens"][row][batch["words_mask"][row]], tokens
            )
            np.testing.assert_array_equal(batch["words_pooled"][row], pooled[0])
        if loader.plan.epoch(step + 1) > batch["epoch"]:
            assert min(seen[n] for n in range(13)) >= batch["epoch"] + 1
    assert sizes == set(BUCKETS)
    assert loader.batch(steps - 1)["epoch"] == 3


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_share_the_batch_of_one_in_buckets(shaped, bucketed, workers):
    whole = Loader(shaped, bucketed, global_batch=4, seed=0)
    parts = [
        Loader(shaped, bucketed, global_batch=4, seed=0, worker=worker, workers=workers)
        for worker in range(workers)
    ]
    resumed = parts[0].batches(start_step=9)
    for step in range(12):
        one, shares = whole.batch(step), [part.batch(step) for part in parts]
        assert {share["epoch"] for share in shares} == {one["epoch"]}
        assert [caption for share in shares for caption in share["caption"]] == one["caption"]
        for name in ("position", "code", "mean", "words_pooled"):
            np.testing.assert_array_equal(np.concatenate([s[name] for s in shares]), one[name])
        if step >= 9:
            equal(next(resumed), shares[0])
    resumed.close()


def test_samples_are_chosen_from_loaders_of_one_size(shaped, bucketed):
    loader = Loader(shaped, bucketed, global_batch=4, seed=0)
    with pytest.raises(ValueError, match=r"rows: 4 and 5 are of buckets of different sizes"):
        loader.rows([4, 5])
    each = loader.alike()
    assert [one.samples for one in each] == [6, 5, 2]
    for one, size in zip(each, ((4, 4), (4, 8), (8, 4)), strict=True):
        batch = one.rows(np.arange(one.samples))
        assert {shape(int(n)) for n in batch["mean"]} == {size}
        assert one.fields["code"].shape == size[::-1]
        check("rows", batch, one.fields, one.samples)
        check("batch", one.batch(7), one.fields, 4)
        assert one.alike() == (one,)
        first = next(i for i in range(13) if loader.rows([i])["mean"][0] == batch["mean"][0])
        more = loader.rows(first + np.arange(one.samples))
        np.testing.assert_array_equal(more["mean"], batch["mean"])
    assert Loader(shaped, bucketed[1:], global_batch=4, seed=0).alike()[0].samples == 13


def test_pictures_of_one_shape_load_as_squares_do(data):
    """Empty buckets change nothing: not even the order."""
    specs = [IMAGES, BUCKETED]
    square, one = (
        Loader(data, [*encode(data, [spec], build, LOCAL).values()], global_batch=8, seed=0)
        for spec in specs
    )
    assert one.plan == square.plan
    assert one.fields == square.fields
    for step in range(3):
        equal(one.batch(step), square.batch(step))
    assert one.alike() == (one,)


def test_squares_and_buckets_of_two_sizes_go_together(shaped, bucketed):
    halves = pixels_spec(2, [(width // 2, height // 2) for width, height in BUCKETS])
    squares = replace(IMAGES, name="means", fingerprint="means01", side=1)
    made = encode(shaped, [halves, squares], lambda _: lambda x: {"grey": codes(x)["mean"]}, LOCAL)
    loader = Loader(shaped, [*bucketed, *made.values()], global_batch=5, seed=0)
    for step in range(6):
        batch = loader.batch(step)
        assert batch["pixels"].shape[2:] == tuple(n // 2 for n in batch["code"].shape[1:])
        assert (batch["pixels"] == batch["code"][:, :1, :1, None]).all()
        np.testing.assert_array_equal(batch["grey"], batch["mean"])
    others = encode(shaped, [pixels_spec(2, [(4, 4), (4, 5)])], None, LOCAL)
    with pytest.raises(ValueError, match="encodings codes, pixels have other buckets for the same"):
        Loader(shaped, [bucketed[0], others["pixels"]], global_batch=5, seed=0)


def test_rejected_rows_are_left_out_of_their_buckets(shaped):
    def broken(spec):
        def code(pixels):
            fields = codes(pixels)
            fields["code"][np.isin(fields["mean"], [2, 4, 10])] = np.nan
            return fields

        return code

    (done,) = encode(shaped, [BUCKETED], broken, LOCAL, max_rejected_share=0.5).values()
    loader = Loader(shaped, [done], global_batch=2, seed=0)
    assert loader.samples == 10
    assert [one.samples for one in loader.alike()] == [5, 5]  # nothing is left of the wide ones
    numbers = [int(n) for one in loader.alike() for n in one.rows(np.arange(5))["mean"]]
    assert sorted(numbers) == [n for n in range(13) if n not in (2, 4, 10)]


def sided(pixels):
    """What tells a picture from its mirror image."""
    return {"code": pixels[:, 0].astype(np.float16)}


def test_pictures_are_mirrored_by_a_draw_of_their_position(tmp_path):
    """Each picture is black on its left."""
    rows = []
    for n in range(1, 9):
        picture = Image.new("RGB", (4, 4 + n % 2 * 4))
        picture.paste((n, n, n), (2, 0, 4, 8))
        out = io.BytesIO()
        picture.save(out, "PNG")
        rows.append(ShardSample(f"{n:032x}", out.getvalue(), "png", (f"number {n}",)))
    shard = write_shard(rows, str(tmp_path), "train")
    manifest.publish(manifest.Manifest(str(tmp_path), 1, None, (shard,)))
    data = manifest.read(str(tmp_path), 1)
    spec = replace(BUCKETED, flip=True)
    specs = [spec, pixels_spec(4, BUCKETS, flip=True)]
    made = encode(data, specs, lambda _: sided, LOCAL)
    loader = Loader(data, list(made.values()), global_batch=8, seed=0)
    mirrored = []
    for step in range(100):
        batch = loader.batch(step)
        np.testing.assert_array_equal(batch["code"], batch["pixels"][:, 0])  # both or neither
        numbers = np.array([int(caption.split()[1]) for caption in batch["caption"]])
        left, right = batch["code"][:, 0, 0], batch["code"][:, 0, -1]
        np.testing.assert_array_equal(left + right, numbers)
        assert (left * right == 0).all()
        mirrored += (left > 0).tolist()
    assert abs(np.mean(mirrored) - 0.5) < 5 * 0.5 / 800**0.5
    assert Loader(data, [made["codes"]], global_batch=8, seed=1).batch(0)["code"].shape[0] == 8
    halves = [
        Loader(data, [made["codes"]], global_batch=8, seed=0, worker=worker, workers=2)
        for worker in range(2)
    ]
    shares = np.concatenate([half.batch(99)["code"] for half in halves])
    np.testing.assert_array_equal(shares, loader.batch(99)["code"])
    for one in loader.alike():
        assert not one.rows(np.arange(one.samples))["code"][..., 0].any()  # as they are
    still = encode(data, [replace(IMAGES, name="still")], lambda _: codes, LOCAL)["still"]
    with pytest.raises(ValueError, match="differ in flip .codes on, still off."):
        Loader(data, [made["codes"], still], global_batch=8, seed=0)


def test_files_of_buckets_that_do_not_fit_are_refused(shaped, bucketed):
    encoding = bucketed[0]

    def batches():
        loader = Loader(shaped, [encoding], global_batch=13, seed=0)
        return [loader.batch(step) for step in range(6)]

    batches()
    paths = [Path(encoding.arrays_url(shard.name, BUCKETS[1])) for shard in shaped.shards]
    paths = [path for path in paths if path.exists()]
    whole = [path.read_bytes() for path in paths]
    for change, message in (
        (lambda a: a.update(keys=a["keys"][:, ::-1].copy()), "does not hold the samples that"),
        (lambda a: a.update({n: v[1:].copy() for n, v in a.items()}), "rows, wanted"),
        (lambda a: a.update(code=a["code"][:, :2].copy()), r"wanted float16\[rows, 4, 4\]"),
    ):
        for path, content in zip(paths, whole, strict=True):
            path.write_bytes(content)
            rewrite(path, change)
        with pytest.raises(ValueError, match=message):
            batches()
    for path, content in zip(paths, whole, strict=True):
        path.write_bytes(content)
    batches()
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=paths[0].name):
        batches()
    index = Path(encoding.arrays_url(shaped.shards[0].name))
    rewrite(index, lambda a: a.update(bucket=a["bucket"] + 1))
    with pytest.raises(ValueError, match="has a picture in bucket 3 of 3"):
        batches()


def test_shards_beyond_the_open_files_are_opened_again(data, encodings):
    loader = Loader(data, encodings, global_batch=13, seed=0)
    loader._open = lru_cache(1)(loader._open_shard)
    equal(loader.batch(5), Loader(data, encodings, global_batch=13, seed=0).batch(5))


def test_two_blocks_of_shards_are_open_at_a_time(tmp_path, monkeypatch):
    data = write(tmp_path, (3,) * 7, ("train",) * 7)
    done = [*encode(data, [IMAGES], build, LOCAL).values()]
    monkeypatch.setattr(BatchPlan.__init__, "__defaults__", (2, 0))  # shards of a block
    loader = Loader(data, done, global_batch=4, seed=0)
    assert loader.plan.block_shards == 2
    for step in range(12):
        loader.batch(step)
        assert loader._open.cache_info().currsize <= 4
    assert loader._open.cache_info().misses <= 2 * 7 + 4, "each is opened once an epoch"


@pytest.mark.parametrize("spec", [pixels_spec(1), pixels_spec(1, ((1, 1), (1, 2)))])
def test_an_open_shard_takes_few_bytes_a_sample(tmp_path, spec):
    """Its keys as texts, and the list of them, took 104."""
    rows, made = 1500, []
    for shard in range(2):
        samples = [
            ShardSample(f"{shard}{n:031x}", images.encode(GREY, "png"), "png", ("grey",))
            for n in range(rows)
        ]
        made.append(write_shard(samples, str(tmp_path), "train"))
    data = manifest.Manifest(str(tmp_path), 1, None, tuple(made))
    done = [*encode(data, [spec], None, LOCAL).values()]
    loader = Loader(data, done, global_batch=16, seed=0, captions=False)
    loader.batch(0)
    loader._open.cache_clear()
    loader._open_bucket.cache_clear()
    tracemalloc.start()
    try:
        loader.batch(0)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert loader._open.cache_info().currsize == 2
    assert held < 80 * 2 * rows


def test_buckets_beyond_the_open_files_are_opened_again(shaped, bucketed):
    loader = Loader(shaped, bucketed, global_batch=13, seed=0)
    loader._open = lru_cache(1)(loader._open_shard)
    loader._open_bucket = lru_cache(1)(loader._open_shards_bucket)
    for step in range(4):
        equal(loader.batch(step), Loader(shaped, bucketed, global_batch=13, seed=0).batch(step))


def test_latents_of_another_encoder_are_refused_naming_both(data, encodings):
    """Bad input 38: files that lie where another encoder's should."""
    codes01 = encodings[0]
    other = type(codes01)("codes", "image", "codes02", str(Path(codes01.url).with_name("codes02")))
    with pytest.raises(ValueError, match="encoder.json: missing, so encoding codes"):
        Loader(data, [other], global_batch=2, seed=0)
    shutil.copytree(codes01.url, other.url)
    with pytest.raises(
        ValueError, match=r"image encoder codes01, wanted image encoder codes .codes02."
    ):
        Loader(data, [other], global_batch=2, seed=0)
    stated = storage.read_json(f"{other.url}/encoder.json") | {"fingerprint": "codes02"}
    storage.publish_json(f"{other.url}/encoder.json", stated)
    with pytest.raises(ValueError, match=r"made by encoder codes01, wanted codes .codes02."):
        Loader(data, [other], global_batch=2, seed=0).batch(0)


def rewrite(path, change):
    arrays, metadata = load_file(path), mapped(path)[1]
    change(arrays)
    save_file(arrays, path, metadata)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (
            0,
            lambda a: a.update(code=a["code"][:, :2].copy()),
            r"code is .*wanted float16\[rows, 4, 4\]",
        ),
        (0, lambda a: a.update(code=a["code"].astype("f4")), "code is float32"),
        (0, lambda a: a.pop("mean"), "field mean is missing"),
        (0, lambda a: a.update(keys=a["keys"][::-1].copy()), "do not hold the same samples"),
        (0, lambda a: a.update({n: v[1:].copy() for n, v in a.items()}), "rows, wanted"),
        (1, lambda a: a.update(tokens=a["tokens"][:, :1].copy()), r"wanted float16\[rows, 2\]"),
        (1, lambda a: a.update(tokens=a["tokens"][1:].copy()), "offsets do not join"),
        (1, lambda a: a.update(caption_rows=a["caption_rows"] + 1), "offsets do not join"),
        (1, lambda a: a["offsets"].__setitem__(0, 1), "offsets do not join"),
    ],
)
def test_files_that_do_not_fit_are_refused(data, encodings, number, change, message):
    """Bad input 39: an embedding of the wrong width, and its kin."""
    for shard in data.shards:
        rewrite(Path(encodings[number].url, f"{shard.name}.safetensors"), change)
    with pytest.raises(ValueError, match=message):
        Loader(data, encodings, global_batch=13, seed=0).batch(0)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("number", "name", "row"), [(0, "code", 6), (0, "mean", 0), (1, "tokens", 3), (2, "pooled", 1)]
)
def test_numbers_that_are_not_finite_are_refused(data, encodings, number, name, row, bad):
    """Bad input 39: what an encoder rejected is zero there and listed, so this is another's."""
    path = Path(encodings[number].url, f"{data.shards[0].name}.safetensors")
    Loader(data, encodings, global_batch=13, seed=0).batch(0)  # a file of that name was looked at
    rewrite(path, lambda arrays: arrays[name][row : row + 1].reshape(-1)[-1:].fill(bad))
    encoder = f"{encodings[number].name} .{encodings[number].fingerprint}."
    with pytest.raises(
        ValueError, match=rf"{path}: field {name} of encoder {encoder}.*first: {row}"
    ):
        Loader(data, encodings, global_batch=13, seed=0).batch(0)


def test_a_bucket_with_numbers_that_are_not_finite_is_refused(shaped, bucketed):
    (path,) = Path(bucketed[0].url).glob(f"{shaped.shards[0].name}.4x8.safetensors")
    rewrite(path, lambda arrays: arrays["code"].fill(np.nan))
    loader = Loader(shaped, bucketed, global_batch=13, seed=0)
    with pytest.raises(ValueError, match=f"{path}: field code of encoder codes"):
        [loader.batch(step) for step in range(4)]


def test_a_file_is_looked_through_once(data, encodings, monkeypatch):
    looked = []

    def counted(numbers, look=load._all_finite):
        looked.append(numbers.nbytes)
        return look(numbers)

    monkeypatch.setattr(load, "_all_finite", counted)
    monkeypatch.setattr(load, "_finite", set())
    for _ in range(3):
        Loader(data, encodings, global_batch=13, seed=0).batch(0)
    of_file = [  # code and mean; tokens and pooled; tokens and pooled, of each shard
        sum(1 for it in mapped(Path(e.arrays_url(s.name)))[0].values() if it.dtype.kind == "f")
        for e in encodings
        for s in data.shards
    ]
    assert len(looked) == sum(of_file) == 6 * 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("size", [1, 7, load._IN_CACHE, load._IN_CACHE + 3])
def test_finite_is_what_numpy_says(dtype, size):
    draws = np.random.default_rng(0)
    limits = np.finfo(dtype)
    edges = [limits.max, limits.min, limits.tiny, -limits.tiny, 0.0, -0.0]
    numbers = draws.choice(np.array(edges, dtype), size)
    assert load._all_finite(numbers)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        changed = numbers.copy()
        changed[draws.integers(size)] = bad
        assert not load._all_finite(changed)
    assert load._all_finite(np.empty(0, dtype))


def named(batch):
    """Without the encoder's name."""
    return {name.removeprefix("chars_").removeprefix("once_"): it for name, it in batch.items()}


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_those_of_tokens_as_they_are(data, workers):
    whole, once = encode(data, [CHARACTERS, ONCE], build, LOCAL).values()
    for step in range(3):
        for worker in range(workers):
            share = {"global_batch": 8, "seed": 1, "worker": worker, "workers": workers}
            equal(*(named(Loader(data, [it], **share).batch(step)) for it in (whole, once)))
    file = Path(once.arrays_url(data.shards[0].name))
    stored = mapped(file)[0]
    assert "tokens" not in stored
    captions = {f"number {n}" + " again" * k for n in range(7) for k in range(1 + n % 3)}
    assert len(stored["words"]) == len(set("".join(captions)))
    assert stored["states"].shape == (sum(map(len, captions)), 1)
    counted = [text_storage(data, it, 77) for it in (whole, once)]
    assert counted[0].tokens == counted[1].tokens
    assert counted[0].padded_bytes == counted[1].padded_bytes


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("states"),
        lambda a: a.update(words=a["words"].astype("f4")),
        lambda a: a.update(words=a["words"][:1].copy()),
        lambda a: a.update(word_rows=a["word_rows"] - 1),
        lambda a: a.update(word_rows=a["word_rows"][1:].copy()),
        lambda a: a.update(states=np.repeat(a["states"], 2, 1)),
    ],
    ids=["no states", "another dtype", "too few words", "before them", "too few rows", "too wide"],
)
def test_files_that_do_not_make_tokens_are_refused(data, change):
    once = encode(data, [ONCE], build, LOCAL)["once"]
    for shard in data.shards:
        rewrite(Path(once.url, f"{shard.name}.safetensors"), change)
    with pytest.raises(ValueError, match=r"do not make tokens float16\[rows, 2\]"):
        Loader(data, [once], global_batch=8, seed=0).batch(0)


def test_a_directory_may_hold_shards_of_both_kinds(data):
    """What was encoded before words were stored once stays, and is read beside the new."""
    whole, once = encode(data, [CHARACTERS, ONCE], build, LOCAL).values()
    wanted = Loader(data, [whole], global_batch=13, seed=0).batch(0)
    shard = data.shards[0].name

    def as_before(arrays):
        tokens_of = tokens.empty(arrays, tokens.count(arrays))
        tokens.copy(arrays, 0, len(tokens_of), tokens_of)
        for name in ("words", "word_rows", "states"):
            del arrays[name]
        arrays["tokens"] = tokens_of

    rewrite(Path(once.url, f"{shard}.safetensors"), as_before)
    equal(named(Loader(data, [once], global_batch=13, seed=0).batch(0)), named(wanted))


def test_another_table_is_noticed(data, encodings, tmp_path):
    """Captions that were encoded are not those of the table any more."""
    other = write(tmp_path / "other", (13,), ("train",))
    for shard in data.shards:
        source = Path(other.dataset, "tables", f"{other.shards[0].name}.parquet")
        shutil.copy(source, Path(data.dataset, "tables", f"{shard.name}.parquet"))
    with pytest.raises(ValueError, match="do not hold the same samples"):
        Loader(data, encodings, global_batch=13, seed=0).batch(0)


def test_a_shard_that_was_never_encoded_is_named(data, encodings):
    storage.delete(f"{encodings[2].url}/{data.shards[1].name}.safetensors")
    message = f"encoding words lacks 1 of 3 shards .the first: {data.shards[1].name}"
    with pytest.raises(ValueError, match=message):
        Loader(data, encodings, global_batch=2, seed=0)


def test_two_encodings_cannot_give_one_field(data, encodings):
    with pytest.raises(ValueError, match="another one has code too"):
        Loader(data, [encodings[0], encodings[0]], global_batch=2, seed=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda b: b"",
        lambda b: b[:5],
        lambda b: b[:60],
        lambda b: (90_000).to_bytes(8, "little") + b"[" * 90_000,
        lambda b: b[:-1],
        lambda b: (1 << 62).to_bytes(8, "little") + b[8:],
        lambda b: b[:8] + b"[" + b[9:],
        lambda b: b.replace(b'"data_offsets":[0,', b'"data_offsets":[9,'),
        lambda b: b.replace(b'"F16"', b'"BF6"'),
        lambda b: b.replace(b'"shape":[3,4', b'"shape":[-,4'),
        lambda b: b.replace(b'"shape":[3,4', b'"shape":[9,4'),
    ],
)
def test_a_lying_header_is_refused(tmp_path, spoil):
    """Bad input 40: never a crash, never memory outside the file."""
    path = tmp_path / "x.safetensors"
    save_file({"x": np.arange(12, dtype=np.float16).reshape(3, 4)}, path)
    whole = path.read_bytes()
    path.write_bytes(spoil(whole))
    assert path.read_bytes() != whole
    with pytest.raises(ValueError, match="x.safetensors: not a whole safetensors file"):
        mapped(path)


def test_maps_are_what_safetensors_reads(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float16).reshape(2, 3),
        "b": np.arange(3, dtype=np.uint8),
        "c": np.zeros((0, 4), np.int64),
        "d": np.array([[1.5]], np.float32),
    }
    save_file(arrays, tmp_path / "x", {"darkroom": "é"})
    got, metadata = mapped(tmp_path / "x")
    assert metadata == {"darkroom": "é"}
    assert got.keys() == arrays.keys()
    for name, value in arrays.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].dtype == value.dtype
        assert not got[name].flags.writeable


def test_loading_imports_neither_torch_nor_pyarrow(data, encodings):
    code = f"""
import sys
for name in ("torch", "pyarrow", "PIL", "ray", "webdataset", "pydantic"):
    sys.modules[name] = None
from pipeline import manifest
from pipeline.load import Loader
from pipeline.schema import Encoding
data = manifest.latest({data.dataset!r})
encoding = Encoding.at(data.dataset, "words", "text", "words01")
loader = Loader(data, [encoding], global_batch=4, seed=0, captions=False)
batch = loader.batch(0)
assert "caption" not in batch and len(batch["key"]) == 4
print(*batch["words_pooled"][:, 0].astype(int))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    batch = Loader(data, encodings, global_batch=4, seed=0).batch(0)
    assert done.stdout.split() == [str(len(c.split())) for c in batch["caption"]]
