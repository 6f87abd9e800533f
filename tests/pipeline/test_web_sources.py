"""Sources behind http://: tables, tars and parquets on a loopback server that may ignore Range."""

from __future__ import annotations

import http.server
import io
import json
import pickle
import socket
import tarfile
from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from pipeline import download as downloads
from pipeline import storage
from pipeline.download import Downloader, DownloadRules, OpenedRules
from pipeline.ingest import IngestRules, ingest
from pipeline.outcomes import read_outcomes

RULES = IngestRules(heldout_share=0, min_heldout=0)


def picture(seed: int, format: str = "PNG") -> bytes:
    out = io.BytesIO()
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(coarse).resize((24, 24), Image.Resampling.BICUBIC).save(out, format)
    return out.getvalue()


class Server(http.server.ThreadingHTTPServer):
    """Files by path; without `ranges` every GET is answered with the whole file, as `python -m
    http.server` does."""

    daemon_threads = True

    def __init__(self, address: str = "127.0.0.1", port: int = 0):
        super().__init__((address, port), Handler)
        self.asked: list[str] = []
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.types: dict[str, str] = {}
        self.changed = "Thu, 01 Jan 2026 00:00:00 GMT"
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass  # a client that has seen enough


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        data, first = self.server.files.get(self.path.lstrip("/")), 0
        status, wanted = 200, self.headers.get("Range", "")
        if data is None:
            status, data = 404, b""
        elif wanted and self.server.ranges:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            first, size = int(start), len(data)
            status, data = 206, data[first : int(end) + 1]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.server.changed)
        if kind := self.server.types.get(self.path.lstrip("/")):
            self.send_header("Content-Type", kind)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{size}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET


@pytest.fixture
def web(served):
    with served(Server()) as it:
        yield it


def tar_of(members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet_of(columns) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table(columns), out)
    return out.getvalue()


def outcomes(manifest) -> dict[str, tuple[str, str]]:
    return {
        it["id"].split("#", 1)[1]: (it["outcome"], it["reason"]) for it in read_outcomes(manifest)
    }


def kept(manifest) -> dict[bytes, tuple[str, ...]]:
    from pipeline import shards

    return {
        sample.image: sample.captions
        for shard in manifest.shards
        for sample in shards.read_shard(manifest.url("shards", f"{shard.name}.tar"))
    }


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_on_the_web_and_the_pictures_beside_it(web, tmp_path, kind, ranges):
    """The host that was named may be on a private network; its pictures are downloaded."""
    web.ranges = ranges
    rows = [{"file": f"deep/{n}.png", "caption": f"picture {n}"} for n in range(4)]
    rows[3]["file"] = f"http://localhost:{web.server_port}/data/deep/3.png"  # not what was named
    web.files = {f"data/deep/{n}.png": picture(n) for n in range(4)}
    lines = ["file,caption", *(f"{it['file']},{it['caption']}" for it in rows)]
    text = "\n".join(lines if kind == "csv" else map(json.dumps, rows))
    web.files[f"data/t.{kind}"] = text.encode()
    version = ingest([f"{web.url}/data/t.{kind}"], str(tmp_path / "set"), RULES).manifest
    assert kept(version) == {picture(n): (f"picture {n}",) for n in range(3)}
    assert version.counts["rejected:private_address"] == 1
    with pytest.raises(ValueError, match="no such file or folder"):
        ingest([f"{web.url}/data/u.{kind}"], str(tmp_path / "set"), RULES)


@pytest.fixture
def names(monkeypatch):
    """Addresses of names ending in .example, one for each look-up and the last for all after it."""
    told: dict[str, list[str]] = {}
    ask = socket.getaddrinfo

    def answer(host, port, *arguments, **options):
        host = host.decode() if isinstance(host, bytes) else host
        if host in told:
            host = told[host].pop(0) if len(told[host]) > 1 else told[host][0]
        return ask(host, port, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    monkeypatch.setattr(downloads, "_given", {})
    return told


def test_a_host_of_a_table_is_free_where_it_was_alone(web, served, tmp_path, names, monkeypatch):
    """127.0.0.2 is the open web here: a name that was there with its table leads in afterwards."""
    public = downloads.is_public
    monkeypatch.setattr(downloads, "is_public", lambda it: it == "127.0.0.2" or public(it))
    web.files["a.png"] = picture(0)
    table = b"file,caption\na.png,one\n"
    names["evil.example"] = ["127.0.0.2", "127.0.0.1"]
    names["moved.example"] = ["127.0.0.3", "127.0.0.1"]
    names["nas.example"] = ["127.0.0.1"]
    for address, name in [("127.0.0.2", "evil"), ("127.0.0.3", "moved")]:
        with served(Server(address, web.server_port)) as outside:
            outside.files["t.csv"] = table
            source = f"http://{name}.example:{web.server_port}/t.csv"
            with pytest.raises(ValueError, match="1 private_address"):
                ingest([source], str(tmp_path / name), RULES)
    assert not web.asked
    web.files["t.csv"] = table
    source = f"http://nas.example:{web.server_port}/t.csv"
    version = ingest([source], str(tmp_path / "nas"), RULES).manifest
    assert version.counts["kept"] == 1
    assert version.rules["download"] == json.loads(json.dumps(asdict(RULES.download)))


@pytest.mark.parametrize(
    ("host", "given", "free"),
    [
        ("nas.local", {"10.0.0.5", "100.64.0.7", "fd00::5"}, {"10.0.0.5", "100.64.0.7", "fd00::5"}),
        ("nas.local", {"10.0.0.5", "fe80::5%eth0", "169.254.169.254"}, {"10.0.0.5"}),
        ("nas.local", {"::ffff:10.0.0.5", "fd00:ec2::254", "100.100.100.200"}, set()),
        ("evil.example", {"10.0.0.5", "93.184.216.34"}, set()),
        ("never-opened.local", set(), set()),
        ("127.0.0.1", set(), {"127.0.0.1"}),
        ("[0:0::1]", set(), {"::1"}),
        ("0.0.0.0", set(), {"0.0.0.0", "127.0.0.1"}),
        ("169.254.169.254", set(), set()),
        ("93.184.216.34", set(), set()),
    ],
)
def test_what_a_named_source_frees(monkeypatch, host, given, free):
    monkeypatch.setattr(downloads, "_given", {host: given})
    rules = OpenedRules.of(DownloadRules(private_hosts=("b.local",)), [f"http://{host}:81/t.csv"])
    rules = pickle.loads(pickle.dumps(rules))
    assert {it for _, freed in rules.opened for it in freed} == free
    name = host if host != "[0:0::1]" else "0:0::1"
    assert all(rules.frees(name, it) and not rules.frees("c.local", it) for it in free)
    assert not rules.frees(name, "10.0.0.6")
    assert rules.frees("b.local", "10.0.0.6")


def test_a_server_with_one_address_that_is_not_free_is_asked_at_another(web, monkeypatch):
    """A NAS of mDNS tells of a link-local one too; so does localhost of ::1 and 127.0.0.1."""
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"{it}.0.0.1", 0)) for it in (10, 127)]
    ask = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *a, **o: both if host == "nas.local" else ask(host, *a, **o),
    )
    monkeypatch.setattr(downloads, "_given", {"nas.local": {"127.0.0.1"}})
    url = f"http://nas.local:{web.server_port}/a.png"
    web.files["a.png"] = picture(0)
    with Downloader(OpenedRules.of(DownloadRules(retries=0), [url])) as get:
        assert get(url) == picture(0)


