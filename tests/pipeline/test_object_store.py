"""An object store over its real protocol: what holds on a disk holds there, also when it is ill.

The store is moto on the loopback; the illness is a proxy before it that lets a seeded share of the
requests go wrong.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import uuid
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import dedup, manifest, storage, versions
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.load import Loader
from pipeline.reproduce import reproduce

pytest.importorskip("s3fs", reason="the extra s3 is not installed")
RULES = IngestRules(shard_samples=12, min_heldout=4)
KEYS = {"key": "any", "secret": "any"}


@pytest.fixture(scope="module")
def store():
    """The address of an S3 server of our own."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


def configured(address, **config):
    """fsspec's configuration for a store there: also what FSSPEC_S3 holds for other processes."""
    return {
        "endpoint_url": f"http://{address[0]}:{address[1]}",
        "config_kwargs": {"connect_timeout": 2, "read_timeout": 1.0, **config},
        **KEYS,
    }


@pytest.fixture
def bucket(store, monkeypatch, tmp_path):
    """The URL of an empty bucket; clients go straight to the store."""
    from fsspec import config

    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FSSPEC_S3", json.dumps(configured(store, read_timeout=15)))
    monkeypatch.setitem(config.conf, "s3", configured(store, read_timeout=15))
    url = f"s3://b{uuid.uuid4().hex}"
    files, path = storage.filesystem(url)
    files.mkdir(path)
    return url


def objects(url):
    """Path below the URL -> bytes of all objects."""
    files, root = storage.filesystem(url)
    return {name.removeprefix(root).lstrip("/"): files.cat_file(name) for name in files.find(root)}


def tree(path):
    """The same of a local folder, without the lock that object stores do not have."""
    return {
        str(it.relative_to(path)): it.read_bytes()
        for it in sorted(Path(path).rglob("*"))
        if it.is_file() and it.name != ".lock"
    }


# ---- a store that goes wrong --------------------------------------------------------------------

SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class Trouble:
    """What goes wrong, how often, and how often it has."""

    upstream: tuple[str, int]
    kinds: tuple[str, ...] = ("slow_down", "stall", "refuse", "cut", "lost")
    share: float = 0.0
    seed: int = 0
    only: str = ""
    """A method to which trouble is confined."""
    first: tuple[str, ...] = ()
    """What happens to the first requests, before chance decides."""
    happened: Counter[str] = field(default_factory=Counter)
    address: tuple[str, int] = ("", 0)

    def __post_init__(self):
        self._lock, self._random = threading.Lock(), random.Random(self.seed)
        self.over = threading.Event()

    def next(self, method: str) -> str:
        with self._lock:
            kind = "none"
            if self.only in ("", method):
                if self.first:
                    kind, *self.first = self.first
                elif self._random.random() < self.share:
                    kind = self._random.choice(self.kinds)
            self.happened[kind] += 1
            return kind


