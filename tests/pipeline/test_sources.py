"""Each kind of source lists all of its rows, names what is wrong with it, and hands out no path."""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from pipeline import passes, shapes, sources, storage
from pipeline.ingest import IngestRules, ingest
from pipeline.shards import ShardSample, write_shard
from pipeline.sources import (
    Damaged,
    OverLong,
    SourceOptions,
    fetch,
    open_source,
    release,
    release_changed,
)


def picture(seed=0, format="PNG"):
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(
        out, format
    )
    return out.getvalue()


def rows(url, **options):
    return list(open_source(str(url), options=SourceOptions(**options)).rows())


def folder_of(path, lines, pictures=("a.png", "deep/b.png"), name="captions.jsonl"):
    path.mkdir(exist_ok=True)
    for index, file in enumerate(pictures):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / file).write_bytes(picture(index))
    text = "".join(
        line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) + "\n"
        for line in lines
    )
    (path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_folder_with_captions(tmp_path):
    folder_of(
        tmp_path,
        [
            {"file": "a.png", "caption": "a cat", "style": "noto", "code": "1f", "n": 5},
            "\n",
            {"file_name": "deep/b.png", "captions": ["one", "two", "one"]},
            {"file": "a.png", "text": " again "},
        ],
    )
    a, b, again = rows(tmp_path)
    assert a.captions == ("a cat, noto style",)
    assert (a.pair, a.name, a.label) == ("a cat|noto", "a cat", {"style": "noto", "code": "1f"})
    assert a.id == f"{tmp_path}#a.png"
    assert fetch(a) == picture(0)
    assert (b.captions, b.pair, b.name, b.label) == (("one", "two"), "one", None, None)
    assert fetch(b) == picture(1)
    assert (again.captions, again.id) == (("again",), f"{tmp_path}#a.png#1")
    assert all(row.problem is None for row in (a, b, again))
    (plain, *_) = rows(tmp_path, style_field="", caption_template="{style}: {caption}")
    assert (plain.captions, plain.pair, plain.name) == (("a cat",), "a cat", None)
    (worded, *_) = rows(tmp_path, caption_template="{style}: {caption}")
    assert worded.captions == ("noto: a cat",)


def test_rows_that_cannot_be_used_are_listed_with_their_problem(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture())
    os.mkfifo(tmp_path / "pipe.png")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "pipe.png")
    folder_of(
        root,
        [
            {"file": "missing.png", "caption": "x"},
            {"file": "../outside.png", "caption": "x"},
            {"file": "deep/../../outside.png", "caption": "x"},
            {"file": str(outside), "caption": "x"},
            {"file": f"file://{outside}", "caption": "x"},
            {"file": "s3://elsewhere/a.png", "caption": "x"},
            {"file": "pipe:cat /etc/passwd", "caption": "x"},
            {"file": "a\0.png", "caption": "x"},
            {"file": "link.png", "caption": "x"},
            {"file": "a.png"},
            {"file": "a.png", "caption": None},
            {"file": "a.png", "caption": []},
            {"file": "a.png", "caption": " \x00 "},
            {"file": f"{root}/a.png", "caption": "x"},
            {"file": "./deep/../a.png", "caption": "x"},
        ],
    )
    listed = rows(root)
    assert [row.problem for row in listed] == [
        "missing_file",
        "unsafe_path",
        "unsafe_path",
        "unsafe_path",
        "reference",
        "reference",
        "reference",
        "unsafe_path",
        "missing_file",
        "incomplete",
        "incomplete",
        "incomplete",
        "no_caption",
        None,
        None,
    ]
    assert len({row.id for row in listed}) == len(listed)
    assert fetch(listed[-1]) == fetch(listed[-2]) == picture(0)


