"""That the benchmark of ingest measures what it says: not how fast."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from pipeline import dedup
from tests.benchmarks import ingest as benchmark


@pytest.fixture
def folders(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    rng = np.random.default_rng(0)
    with open(source / "captions.jsonl", "w") as table:
        for number in range(3):
            coarse = Image.fromarray(rng.integers(0, 256, (18, 27, 3), np.uint8))
            coarse.resize((540, 360), Image.Resampling.BICUBIC).save(source / f"{number}.jpg")
            table.write(json.dumps({"file": f"{number}.jpg", "caption": f"noise {number}"}) + "\n")
    return benchmark.photographs(source, tmp_path / "pictures", 8)


def test_copies_have_new_keys_and_the_same_pixels(folders):
    files = [(folders["all"] / name).read_bytes() for name in benchmark.names(folders["all"])]
    assert len(set(map(dedup.key, files))) == len(files) == 8
    pixels = [np.asarray(Image.open(io.BytesIO(data))) for data in files]
    assert all(np.array_equal(one, pixels[at % 3]) for at, one in enumerate(pixels))
    assert not np.array_equal(pixels[0], pixels[1])


def test_the_bare_loop_does_the_work_on_pixels_that_ingest_does(folders, tmp_path):
    out = tmp_path / "out" / "data"
    measured = benchmark.run_ours(folders["all"], folders["warm"], out, workers=0)
    assert measured["pictures"] == benchmark.run_bare(folders["all"], 2)["pictures"] == 8
    assert benchmark.same_files(out, folders["all"])
    level, count = benchmark.psnr(out, folders["all"])
    assert count == 8
    assert 43 < level < 46  # JPEG at 95 with full chroma; at 90 it is 42.5


def test_served_pictures_arrive(folders, tmp_path):
    with benchmark.serving(folders["all"]) as (port, end):
        urls = benchmark.table_of_urls(folders["all"], port, tmp_path / "urls.jsonl")
        benchmark.run_ours(urls, folders["warm"], tmp_path / "data", workers=0)
        assert end() > 0
    found = dict(benchmark.stored(tmp_path / "data"))
    assert sorted(found) == benchmark.names(folders["all"])