@contextmanager
def proxy(trouble):
    """The trouble's address, from which requests go on to the store, or do not."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def handle_expect_100(self):
            return True  # said, or not, in `answer`

        def answer(self):
            kind = trouble.next(self.command)
            if kind == "stall":
                trouble.over.wait(30)
            elif "Expect" in self.headers:
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if kind in ("stall", "refuse"):
                self.close_connection = True
                return
            if kind == "slow_down":
                status, headers, data = 503, [("Content-Type", "application/xml")], SLOW_DOWN
            else:
                status, headers, data = self.forward(body)
            if kind == "lost":
                self.close_connection = True
                return
            self.send_response_only(status)
            size = str(len(data))
            for name, value in headers:
                if name.lower() == "content-length":
                    size = value  # what a HEAD is told
                elif name.lower() not in ("connection", "transfer-encoding"):
                    self.send_header(name, value)
            self.send_header("Content-Length", size)
            self.end_headers()
            if self.command == "HEAD":
                return
            if kind == "cut" and data:
                data, self.close_connection = data[: len(data) // 2], True
            self.wfile.write(data)

        def forward(self, body):
            upstream = http.client.HTTPConnection(*trouble.upstream, timeout=30)
            try:
                upstream.request(self.command, self.path, body, dict(self.headers))
                response = upstream.getresponse()
                return response.status, response.getheaders(), response.read()
            finally:
                upstream.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass  # the client gave up first, as it should

    server = Server(("127.0.0.1", 0), Handler)
    trouble.address = server.server_address
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield trouble
    finally:
        trouble.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def ill(store, bucket, monkeypatch):
    """A context manager: clients in this process meet trouble, and wait for less than usual."""

    @contextmanager
    def through(tries=8, **options):
        from fsspec import config

        with proxy(Trouble(store, **options)) as trouble, monkeypatch.context() as patch:
            patch.setattr(storage, "_TRIES", tries)
            patch.setattr(storage, "_LONGEST_WAIT", 0.1)
            patch.setattr(storage, "_STALL_SECONDS", 1)
            patch.setitem(config.conf, "s3", configured(trouble.address))
            yield trouble

    return through


# ---- sources and encoders -----------------------------------------------------------------------


def picture(seed, side=24):
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(out, "PNG")
    return out.getvalue()


def captions_file(url, count):
    lines = []
    for number in range(count):
        storage.publish_bytes(f"{url}/folder/{number}.png", picture(number))
        lines.append(json.dumps({"file": f"{number}.png", "caption": f"picture {number}"}))
    storage.publish_bytes(f"{url}/folder/captions.jsonl", "\n".join(lines).encode())
    return f"{url}/folder"


def tars(url, count):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for number in range(count):
            for name, data in (
                (f"{number:04}.png", picture(100 + number)),
                (f"{number:04}.txt", b"from a tar"),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    storage.publish_bytes(f"{url}/tars/0.tar", out.getvalue())
    return f"{url}/tars"


def parquet(url, count):
    """With the pictures in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pictures = [picture(200 + number) for number in range(count)]
    pq.write_table(pa.table({"image": pictures, "text": ["in a table"] * count}), out)
    storage.publish_bytes(f"{url}/table.parquet", out.getvalue())
    return f"{url}/table.parquet"


def sidecars(url, count):
    for number in range(count):
        storage.publish_bytes(f"{url}/sidecars/deep/{number}.png", picture(300 + number))
        storage.publish_bytes(f"{url}/sidecars/deep/{number}.txt", b"words %d" % number)
    return f"{url}/sidecars"