def test_captions_are_cleaned_and_flagged(tmp_path):
    folder_of(
        tmp_path,
        [
            {"file": "a.png", "caption": "x" * 10_000_000},
            '{"file": "a.png", "caption": "caf\udce9"}\n',
            {"file": "a.png", "caption": "a\u0000b \u001b[31m"},
        ],
    )
    long, broken, control = rows(tmp_path, max_caption_characters=50)
    assert (long.captions, long.flags) == (("x" * 50,), ("caption_cut",))
    assert (broken.captions, broken.flags) == (("caf\ufffd",), ("caption_replaced",))
    assert control.captions == ("a b [31m",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops\n", r"captions\.jsonl, line 2: not JSON"),
        ("[1]\n", r"line 2: got list, wanted a JSON object"),
        ('{"picture": "a.png", "caption": "x"}\n', r"line 2: found columns picture, caption"),
        ('{"file": 3, "caption": "x"}\n', r"line 2, column 'file': got 3"),
        ('{"file": "a.png", "caption": NaN}\n', r"line 2, column 'caption': got nan"),
        ('{"file": "a.png", "caption": ["x", 1]}\n', r"line 2, column 'caption': got 1"),
        ("[" * 100_000 + "\n", r"line 2: not JSON"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    folder_of(tmp_path, [{"file": "a.png", "caption": "x"}, line])
    with pytest.raises(ValueError, match=message):
        rows(tmp_path)


def test_imagefolder(tmp_path):
    for index, name in enumerate(("metadata.jsonl", "metadata.csv")):
        folder = tmp_path / name
        folder.mkdir()
        if index:
            folder_of(folder, ['file_name,text,kind\na.png,"a, b",x\n'], name=name)
        else:
            folder_of(folder, [{"file_name": "a.png", "text": "a, b", "kind": "x"}], name=name)
        (row,) = rows(folder)
        assert (row.captions, row.label, row.problem) == (("a, b",), {"kind": "x"}, None)
        assert fetch(row) == picture(0)


def test_sidecars(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "a.txt").write_text("one\nline")
    (tmp_path / "sub" / "v1.5.JPG").write_bytes(picture(2, "JPEG"))
    (tmp_path / "sub" / "v1.5.TXT").write_text("dots")
    (tmp_path / "lonely.png").write_bytes(picture(3))
    (tmp_path / "words.txt").write_text("no picture")
    (tmp_path / "notes.md").write_text("ignored")
    (tmp_path / ".hidden.png").write_bytes(picture(4))
    listed = {row.id.split("#")[1]: row for row in rows(tmp_path)}
    assert {name: (row.captions, row.problem) for name, row in listed.items()} == {
        "a.png": (("one line",), None),
        "sub/v1.5.JPG": (("dots",), None),
        "lonely.png": ((), "incomplete"),
        "words.txt": (("no picture",), "incomplete"),
    }
    assert fetch(listed["sub/v1.5.JPG"]) == picture(2, "JPEG")


def test_sidecars_whose_names_differ_in_case_alone_are_all_rows(tmp_path):
    for number, name in enumerate(("a.JPG", "a.jpg", "b.png")):
        (tmp_path / name).write_bytes(picture(number))
    for name in ("a.txt", "b.TXT", "b.txt"):
        (tmp_path / name).write_text(name)
    listed = {row.id.split("#")[1]: row for row in rows(tmp_path)}
    assert {name: (row.captions, row.problem) for name, row in listed.items()} == {
        "a.JPG": (("a.txt",), None),
        "a.jpg": (("a.txt",), None),
        "b.png": (("b.TXT", "b.txt"), None),
    }


def test_folders_that_are_links_belong_to_a_source_and_links_without_end_do_not_end_it(tmp_path):
    far, root = tmp_path / "far", tmp_path / "root"
    for folder in (far / "deep", root):
        folder.mkdir(parents=True)
    (far / "deep" / "a.png").write_bytes(picture(1))
    (far / "deep" / "a.txt").write_text("linked")
    (far / "back").symlink_to(root)
    (root / "there").symlink_to(far)
    (root / "itself").symlink_to("itself")
    (root / "nothing.png").symlink_to("gone.png")
    (row,) = rows(root)
    assert (row.id, row.captions) == (f"{root}#there/deep/a.png", ("linked",))
    assert fetch(row) == picture(1)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "b.png").write_bytes(picture(2))
    told = [{"file": "there/deep/a.png", "caption": "x"}, {"file": ".hidden/b.png", "caption": "y"}]
    (root / "captions.jsonl").write_text("\n".join(map(json.dumps, told)))
    named = list(rows(root))
    assert [row.problem for row in named] == [None, None]
    assert fetch(named[1]) == picture(2)
    assert storage.list_stamps(str(root)).keys() == {"captions.jsonl"}, "what gc would delete"


def test_file_names_that_are_no_text(tmp_path):
    name = b"caf\xe9"
    (tmp_path / os.fsdecode(name + b".png")).write_bytes(picture())
    (tmp_path / os.fsdecode(name + b".txt")).write_text("x")
    (row,) = rows(tmp_path)
    assert row.id == f"{tmp_path}#caf\\udce9.png"
    assert fetch(row) == picture()
    json.loads(json.dumps(asdict(row)))


def parquet(path, columns):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)


def test_tables(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(picture())
    fields = {"path": "pictures/a.png", "caption": "a\n b", "style": "noto"}
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerow(fields)
    (tmp_path / "t.tsv").write_text('path\tcaption\tstyle\npictures/a.png\t"a\n b"\tnoto\n')
    (tmp_path / "t.jsonl").write_text(json.dumps(fields))
    parquet(tmp_path / "t.parquet", {name: [value] for name, value in fields.items()})
    seen = []
    for extension in ("csv", "tsv", "jsonl", "parquet"):
        (row,) = rows(tmp_path / f"t.{extension}")
        assert (row.captions, row.problem) == (("a b, noto style",), None), extension
        assert fetch(row) == picture()
        seen.append((row.image, row.pair, row.name, row.stamp, row.label))
    assert len(set(map(str, seen))) == 1


def test_tables_may_start_from_another_folder(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "a.png").write_bytes(picture())
    table = tmp_path / "tables" / "t.csv"
    table.write_text(f"where,said\na.png,x\n{tmp_path}/a.png,y\n../a.png,z\n")
    options = {"file_field": "where", "caption_field": "said"}
    assert [r.problem for r in rows(table, **options)] == [
        "missing_file",
        "unsafe_path",
        "unsafe_path",
    ]
    listed = rows(table, root=str(tmp_path), **options)
    assert [row.problem for row in listed] == [None, None, "unsafe_path"]
    assert fetch(listed[1]) == picture()


def test_an_expected_hash_comes_along(tmp_path):
    digest = hashlib.sha256(picture()).hexdigest()
    folder_of(tmp_path, [{"file": "a.png", "caption": "x", "sha256": digest.upper()}])
    (row,) = rows(tmp_path)
    assert row.sha256 == digest
    assert row.label is None


def test_an_expected_md5_comes_along(tmp_path):
    digest = hashlib.md5(picture()).hexdigest()
    folder_of(tmp_path, [{"file": "a.png", "caption": "x", "md5": digest.upper()}])
    (row,) = rows(tmp_path)
    assert (row.md5, row.sha256, row.label) == (digest, None, None)
    folder_of(tmp_path, [{"file": "a.png", "caption": "x", "md5": "0" * 32}])
    (other,) = rows(tmp_path)
    assert other.stamp != row.stamp


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sha1", "drop or rename"),
        ("SHA-512", "drop or rename"),
        ("image_hash", "drop or rename"),
        ("checksum", "drop or rename"),
        ("SHA256", "rename it to sha256"),
        ("md5sum", "rename it to md5"),
        ("sha256_sum", "rename it to sha256"),
    ],
)
def test_a_hash_that_is_not_checked_is_no_label(tmp_path, name, hint):
    folder_of(tmp_path, [{"file": "a.png", "caption": "x", name: "0" * 40}])
    with pytest.raises(ValueError, match=f"line 1: column '{name}' is named like a hash.*{hint}"):
        rows(tmp_path)