def test_pictures_inside_a_parquet_and_a_tar_on_the_web(web, tmp_path):
    web.files["a.parquet"] = parquet_of({"image": [picture(0), picture(1)], "text": ["a", "b"]})
    members = [("c.png", picture(2)), ("c.txt", b"c"), ("d.png", b"broken"), ("d.txt", b"d")]
    web.files["b.tar"] = tar_of(members)
    sources = [f"{web.url}/a.parquet", f"{web.url}/b.tar"]
    version = ingest(sources, str(tmp_path / "set"), RULES).manifest
    assert kept(version) == {picture(0): ("a",), picture(1): ("b",), picture(2): ("c",)}
    assert outcomes(version)["d"] == ("rejected", "not_image")


def test_a_tar_behind_a_server_without_ranges_ends_the_run_and_says_why(web, tmp_path):
    """Every row got the whole tar, and was `not_image`."""
    web.ranges = False
    web.files["b.tar"] = tar_of([("a.png", picture(0)), ("a.txt", b"a")])
    size = len(picture(0))
    said = (
        rf"got {len(web.files['b.tar']):,} bytes, wanted {size:,}.*ignores Range.*{web.url}/b\.tar"
    )
    with pytest.raises(OSError, match=said):
        ingest([f"{web.url}/b.tar"], str(tmp_path / "set"), RULES)


def test_a_table_on_the_web_that_changed_within_its_size_is_read_again(web, tmp_path):
    web.files = {"t.csv": b"file,caption\na.png,one\n", "a.png": picture(0), "b.png": picture(1)}
    source, dataset = f"{web.url}/t.csv", str(tmp_path / "set")
    ingest([source], dataset, RULES)
    assert ingest([source], dataset, RULES).reused
    web.files["t.csv"] = b"file,caption\nb.png,two\n"
    web.changed = "Fri, 02 Jan 2026 00:00:00 GMT"
    assert ingest([source], dataset, RULES).new == 1


@pytest.mark.parametrize("path", ["", "/", "/data", "/data/", "/data/t.csv/"])
def test_a_folder_on_the_web_is_refused_with_what_to_name(web, tmp_path, path):
    page = b"<!DOCTYPE html><title>Index of /data/</title>"
    web.files = dict.fromkeys(("", "data", "data/", "data/t.csv/"), page)
    web.types = dict.fromkeys(web.files, "text/html")
    said = rf"neither a table .* name {web.url}{path.rstrip('/')}/captions\.jsonl instead"
    with pytest.raises(ValueError, match=said):
        ingest([f"{web.url}{path}"], str(tmp_path / "set"), RULES)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_page_in_the_place_of_a_table_is_said_to_be_one(web, tmp_path, ranges):
    web.ranges = ranges
    web.files = {"t.csv": b"\n <html>please log in</html>", "u.csv": b"file,caption\na.png,one\n"}
    web.files["a.png"] = picture(0)
    web.types = dict.fromkeys(("t.csv", "u.csv"), "text/html; charset=utf-8")
    with pytest.raises(ValueError, match=r"a page of HTML, no \.csv.*name FOLDER/captions"):
        ingest([f"{web.url}/t.csv"], str(tmp_path / "set"), RULES)
    # some servers say so of whatever they do not know
    assert ingest([f"{web.url}/u.csv"], str(tmp_path / "set"), RULES).counts["kept"] == 1


@pytest.mark.parametrize("name", ["Last-Modified", "last_modified", "LastModified", "ETag"])
def test_what_stores_say_about_time_is_in_the_stamp(name):
    one, other = (storage._remote_stamp({"size": 3, name: it}) for it in ("one", "other"))
    assert one != other