def imagefolder(url, count):
    """Hugging Face's, with a metadata.csv in each split."""
    for split, numbers in (("train", range(count // 2)), ("test", range(count // 2, count))):
        lines = ["file_name,text"]
        for number in numbers:
            storage.publish_bytes(f"{url}/imagefolder/{split}/{number}.png", picture(400 + number))
            lines.append(f"{number}.png,of {split} {number}")
        text = "\n".join(lines).encode()
        storage.publish_bytes(f"{url}/imagefolder/{split}/metadata.csv", text)
    return f"{url}/imagefolder"


def csv_of_paths(url, count):
    """Half of them below the table, half by their whole URL."""
    lines = ["path,caption"]
    for number in range(count):
        storage.publish_bytes(f"{url}/table/pictures/{number}.png", picture(500 + number))
        path = f"pictures/{number}.png" if number % 2 else f"{url}/table/pictures/{number}.png"
        lines.append(f"{path},row {number}")
    storage.publish_bytes(f"{url}/table/rows.csv", "\n".join(lines).encode())
    return f"{url}/table/rows.csv"


def fill(url, count=16, kinds=(captions_file, tars, parquet)):
    """Three sources below a URL."""
    return [kind(url, count) for kind in kinds]


def the_line(sources, dataset):
    """Ingest, encode and load; a few batches."""
    version = ingest(sources, dataset, RULES).manifest
    specs = [pixels_spec(8)]
    encoded = encode(version, specs, None, Executor())
    batches = Loader(version, list(encoded.values()), global_batch=8, seed=3)
    return [batches.batch(step) for step in range(6)]


def same(batches, others):
    for one, other in zip(batches, others, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    return True


@pytest.mark.parametrize(
    "kinds", [(captions_file, tars, parquet), (sidecars, imagefolder, csv_of_paths)]
)
def test_the_whole_road_is_as_on_a_disk(bucket, tmp_path, kinds):
    sources, dataset = fill(f"{bucket}/in", kinds=kinds), f"{bucket}/set"
    there = the_line(sources, dataset)
    here = the_line(sources, str(tmp_path / "set"))
    assert same(there, here)
    assert objects(dataset) == tree(tmp_path / "set")
    assert ingest(sources, dataset, RULES).reused
    version = manifest.latest(dataset)
    assert version is not None
    assert version.counts["kept"] == version.counts["seen"] == 48
    cached = {it.name.split("-", 1)[1] for it in (tmp_path / "home" / "cache").iterdir()}
    assert {f"{shard.name}.safetensors" for shard in version.split("train")} <= cached
    assert not any(name.endswith(".tar") for name in cached)  # each is read but once


def test_growth_and_a_changed_picture(bucket):
    sources, dataset = fill(f"{bucket}/in"), f"{bucket}/set"
    ingest(sources, dataset, RULES)
    storage.publish_bytes(f"{bucket}/in/folder/3.png", picture(999))
    result = ingest(sources, dataset, RULES)
    assert (result.new, result.manifest.version, result.counts["seen"]) == (1, 2, 49)


RACE = """
import sys, time
from pipeline import storage
name, url, start = sys.argv[1], sys.argv[2], float(sys.argv[3])
storage.exists(url)
for number in range(30):
    time.sleep(max(0, start + 0.05 * number - time.time()))
    if storage.create_exclusive(f"{url}/{number:02}.json", name.encode() * 100):
        print(number)
"""


def test_what_is_taken_out_merged_and_collected_is_as_on_a_disk(bucket, tmp_path):
    """Growth, a take-down, compaction, collection and a version made again, step by step."""
    sources = fill(f"{bucket}/in")
    there, here = f"{bucket}/set", str(tmp_path / "set")
    key = dedup.key(picture(105))  # in the tar
    rules = replace(RULES, shard_samples=40)

    def grow(dataset, many):
        version = ingest(sources[:many], dataset, rules).manifest
        encode(version, [pixels_spec(8)], None, Executor())

    def alike():
        found = [objects(there), tree(here)]
        for it in found:  # the time of day is in it
            listed = json.loads(it.pop("blocked.json", b"{}"))
            it["blocked"] = json.dumps([[name, said["look"]] for name, said in listed.items()])
        assert found[0] == found[1]
        return found[0]

    def compact(dataset):
        after = versions.compact(dataset)
        assert len(after.shards) < len(manifest.read(dataset, after.parent).shards)

    steps = [
        lambda dataset: grow(dataset, 1),
        lambda dataset: grow(dataset, 3),
        lambda dataset: versions.remove(dataset, [key], "asked for"),
        compact,
        lambda dataset: versions.gc(dataset, keep=1),
        lambda dataset: grow(dataset, 3),
    ]
    left = []
    for step in steps:
        for dataset in (there, here):
            step(dataset)
        left.append(alike())
    assert picture(105) in b"".join(it for it in left[1].values() if isinstance(it, bytes))
    for later in left[2:]:
        assert picture(105) not in b"".join(it for it in later.values() if isinstance(it, bytes))
    assert len(left[4]) < len(left[3])
    newest = manifest.latest(there)
    assert newest is not None and newest.counts["kept"] == 47
    assert sum(name.endswith(".safetensors") for name in left[-1]) == len(newest.split())
    again = [
        reproduce(version, f"{place}/again").shards
        for version, place in ((newest, bucket), (manifest.latest(here), str(tmp_path)))
    ]
    assert again[0] == again[1] == newest.shards


def test_of_two_processes_that_create_one_wins(bucket):
    start = str(time.time() + 4)
    racers = {
        name: subprocess.Popen(
            [sys.executable, "-c", RACE, name, f"{bucket}/versions", start],
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    }
    wins = {name: racer.communicate()[0].split() for name, racer in racers.items()}
    assert [racer.returncode for racer in racers.values()] == [0, 0]
    assert sorted(map(int, wins["a"] + wins["b"])) == list(range(30)), wins
    found = objects(f"{bucket}/versions")
    for name, numbers in wins.items():
        assert all(found[f"{int(it):02}.json"] == name.encode() * 100 for it in numbers)


INGEST = """
import sys, time
from pipeline import storage
from pipeline.ingest import IngestRules, ingest
dataset, start, *sources = sys.argv[1:]
storage.exists(dataset)
time.sleep(max(0, float(start) - time.time()))
try:
    ingest(sources, dataset, IngestRules(shard_samples=12, min_heldout=4))
except ValueError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
def test_of_two_ingests_at_once_one_publishes_and_the_other_is_told(bucket, tmp_path):
    sources, dataset = fill(f"{bucket}/in"), f"{bucket}/set"
    command = [sys.executable, "-c", INGEST, dataset, str(time.time() + 5), *sources]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(it.communicate()[1] for it in both)
    assert said[0] == "", said
    assert said[1] == "" or "was published meanwhile by another run; run again" in said[1], said
    assert manifest.versions(dataset) == [1]
    assert ingest(sources, dataset, RULES).reused
    ingest(sources, str(tmp_path / "set"), RULES)
    assert objects(dataset) == tree(tmp_path / "set")


def test_a_lost_answer_is_not_a_lost_race(bucket, ill):
    url = f"{bucket}/versions/000001.json"
    with ill(first=("lost", "lost"), only="PUT") as trouble:
        assert storage.create_exclusive(url, b"mine")
        assert trouble.happened["lost"] == 2
        assert not storage.create_exclusive(url, b"mine")
        assert not storage.create_exclusive(url, b"another")
    assert storage.read_bytes(url) == b"mine"


def test_what_is_copied_is_copied_once_and_whole(bucket, ill, tmp_path):
    data = random.Random(1).randbytes(3_000_000)
    url = f"{bucket}/shards/a.tar"
    storage.publish_bytes(url, data)
    with ill(kinds=("cut",), share=1.0, only="GET") as trouble:
        with pytest.raises(OSError, match=rf"ClientPayloadError.*8 tries.*{url}"):
            storage.local_copy(url)
        assert trouble.happened["cut"] >= 8
        assert os.listdir(tmp_path / "home" / "cache") == []
    with ill(kinds=("cut",), share=0.5, seed=4, only="GET") as trouble:
        copy = storage.local_copy(url)
        assert copy.read_bytes() == data
        asked = trouble.happened.total()
        assert trouble.happened["cut"]
        assert storage.local_copy(url) == copy
        assert trouble.happened.total() == asked
    assert os.listdir(copy.parent) == [copy.name]


UPLOAD = """
import hashlib, random, sys
from pipeline import storage
url, seed = sys.argv[1], int(sys.argv[2])
storage.exists(url)
print("ready", flush=True)
data = random.Random(seed)
for number in range(10_000):
    made = data.randbytes(data.randrange(1, 1 << 19))
    name = hashlib.sha256(made).hexdigest()
    with storage.publishing(f"{url}/{name}") as file:
        file.write(made)
"""


def test_uploads_of_killed_processes_are_whole_or_not_there(bucket):
    rng = random.Random(5)
    for seed in range(3):
        command = [sys.executable, "-c", UPLOAD, bucket, str(seed)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            process.stdout.readline()
            time.sleep(rng.uniform(0.05, 0.5))
            process.send_signal(signal.SIGKILL)
    found = objects(bucket)
    assert len(found) > 3
    for name, data in found.items():
        assert hashlib.sha256(data).hexdigest() == name


def test_a_large_upload_that_is_killed_leaves_nothing(bucket):
    """Beyond 100 MB an upload has parts; until the last word none of them is to be seen."""
    code = (
        "import sys, os; from pipeline import storage\n"
        "data = bytes(130_000_000); url = sys.argv[1]\n"
        "files, path = storage.filesystem(url); done = files._call_s3\n"
        "async def call(method, *args, **kw):\n"
        "    if method == 'complete_multipart_upload': os.kill(os.getpid(), 9)\n"
        "    return await done(method, *args, **kw)\n"
        "files._call_s3 = call\n"
        "storage.publish_bytes(url, data)"
    )
    killed = subprocess.run([sys.executable, "-c", code, f"{bucket}/large.tar"])
    assert killed.returncode == -signal.SIGKILL
    assert not storage.exists(f"{bucket}/large.tar")
    assert storage.list_names(bucket) == []


# ---- ill ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_ill_store_changes_no_byte(bucket, ill, tmp_path, seed):
    sources, dataset = fill(f"{bucket}/in", count=10), f"{bucket}/set"
    with ill(share=0.15, seed=seed) as trouble:
        there = the_line(sources, dataset)
        assert all(trouble.happened[kind] for kind in trouble.kinds), trouble.happened
    assert same(there, the_line(sources, str(tmp_path / "set")))
    assert objects(dataset) == tree(tmp_path / "set")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("slow_down", "(Service Unavailable|Please reduce your request rate)"),
        pytest.param("stall", "(Read timeout|FSTimeoutError)", marks=pytest.mark.slow),
        pytest.param("refuse", "ConnectionClosedError", marks=pytest.mark.slow),
    ],
)
def test_a_store_that_never_answers_is_an_error_that_names_the_url(bucket, ill, kind, said):
    sources, dataset = fill(f"{bucket}/in", count=3), f"{bucket}/set"
    with ill(tries=3, kinds=(kind,), share=1.0) as trouble:
        for ask in (
            lambda: ingest(sources, dataset, RULES),
            lambda: storage.publish_bytes(f"{bucket}/set/x", b"x"),
            lambda: storage.list_names(f"{bucket}/set"),
            lambda: storage.local_copy(f"{bucket}/set/shards/y.tar"),
        ):
            with pytest.raises(OSError, match=rf"{said}.*3 tries.*{bucket}/"):
                ask()
        assert trouble.happened[kind] == trouble.happened.total()
    assert objects(dataset) == {}


def test_a_store_that_goes_away_in_the_middle_leaves_no_version_and_comes_back(
    bucket, ill, tmp_path
):
    sources, dataset = fill(f"{bucket}/in"), f"{bucket}/set"
    with ill(tries=3, kinds=("refuse",)) as trouble:

        def away(stage, done, total):
            trouble.share = float(stage == "write" and done == 1)

        with pytest.raises(OSError, match=rf"3 tries.*{bucket}/"):
            ingest(sources, dataset, RULES, progress=away)
    assert manifest.latest(dataset) is None
    ingest(sources, dataset, RULES)
    ingest(sources, str(tmp_path / "set"), RULES)
    assert objects(dataset) == tree(tmp_path / "set")


def test_reading_goes_on_where_it_was(bucket, ill):
    data = random.Random(2).randbytes(500_000)
    storage.publish_bytes(f"{bucket}/a.bin", data)
    with ill(kinds=("slow_down", "cut"), share=0.5, seed=2, only="GET") as trouble:
        with storage.open_read(f"{bucket}/a.bin") as file:
            assert file.read(10) == data[:10]
            file.seek(400_000)
            assert file.read() == data[400_000:]
            assert file.seek(-5, io.SEEK_END) == len(data) - 5
            assert file.read(50) == data[-5:]
        assert storage.read_ranges(f"{bucket}/a.bin", [(7, 9), (0, 3)]) == [data[7:16], data[:3]]
        assert trouble.happened["none"] < trouble.happened.total()


def test_what_is_not_there_is_said_at_once(bucket):
    began = time.monotonic()
    for ask in (storage.read_bytes, storage.local_copy, lambda url: storage.open_read(url).read()):
        with pytest.raises(FileNotFoundError, match=f"{bucket}/nowhere"):
            ask(f"{bucket}/nowhere")
    with pytest.raises(FileNotFoundError, match="bucket does not exist.*s3://nobucket/a"):
        storage.publish_bytes("s3://nobucket/a", b"x")
    assert time.monotonic() - began < 3