@pytest.mark.parametrize("name", ["hashtag", "shape", "mode", "medium", "shade2", "digested"])
def test_a_label_may_begin_like_a_hash(tmp_path, name):
    folder_of(tmp_path, [{"file": "a.png", "caption": "x", name: "blue"}])
    assert rows(tmp_path)[0].label == {name: "blue"}


def test_a_hash_that_is_no_text_is_refused(tmp_path):
    import pyarrow as pa

    folder_of(tmp_path, [{"file": "a.png", "caption": "x", "sha256": 7}])
    with pytest.raises(ValueError, match="line 1, column 'sha256': got 7, wanted text, in hex"):
        rows(tmp_path)
    columns = {"file": ["a.png"], "caption": ["x"], "md5": pa.array([bytes(16)], pa.binary())}
    parquet(tmp_path / "t.parquet", columns)
    with pytest.raises(ValueError, match="column 'md5': got binary, wanted text, in hex"):
        rows(tmp_path / "t.parquet")


def test_a_column_that_is_there_twice_is_named(tmp_path):
    """The last one won, and nobody was told."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "t.csv").write_text("file,caption,,caption,\na.png,one,,two,\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 1: column 'caption' is there twice"):
        rows(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("file,caption,,\na.png,one,,\n")
    assert rows(tmp_path / "t.csv")[0].captions == ("one",), "columns without a name are no names"
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, names=["file", "caption", "file"])
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t\.parquet, schema: column 'file' is there twice"):
        rows(tmp_path / "t.parquet")


def test_a_large_table_is_not_held_in_memory(tmp_path):
    """Of the paths met so far only hashes are kept."""
    count, long = 4000, "x" * 5000
    with (tmp_path / "t.csv").open("w") as file:
        file.write("url,caption\n")
        for number in (*range(count), 0, 0):
            file.write(f"http://a.b/{number}{long},words\n")
    tracemalloc.start()
    try:
        ids = [hash(row.id) for row in open_source(str(tmp_path / "t.csv")).rows()]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(ids)) == count + 2
    assert peak < count * len(long) / 4, f"{peak / 1e6:.1f} MB"
    first = f"{tmp_path}/t.csv#http://a.b/0{long}"
    assert [hash(first), hash(f"{first}#1"), hash(f"{first}#2")] == [ids[0], *ids[-2:]]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_folder_of_tables(tmp_path, kind):
    """As Hugging Face lays them out; the order is that of the names."""
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("a data set")
    (tmp_path / "LICENSE.txt").write_text("free")
    for number in range(3):
        (tmp_path / "data" / f"{number}.png").write_bytes(picture(number))

    def write(name, number):
        records = [{"file": f"{number}.png", "caption": f"picture {number} of {name}"}] * 2
        file = tmp_path / "data" / f"{name}.{kind}"
        if kind == "parquet":
            parquet(file, {key: [it[key] for it in records] for key in records[0]})
        elif kind == "jsonl":
            file.write_text("".join(json.dumps(it) + "\n" for it in records))
        else:
            lines = [",".join(it.values()) + "\n" for it in records]
            file.write_text("".join(["file,caption\n", *lines]))

    write("train-1", 1)
    write("test", 0)
    listed = rows(tmp_path)
    assert [(row.id.split("#", 1)[1], row.captions, row.problem) for row in listed] == [
        (f"data/{name}.{kind}/{number}.png{again}", (f"picture {number} of {name}",), None)
        for name, number in (("test", 0), ("train-1", 1))
        for again in ("", "#1")
    ]
    assert [fetch(row) for row in listed[::2]] == [picture(0), picture(1)]
    before = open_source(str(tmp_path)).fingerprint()
    write("train-2", 2)
    assert open_source(str(tmp_path)).fingerprint() != before
    assert rows(tmp_path)[:4] == listed, "what grows leaves the others as they were"
    (tmp_path / "data" / "1.png").write_bytes(b"another")
    assert [a == b for a, b in zip(rows(tmp_path), listed, strict=False)] == [True] * 2 + [
        False
    ] * 2


def test_tables_of_two_kinds_in_a_folder_are_refused(tmp_path):
    for name in ("a.csv", "b.csv", "c.parquet"):
        (tmp_path / name).write_text("file,caption\n")
    with pytest.raises(ValueError, match=r"found 2 \.csv, 1 \.parquet; wanted tables of one kind"):
        open_source(str(tmp_path))
    (tmp_path / "c.parquet").unlink()
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "a.txt").write_text("sidecars come first: img2dataset puts its tables beside them")
    assert [row.id.split("#")[1] for row in rows(tmp_path)] == ["a.png"]


def test_pictures_in_a_folder_of_parquets(tmp_path):
    """What img2dataset writes: the picture it found, beside its URL and the hash it had there."""
    import pyarrow as pa

    for number in range(2):
        parquet(
            tmp_path / f"0000{number}.parquet",
            {
                "url": ["http://a.b/c.png", "http://a.b/gone.png"],
                "caption": [f"one of {number}", f"two of {number}"],
                "status": ["success", "failed_to_download"],
                "sha256": ["0" * 64, None],
                "jpg": pa.array([picture(number), None], pa.binary()),
            },
        )
        (tmp_path / f"0000{number}_stats.json").write_text("{}")
    listed = rows(tmp_path)
    assert [(row.id.split("#", 1)[1], row.captions[0], row.sha256) for row in listed] == [
        ("00000.parquet/row 0", "one of 0", None),
        ("00000.parquet/row 1", "two of 0", None),
        ("00001.parquet/row 0", "one of 1", None),
        ("00001.parquet/row 1", "two of 1", None),
    ]
    assert listed[0].label == {"url": "http://a.b/c.png", "status": "success"}
    assert listed[0].sha256_upstream == "0" * 64
    assert [fetch(row) for row in listed[::2]] == [picture(0), picture(1)]
    with pytest.raises(FileNotFoundError, match="has no bytes"):
        fetch(listed[1])
    (named, *_) = rows(tmp_path, file_field="url")
    assert (named.image, named.sha256) == ("http://a.b/c.png", "0" * 64)
    release()


def test_bytes_come_before_paths_in_a_parquet(tmp_path):
    import pyarrow as pa

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": picture(1), "path": "a.png"}], kind)
    columns = {"file_name": ["train/a.png"], "mask": [picture(2)], "image": image, "text": ["x"]}
    parquet(tmp_path / "t.parquet", columns)
    (row,) = rows(tmp_path / "t.parquet")
    assert (fetch(row), row.label) == (picture(1), {"file_name": "train/a.png"})
    release()
    (row,) = rows(tmp_path / "t.parquet", file_field="mask")
    assert fetch(row) == picture(2)
    release()
    with pytest.raises(ValueError, match="schema: found columns file_name, mask, image, text"):
        rows(tmp_path / "t.parquet", file_field="picture")


def test_imagefolder_in_splits(tmp_path):
    """Hugging Face's train/metadata.csv and test/metadata.jsonl: paths start from each."""
    folder_of(tmp_path / "train", ["file_name,text\na.png,a\ndeep/b.png,b\n"], name="metadata.csv")
    lines = [{"file_name": "a.png", "text": "c"}, {"file_name": "../train/a.png", "text": "d"}]
    folder_of(tmp_path / "test", lines, pictures=("a.png",), name="metadata.jsonl")
    (tmp_path / "train" / "notes.txt").write_text("beside no picture")
    listed = {row.id.split("#")[1]: (row.captions, row.problem) for row in rows(tmp_path)}
    assert listed == {
        "test/metadata.jsonl/a.png": (("c",), None),
        "test/metadata.jsonl/../train/a.png": (("d",), "unsafe_path"),
        "train/metadata.csv/a.png": (("a",), None),
        "train/metadata.csv/deep/b.png": (("b",), None),
    }
    assert fetch(rows(tmp_path)[-1]) == picture(1)
    (tmp_path / "train" / "a.txt").write_text("another caption")
    with pytest.raises(ValueError, match=r"metadata\..*and pictures each with a .txt beside it"):
        open_source(str(tmp_path))


