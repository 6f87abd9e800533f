"""A shard's bytes depend on its samples alone, and any WebDataset reader opens it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import shards
from pipeline.shards import ShardSample, caption_hash, read_shard, read_table, write_shard


def sample(index, size=100, **meta):
    return ShardSample(
        key=f"{index:032x}",
        image=bytes([index % 256]) * size,
        ext=("jpg", "png", "webp")[index % 3],
        captions=(f"caption {index}", f"légende {index}")[: 1 + index % 2],
        meta={"width": 8, "height": 4, "source": f"/s#{index}", **meta},
    )


SAMPLES = [
    sample(0, 0),
    sample(1, 512, label={"style": "noto"}, scores={"aspect": 2.0, "look": "0f"}),
    sample(2, 513, scores={"aspect": 1.5}),
]


def content(tar, member):
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def url(dataset, shard):
    return f"{dataset}/shards/{shard.name}.tar"


def test_samples_come_back(tmp_path):
    shard = write_shard(SAMPLES, str(tmp_path), "train")
    assert list(read_shard(url(tmp_path, shard))) == SAMPLES
    data = (tmp_path / "shards" / f"{shard.name}.tar").read_bytes()
    assert shard.sha256 == hashlib.sha256(data).hexdigest()
    assert shard.name == f"train-{shard.sha256[:16]}"
    assert (shard.split, shard.samples, shard.bytes) == ("train", 3, len(data))


def test_the_same_samples_give_the_same_bytes(tmp_path):
    one = write_shard(SAMPLES, str(tmp_path / "a"), "train")
    other = write_shard(iter(SAMPLES), str(tmp_path / "b"), "train")
    assert one == other
    for folder in ("shards", "tables"):
        (a,), (b,) = (list((tmp_path / d / folder).iterdir()) for d in "ab")
        assert a.name == b.name
        assert a.read_bytes() == b.read_bytes()
    assert write_shard(SAMPLES[::-1], str(tmp_path / "b"), "train") != one
    assert sorted(os.listdir(tmp_path / "a")) == ["shards", "tables"]


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.builds(
            ShardSample,
            key=st.text("0123456789abcdef", min_size=1, max_size=32),
            image=st.binary(max_size=2000),
            ext=st.sampled_from(shards.IMAGE_EXTENSIONS),
            captions=st.lists(
                st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=3
            ).map(tuple),
            meta=st.just({"width": 1, "height": 2, "source": "s"}),
        ),
        min_size=1,
        max_size=5,
        unique_by=lambda it: it.key,
    )
)
def test_any_samples_come_back_here_and_in_tarfile(tmp_path, samples):
    shard = write_shard(samples, str(tmp_path), "train")
    assert list(read_shard(url(tmp_path, shard))) == samples
    with tarfile.open(url(tmp_path, shard)) as tar:
        members = {member.name: content(tar, member) for member in tar}
    assert list(members) == [f"{it.key}.{ext}" for it in samples for ext in (it.ext, "json", "txt")]
    for it in samples:
        assert members[f"{it.key}.{it.ext}"] == it.image
        assert members[f"{it.key}.txt"].decode() == it.captions[0]


def test_a_remote_shard_is_not_kept_where_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path))
    shard = write_shard(SAMPLES, "memory://read-once", "train")
    samples = read_shard(f"memory://read-once/shards/{shard.name}.tar")
    assert next(samples) == SAMPLES[0]
    assert os.listdir(tmp_path / "cache") == []
    assert list(samples) == SAMPLES[1:]
    assert os.listdir(tmp_path / "cache") == []
    assert len(list(read_table("memory://read-once", shard.name)["key"])) == len(SAMPLES)
    assert len(os.listdir(tmp_path / "cache")) == 1  # a table is read again and again


# webdataset leaves closing its files to the garbage collector
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_it(tmp_path):
    shard = write_shard(SAMPLES, str(tmp_path), "heldout")
    rows = list(shards.open_webdataset(url(tmp_path, shard)))
    assert [row["__key__"] for row in rows] == [it.key for it in SAMPLES]
    assert [row[it.ext] for row, it in zip(rows, SAMPLES, strict=True)] == [
        it.image for it in SAMPLES
    ]
    assert rows[1]["txt"].decode() == "caption 1"
    assert json.loads(rows[1]["json"])["captions"] == [
        {"text": text, "hash": caption_hash(text)} for text in SAMPLES[1].captions
    ]


def test_the_table_goes_row_by_row_with_the_tar(tmp_path):
    shard = write_shard(SAMPLES, str(tmp_path), "train")
    table = read_table(str(tmp_path), shard.name).to_pydict()
    assert table["key"] == [it.key for it in SAMPLES]
    assert table["captions"] == [list(it.captions) for it in SAMPLES]
    assert table["label"] == [None, '{"style": "noto"}', None]
    assert table["aspect"] == [None, 2.0, 1.5]
    assert table["look"] == [None, "0f", None]
    assert (table["width"], table["height"]) == ([8] * 3, [4] * 3)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ([], "at least one sample"),
        ([SAMPLES[0], SAMPLES[0]], "unique"),
        ([ShardSample("a.b", b"", "jpg", ("x",))], "without dots"),
        ([ShardSample("a", b"", "gif", ("x",))], "one of jpg, png, webp"),
        ([ShardSample("a", b"", "jpg", ())], "at least one caption"),
    ],
)
def test_what_no_reader_would_understand_is_refused(tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        write_shard(broken, str(tmp_path), "train")
    assert os.listdir(tmp_path / "shards") == []


def test_a_damaged_shard_is_named(tmp_path):
    shard = write_shard(SAMPLES, str(tmp_path), "train")
    data = (tmp_path / "shards" / f"{shard.name}.tar").read_bytes()
    cut = tmp_path / "cut.tar"
    for length in (100, 600, 1600, len(data) - 2048):
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.tar"):
            list(read_shard(str(cut)))
    cut.write_bytes(b"\xff" * len(data))
    with pytest.raises(ValueError, match=r"cut\.tar, byte 0"):
        list(read_shard(str(cut)))


def test_no_partial_shard_is_visible_after_a_kill(tmp_path):
    code = (
        "import os, signal, sys; from pipeline.shards import ShardSample, write_shard\n"
        "def samples():\n"
        "    yield ShardSample('a', b'x' * 10_000_000, 'jpg', ('x',), {})\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_shard(samples(), sys.argv[1], 'train')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)])
    assert killed.returncode == -signal.SIGKILL
    assert [name for name in os.listdir(tmp_path / "shards") if not name.startswith(".")] == []