def test_class_folders_are_refused_and_told_what_to_do(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture())
    said = r"pictures without captions \(cat/1\.png, dog/1\.png\), and names of folders.*metadata"
    with pytest.raises(ValueError, match=said):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,x\n", r"t\.csv, line 2: found columns wrong, columns; wanted file or file_name"),
        ("a.png\n", r"line 2: got 1 fields, wanted 2"),
        ("a.png,x,y\n", r"line 2: got 3 fields, wanted 2"),
        ('a.png,"x\n', r"after line [12]: unexpected end of data"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, message):
    header = "wrong,columns\n" if "found" in message else "file,caption\n"
    (tmp_path / "t.csv").write_text(header + text)
    with pytest.raises(ValueError, match=message):
        rows(tmp_path / "t.csv")


def test_parquet_errors_name_row_and_column(tmp_path):
    parquet(tmp_path / "t.parquet", {"file": ["a", "b"], "caption": ["x", None]})
    with pytest.raises(ValueError, match=r"t\.parquet, row 1, column 'caption': got None"):
        rows(tmp_path / "t.parquet")
    parquet(tmp_path / "t.parquet", {"file": ["a", "b"], "caption": [float("nan"), 1.0]})
    with pytest.raises(ValueError, match=r"row 0, column 'caption': got nan"):
        rows(tmp_path / "t.parquet")
    parquet(tmp_path / "t.parquet", {"picture": ["a"], "caption": ["x"]})
    with pytest.raises(ValueError, match=r"schema: found columns picture, caption"):
        rows(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match="not a parquet file"):
        rows(tmp_path / "t.parquet")


# ---- tars ------------------------------------------------------------------------------------


def tar_of(path, members, **options):
    """A tar of (name, bytes) or ready TarInfo members."""
    with tarfile.open(path, "w", **options) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return path


def special(name, kind, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def problems(path):
    return {row.id.split("#", 1)[1]: row.problem for row in rows(path)}


def test_webdataset_and_img2dataset_tars(tmp_path):
    about = {"caption": "from json", "url": "http://x", "width": 8, "sha256": "0" * 64, "md5": "1"}
    tar_of(
        tmp_path / "00000.tar",
        [
            ("000000000.json", json.dumps(about).encode()),
            ("000000000.png", picture(0)),
            ("000000000.txt", b"from text"),
            ("000000001.jpg", picture(1, "JPEG")),
            ("000000001.json", b'{"captions": ["one", "two"]}'),
        ],
    )
    tar_of(tmp_path / "00001.tar", [("a/b.png", picture(2)), ("a/b.txt", b"deep")])
    one, two, three = rows(tmp_path)
    assert one.captions == ("from text", "from json")
    assert (one.label, one.sha256) == ({"url": "http://x"}, None)
    assert one.sha256_upstream == "0" * 64, "of the file before img2dataset resized it"
    assert two.captions == ("one", "two")
    assert three.id == f"{tmp_path}#00001.tar/a/b"
    assert [fetch(row) for row in (one, two, three)] == [
        picture(0),
        picture(1, "JPEG"),
        picture(2),
    ]
    with pytest.raises(OverLong):
        fetch(one, max_bytes=10)
    assert len(rows(tmp_path / "00000.tar")) == 2


def test_hostile_members_are_rejected_one_by_one(tmp_path):
    path = tar_of(
        tmp_path / "x.tar",
        [
            ("../../evil.jpg", b"x"),
            ("../../evil.txt", b"x"),
            ("/etc/abs.jpg", b"x"),
            ("back\\slash.jpg", b"x"),
            special("0001.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("0001.txt", b"x"),
            special("0002.jpg", tarfile.LNKTYPE, "0001.txt"),
            ("0002.txt", b"x"),
            special("0003.jpg", tarfile.CHRTYPE),
            special("0004.jpg", tarfile.FIFOTYPE),
            special("folder", tarfile.DIRTYPE),
            ("0005.png", picture()),
            ("0006.txt", b"lonely words"),
            ("0007.pkl", b"cposix\nsystem\n(S'touch /tmp/owned'\ntR."),
            ("0008.pkl", b"x"),
            ("0008.png", picture()),
            ("0008.txt", b"good beside a pickle"),
            ("._0009.png", b"resource fork"),
        ],
    )
    assert problems(path) == {
        "../../evil": "unsafe_path",
        "/etc/abs": "unsafe_path",
        "back\\slash": "unsafe_path",
        "0001": "not_a_file",
        "0002": "not_a_file",
        "0003": "not_a_file",
        "0004": "not_a_file",
        "0005": "incomplete",
        "0006": "incomplete",
        "0007": "incomplete",
        "0008": None,
    }
    (good,) = [row for row in rows(path) if row.problem is None]
    assert good.flags == ("member_refused",)
    assert fetch(good) == picture()


def test_tars_out_of_order_are_errors(tmp_path):
    apart = [("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3")]
    with pytest.raises(ValueError, match=r"a\.txt: the members of sample a do not stand together"):
        rows(tar_of(tmp_path / "x.tar", apart))
    twice = [("a.png", b"1"), ("a.txt", b"2"), ("a.png", b"3")]
    with pytest.raises(ValueError, match=r"member a\.png: it is there twice"):
        rows(tar_of(tmp_path / "x.tar", twice))


def test_dots_in_keys(tmp_path):
    path = tar_of(
        tmp_path / "x.tar",
        [
            ("v1.5.cat.png", picture(0)),
            ("v1.5.cat.txt", b"cat"),
            ("v1.6.dog.png", picture(1)),
            ("v1.6.dog.txt", b"dog"),
            ("z.png", picture(2)),
            ("z.seg.png", picture(3)),
            ("z.txt", b"with a mask"),
        ],
    )
    cat, dog, z = rows(path)
    assert (cat.captions, dog.captions) == (("cat",), ("dog",))
    assert fetch(dog) == picture(1)
    assert fetch(z) == picture(2)
    assert z.flags == ("member_refused",)


def test_cut_tars_keep_their_whole_samples(tmp_path):
    members = [
        (f"{i}.{ext}", data)
        for i in range(3)
        for ext, data in (("png", picture(i)), ("txt", b"words"))
    ]
    data = tar_of(tmp_path / "whole.tar", members).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in range(512, len(data), 256):
        cut.write_bytes(data[:length])
        listed = rows(cut)
        whole = [row for row in listed if row.problem is None]
        assert [fetch(row) for row in whole] == [picture(i) for i in range(len(whole))]
        assert len(listed) - len(whole) <= 1
        assert {row.problem for row in listed} <= {None, "truncated", "incomplete"}
        # header, picture (one block of 512 bytes), header, five letters: 2048 bytes a sample
        assert len(whole) == sum(2048 * i + 1536 + 5 <= length for i in range(3))
    damaged = bytearray(data)
    damaged[2048:2560] = b"\xff" * 512  # the header of the second sample
    cut.write_bytes(damaged)
    assert problems(cut) == {"0": None, "@end": "truncated"}
    cut.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        rows(cut)
    with tarfile.open(cut, "w:gz") as tar:
        tar.add(tmp_path / "whole.tar", "x.png")
    with pytest.raises(ValueError, match="not an uncompressed tar"):
        rows(cut)


def test_negative_sizes_do_not_loop(tmp_path):
    data = bytearray(tar_of(tmp_path / "x.tar", [("a.png", b"1"), ("b.png", b"2")]).read_bytes())
    header = data[1024:1536]
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256: minus 1024
    header[148:156] = b" " * 8
    header[148:155] = b"%06o\0" % sum(header)
    data[1024:1536] = header
    (tmp_path / "x.tar").write_bytes(data)
    code = "import sys; from pipeline.sources import open_source\n" + (
        "print([row.problem for row in open_source(sys.argv[1]).rows()])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.tar")], capture_output=True, timeout=60
    )
    assert out.stdout.decode().strip() == "['truncated']"


def test_fuzzed_tars_end(tmp_path):
    members = [(f"{i}.{e}", d) for i in range(4) for e, d in (("png", b"x" * 700), ("txt", b"y"))]
    data = tar_of(tmp_path / "x.tar", members, format=tarfile.PAX_FORMAT).read_bytes()[:9000]
    rng = np.random.default_rng(3)
    outcomes = {"listed": 0, "refused": 0}
    for _ in range(300):
        bad = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            bad[at] = rng.integers(0, 256)
        (tmp_path / "x.tar").write_bytes(bad[: rng.integers(1, len(bad))])
        try:
            listed = rows(tmp_path / "x.tar")
            assert len(listed) <= 9
            outcomes["listed"] += 1
        except ValueError:
            outcomes["refused"] += 1
    assert outcomes["listed"] > 100


def test_our_own_shards_are_a_source(tmp_path):
    label = {"style": "noto"}
    sample = ShardSample("k", picture(), "png", ("a, noto style", "b"), {"label": label})
    write_shard([sample], str(tmp_path), "train")
    (row,) = rows(tmp_path / "shards")
    assert (row.captions, row.label, row.problem) == (("a, noto style", "b"), label, None)
    assert fetch(row) == picture()


# ---- drawn scenes, and what all sources share ------------------------------------------------


def test_drawn_scenes():
    source = open_source("shapes://?scenes=3&seed=5&side=16&objects=2")
    listed = list(source.rows())
    assert len(listed) == 3
    scene = shapes.scene(5, 2, 2)
    assert listed[2].captions == (shapes.caption(scene, 5, 2),)
    assert listed[2].pair == shapes.combination(scene.truth())
    assert listed[2].label == scene.truth()
    pixels = np.asarray(Image.open(io.BytesIO(fetch(listed[2]))))
    assert (pixels == shapes.draw(scene, 16)).all()
    more = list(open_source("shapes://?scenes=5&seed=5&side=16&objects=2").rows())
    assert more[:3] == listed
    assert len(list(open_source("shapes://?scenes=7").rows())) == 7


@pytest.mark.parametrize(
    "query", ["scene=3", "scenes=x", "objects=3", "side=4", "scenes=0", "seed=-1"]
)
def test_drawn_scenes_refuse_what_they_do_not_know(query):
    with pytest.raises(ValueError, match="wanted"):
        open_source(f"shapes://?{query}").fingerprint()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("pipe:curl http://x", "commands"),
        ("simplecache::s3://x", "chained"),
        ("nowhere", "no such file or folder"),
        ("empty", "found nothing; wanted captions.jsonl"),
        ("odd", "found readme.md; wanted"),
        ("odd/readme.md", "wanted a folder, a .tar or a table"),
        ("packed/a.tar.gz", "a.tar.gz: compressed; decompress it first"),
        ("packed/b.tgz", "b.tgz: compressed; decompress it first"),
        ("packed/c.csv.gz", "c.csv.gz: compressed; decompress it first"),
        ("packed", r"packed: a.tar.gz and 3 more: compressed; decompress it first"),
        ("mixed", r"mixed: deep/b.tgz: compressed; decompress it first"),
        ("tables", r"tables: b.csv.gz: compressed; decompress it first"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, url, message):
    monkeypatch.chdir(tmp_path)
    for name in ("a.tar.gz", "b.tgz", "c.csv.gz", "d.zip"):
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / "packed" / name).write_bytes(gzip.compress(b"x"))
    (tmp_path / "mixed" / "deep").mkdir(parents=True)
    tar_of(tmp_path / "mixed" / "a.tar", [("a.png", picture()), ("a.txt", b"a")])
    (tmp_path / "mixed" / "deep" / "b.tgz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "a.csv").write_text("file,caption\na.png,x\n")
    (tmp_path / "tables" / "b.csv.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "readme.md").write_text("x")
    with pytest.raises(ValueError, match=message):
        open_source(url)


def test_what_is_packed_beside_a_folders_own_table_is_nobodys_matter(tmp_path):
    folder_of(tmp_path, [{"file": "a.png", "caption": "x"}])
    (tmp_path / "backup.tgz").write_bytes(gzip.compress(b"x"))
    assert len(rows(tmp_path)) == 1


def test_the_fingerprint_is_that_of_the_listing(tmp_path):
    folder_of(tmp_path, [{"file": "a.png", "caption": "x"}])
    before, (row,) = open_source(str(tmp_path)).fingerprint(), rows(tmp_path)
    assert open_source(str(tmp_path)).fingerprint() == before
    (tmp_path / "deep" / "b.png").write_bytes(b"another")
    assert open_source(str(tmp_path)).fingerprint() != before
    assert rows(tmp_path) == [row], "another picture's stamp is its own"
    (tmp_path / "a.png").write_bytes(picture(9) + b"!")
    (changed,) = rows(tmp_path)
    assert (changed.id, changed.stamp != row.stamp) == (row.id, True)
    folder_of(tmp_path, [{"file": "a.png", "caption": "y"}], pictures=())
    (worded,) = rows(tmp_path)
    assert (worded.id, worded.stamp != changed.stamp) == (row.id, True)


def test_a_remote_folder_is_a_source():
    for name, data in (
        ("a.png", picture()),
        ("captions.jsonl", b'{"file": "a.png", "caption": "x"}'),
    ):
        storage.publish_bytes(f"memory://remote/pictures/{name}", data)
    tars = [("a.png", picture(1)), ("a.txt", b"y")]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in tars:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    storage.publish_bytes("memory://remote/tars/0.tar", out.getvalue())
    for number in range(2):
        table = b'{"file": "%d.png", "caption": "z"}' % number
        storage.publish_bytes(f"memory://remote/tables/train/{number}.jsonl", table)
    storage.publish_bytes("memory://remote/tables/train/1.png", picture(2))
    absent, row = rows("memory://remote/tables")
    assert (absent.problem, absent.id) == (
        "missing_file",
        "memory://remote/tables#train/0.jsonl/0.png",
    )
    assert (row.captions, row.problem, fetch(row)) == (("z",), None, picture(2))
    (row,) = rows("memory://remote/pictures")
    assert (row.captions, row.problem, fetch(row)) == (("x",), None, picture())
    (row,) = rows("memory://remote/tars")
    assert (row.captions, row.problem, fetch(row)) == (("y",), None, picture(1))


def test_options_are_checked():
    with pytest.raises(ValueError, match="caption_template may use"):
        SourceOptions(caption_template="{colour}")
    with pytest.raises(ValueError, match="at least 1"):
        SourceOptions(max_caption_characters=0)


@pytest.mark.parametrize("layout", ["binary", "hugging face"])
def test_pictures_inside_a_parquet(tmp_path, layout):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [picture(i) for i in range(5)] + [None]
    captions = [f"picture {i}" for i in range(6)]
    if layout == "hugging face":
        values = [None if it is None else {"bytes": it, "path": "x.png"} for it in pictures]
        column = pa.array(values, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    else:
        column = pa.array(pictures, pa.binary())
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": column, "text": captions}), file, row_group_size=2)
    listed = rows(file)
    assert [row.captions for row in listed] == [(caption,) for caption in captions]
    assert [fetch(row) for row in listed[:5]] == pictures[:5]
    with pytest.raises(FileNotFoundError, match="row 1 of row group 2 has no bytes"):
        fetch(listed[5])
    with pytest.raises(OverLong):
        fetch(listed[0], 10)
    assert len({row.id for row in listed}) == 6
    assert fetch(listed[1]) == pictures[1], "out of order too"
    # Written anew under the same name: nobody may see the old bytes after `release`.
    release()
    pq.write_table(pa.table({"image": column[3:], "text": captions[3:]}), file, row_group_size=2)
    assert [fetch(row) for row in rows(file)[:2]] == pictures[3:5]
    release()
    file.write_bytes(file.read_bytes()[:40] + bytes(40) + file.read_bytes()[80:])
    with pytest.raises(Damaged):
        [fetch(row) for row in listed[:2]]
    release()


@pytest.fixture
def opened(monkeypatch):
    """The row groups whose pictures are read from their start."""
    import pyarrow.parquet as pq

    iterate, groups = pq.ParquetFile.iter_batches, []

    def noted(self, *sizes, **chosen):
        if chosen["columns"] == ["image"]:
            groups.append(chosen["row_groups"])
        return iterate(self, *sizes, **chosen)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    yield groups
    release()


def test_units_read_a_row_group_on_from_where_the_one_before_ended(tmp_path, opened):
    """Each had begun at its start, and read all of it for that."""
    captions = [f"picture {number}" for number in range(200)]
    images = [picture(number) for number in range(200)]
    parquet(tmp_path / "t.parquet", {"image": images, "text": captions})
    assert len(passes.parts_of(200)) > 4
    rules = IngestRules(heldout_share=0, min_heldout=0, min_side=1)
    result = ingest([str(tmp_path / "t.parquet")], str(tmp_path / "set"), rules)
    assert result.counts["kept"] == 200
    assert opened == [[0]]
    assert not sources._last, "open after the run"


def test_a_parquet_is_read_on_until_it_changes(tmp_path, opened):
    def write(*seeds):
        columns = {"image": [picture(seed) for seed in seeds], "text": ["x"] * len(seeds)}
        parquet(tmp_path / "t.parquet", columns)

    write(*range(40))
    listed = rows(tmp_path / "t.parquet")
    for start in range(0, 40, 10):
        release_changed()
        for number in range(start, start + 10):
            assert fetch(listed[number]) == picture(number)
    assert len(opened) == 1
    write(*range(100, 140))
    os.utime(tmp_path / "t.parquet", (1, 1))
    release_changed()
    assert fetch(listed[39]) == picture(139)
    (tmp_path / "t.parquet").unlink()
    release_changed()
    with pytest.raises(FileNotFoundError):
        fetch(listed[39])


def test_a_parquet_that_was_out_of_reach_is_opened_again(tmp_path, opened, monkeypatch):
    parquet(tmp_path / "t.parquet", {"image": [picture(0), picture(1)], "text": ["x", "y"]})
    listed = rows(tmp_path / "t.parquet")
    assert fetch(listed[0]) == picture(0)

    def away(self, number):
        raise OSError(errno.ESTALE, "stale")

    with monkeypatch.context() as patch:
        patch.setattr(sources._Column, "_at", away)
        with pytest.raises(OSError, match="stale"):
            fetch(listed[1])
    release_changed()
    assert fetch(listed[1]) == picture(1)
    assert len(opened) == 2


FIRST_ROWS = """
import sys
from pathlib import Path
from pipeline.sources import fetch, open_source

def first(place):
    fetch(next(iter(open_source(place).rows())))
    return next(it for it in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in it)

for place in sys.argv[1:]:
    print(first(place).split()[1])
"""


def test_a_row_group_is_not_read_whole_for_its_first_picture(tmp_path):
    """One of 96 MB: Arrow reads all of it at once where it is not told otherwise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    noise = np.random.default_rng(0).bytes(1 << 20)
    for name, count in (("small", 1), ("large", 96)):
        table = pa.table({"image": [noise] * count, "text": ["x"] * count})
        path = tmp_path / f"{name}.parquet"
        options = {"compression": "none", "use_dictionary": False, "write_batch_size": 1}
        pq.write_table(table, path, **options)
        assert pq.ParquetFile(path).num_row_groups == 1
    places = [str(tmp_path / f"{name}.parquet") for name in ("small", "large")]
    told = subprocess.check_output([sys.executable, "-c", FIRST_ROWS, *places], text=True)
    before, after = map(int, told.split())
    assert after - before < 24 << 10, "KiB"


def test_a_tar_that_was_cut_since_it_was_listed_is_damaged(tmp_path):
    path = tar_of(tmp_path / "x.tar", [("a.txt", b"words"), ("a.png", picture())])
    (row,) = rows(path)
    os.truncate(path, 1600)
    with pytest.raises(Damaged, match=rf"got 64 bytes, wanted {len(picture())}"):
        fetch(row)


def test_samples_within_the_name_of_another_are_rows(tmp_path):
    """`v1.5` begins like `v1`: its picture was lost, and a flag was all that told of it."""
    path = tar_of(
        tmp_path / "x.tar",
        [
            ("v1.jpg", picture(0)),
            ("v1.txt", b"one"),
            ("v1.5.jpg", picture(1)),
            ("v1.5.txt", b"one and a half"),
            ("v1.A.JPG", picture(2)),
            ("v1.A.json", b'{"caption": "from json"}'),
            ("v1.a.png", picture(3)),
            ("v1.a.txt", b"another case"),
            ("v1.seg.png", picture(4)),
            ("v1.seg.json", b'{"classes": 3}'),
            ("v1.note.txt", b"no caption of it"),
            special("v1.link.jpg", tarfile.SYMTYPE, "v1.jpg"),
            ("v1.link.txt", b"a link"),
            ("v1..png", picture(5)),
            ("v2.json", b'{"caption": "words alone"}'),
            ("v2.5.jpg", picture(6)),
            ("v2.5.txt", b"two and a half"),
        ],
    )
    listed = {row.id.split("#")[1]: (row.captions, row.problem, row.flags) for row in rows(path)}
    assert listed == {
        "v1": (("one",), None, ("member_refused",)),
        "v1.5": (("one and a half",), None, ()),
        "v1.A": (("from json",), None, ()),
        "v1.a": (("another case",), None, ()),
        "v1.link": (("a link",), "not_a_file", ()),
        "v2": (("words alone",), "incomplete", ()),
        "v2.5": (("two and a half",), None, ()),
    }
    assert [fetch(row) for row in rows(path)[:4]] == [picture(seed) for seed in range(4)]
    again = [("v1.5.png", b"1"), ("v1.5.txt", b"2"), ("v1.png", b"3"), ("v1.5.jpg", b"4")]
    with pytest.raises(ValueError, match=r"sample v1\.5 do not stand together"):
        rows(tar_of(tmp_path / "x.tar", [*again, ("v1.5.json", b'{"text": "x"}')]))
    with pytest.raises(ValueError, match=r"v1\.5\.jpg: the members of sample v1\.5 do not stand"):
        rows(tar_of(tmp_path / "x.tar", [again[2], *again[:2], ("w.png", b""), again[3]]))


def test_cut_tars_keep_the_samples_within_a_name(tmp_path):
    members = [
        (f"v1{part}.{ext}", data)
        for part in ("", ".5")
        for ext, data in (("png", picture()), ("txt", b"words"))
    ]
    data = tar_of(tmp_path / "whole.tar", members).read_bytes()
    cut = tmp_path / "cut.tar"
    for length in range(512, len(data), 256):
        cut.write_bytes(data[:length])
        whole = [row for row in rows(cut) if row.problem is None]
        assert [fetch(row) for row in whole] == [picture()] * len(whole)
        if length >= 2048 + 1536 + 5:
            assert [row.id.split("#")[1] for row in whole] == ["v1", "v1.5"]
        else:
            assert len(rows(cut)) - len(whole) <= 1


def test_a_file_among_tars_that_is_none_is_a_row(tmp_path):
    """What a broken download leaves: nothing, or a page that says so."""
    tar_of(tmp_path / "0.tar", [("a.png", picture(0)), ("a.txt", b"a")])
    (tmp_path / "1.tar").write_bytes(b"")
    (tmp_path / "2.tar").write_bytes(b"<html>404</html>" * 100)
    tar_of(tmp_path / "3.tar", [("a.png", picture(1)), ("a.txt", b"b")])
    assert problems(tmp_path) == {
        "0.tar/a": None,
        "1.tar/@tar": "not_a_tar",
        "2.tar/@tar": "not_a_tar",
        "3.tar/a": None,
    }
    rules = IngestRules(heldout_share=0, min_heldout=0, min_side=1)
    counts = ingest([str(tmp_path)], str(tmp_path / "set"), rules).counts
    assert (counts["kept"], counts["rejected:not_a_tar"]) == (2, 2)
    for name in ("1.tar", "2.tar"):
        with pytest.raises(ValueError, match=rf"{name}: not an uncompressed tar"):
            rows(tmp_path / name)
