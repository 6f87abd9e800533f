"""The page accounts for every row, shows what is stored, and is safe whatever captions say."""

import base64
import io
import json
import re
import shutil
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from evaluation import dataset_page
from evaluation.dataset_page import render, write
from pipeline import images, manifest, outcomes, reasons, shards, storage
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.schema import EncoderSpec
from pipeline.score import ScorerSpec, score
from pipeline.versions import gc, remove

HOSTILE = "a dog <script>alert(1)</script> {{ 7 * 7 }} {% raw %} \" onload='x' &amp; \u202egnp"
NAME = "<img src=x onerror=alert(2)>{{ 7 * 7 }}\x1b[31m.png"
FIRST = IngestRules(shard_samples=16, min_side=20, max_rejected_share=0.9)
RULES = replace(
    FIRST, near_duplicates="drop", max_caption=40, languages=("en", "de"), max_aspect=2.24
)


def picture(seed, width, height, format="PNG"):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(out, format)
    return out.getvalue()


def rows():
    for i in range(50):
        yield f"{i}.png", picture(i, 40 + i, 40), f"a dog with the number {i}"
    for i in range(4):  # of another size and format, but they look the same
        data, out = picture(i, 40 + i, 40), io.BytesIO()
        Image.open(io.BytesIO(data)).resize((120 + 3 * i, 120)).save(out, "JPEG", quality=95)
        yield f"copy-{i}.jpg", out.getvalue(), f"a dog that was copied from {i}"
    yield "same.png", picture(7, 47, 40), "a dog that is there twice"
    for i in range(3):
        yield f"small-{i}.png", picture(100 + i, 19, 30), "a small dog"
    yield "long.png", picture(200, 90, 40), "a long dog"
    yield "words.png", picture(201, 40, 40), "a dog " + 20 * "and a word "
    yield "hostile.png", picture(202, 30, 30), HOSTILE
    yield NAME, b"<html>", HOSTILE
    yield "cut.png", picture(1, 40, 40)[:200], "half a dog"


def folder(where, some):
    where.mkdir()
    with open(where / "captions.jsonl", "w") as file:
        for name, data, caption in some:
            (where / name.replace("/", "_")).write_bytes(data)
            file.write(json.dumps({"file": name, "caption": caption}) + "\n")
    return str(where)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three versions: some rows, all of them, other rules."""
    home = tmp_path_factory.mktemp("page")
    every = list(rows())
    first, more = folder(home / "first", every[:30]), folder(home / "more", every[30:])
    url = str(home / "dogs")
    ingest([first], url, FIRST)
    ingest([first, more], url, FIRST)
    ingest([first, more], url, RULES)
    return url


@pytest.fixture(scope="module")
def version(dataset):
    return manifest.read(dataset, 3)


def shown(page):
    """Key -> pictures of it on the page."""
    found = {}
    keys = [value for value in page.values("title") if re.fullmatch("[0-9a-f]{32}", value)]
    for key, uri in zip(keys, page.values("src"), strict=True):
        data = base64.b64decode(uri.removeprefix("data:image/webp;base64,"))
        found.setdefault(key, []).append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    return found


def numbers(row):
    return [int(cell.replace(",", "")) for cell in row if re.fullmatch(r"[\d,]+", cell)]


def test_every_row_is_accounted_for_once(version, parsed):
    page = parsed(render(version))
    header, *table = page.rows["rows"]
    total = next(k for k, row in enumerate(table) if row[0] == "all")
    told = {(row[0], row[1]): numbers(row[2:3])[0] for row in table[:total]}
    assert header[:4] == ["Outcome", "Reason", "Rows", "Share"]
    assert sum(told.values()) == numbers(table[total])[0] == version.counts["seen"] == 63
    by_outcome = Counter()
    for (outcome, _), n in told.items():
        by_outcome[outcome] += n
    assert by_outcome == {name: version.counts[name] for name in outcomes.OUTCOMES}
    by_reason = sorted(n for (outcome, _), n in told.items() if outcome != "kept")
    reasons = {name: n for name, n in version.counts.items() if ":" in name and name[:5] != "flag:"}
    assert by_reason == sorted(reasons.values())
    assert len(reasons) > 5
    splits = [row for row in table[total + 1 :] if row[0] in ("train", "heldout")]
    assert sum(numbers(row)[0] for row in splits) == version.samples() == version.counts["kept"]
    sources = [numbers(row) for row in page.rows["making"][1:]]
    assert all(seen == sum(each) for seen, *each in sources)
    assert sum(seen for seen, *_ in sources) == 63


def test_what_was_rejected_and_filtered_is_named(version, parsed):
    table = {tuple(row[:2]): row[-1] for row in parsed(render(version)).rows["rows"][1:]}
    cell = next(text for key, text in table.items() if key[1].startswith("truncated"))
    assert "cut.png" in cell
    cell = next(text for key, text in table.items() if key[1].startswith("too small"))
    assert all(f"small-{i}.png" in cell for i in range(3))
    assert cell.count("shorter side 19 < 20") == 3
    cell = next(text for key, text in table.items() if key[1].startswith("near duplicate"))
    assert "looks like" in cell and "0.png" in cell
    cell = next(text for key, text in table.items() if key[0] == "duplicate")
    assert "same file as" in cell and "7.png" in cell


def test_what_an_encoder_made_nothing_of_is_counted(version, parsed, tmp_path):
    copy = str(tmp_path / "dogs")
    shutil.copytree(version.dataset, copy)
    here = replace(version, dataset=copy)
    assert "made nothing of" not in "".join(parsed(render(here)).text)

    def build(spec):
        def encoder(pixels):
            means = pixels.astype(np.float32).mean((2, 3))
            means[0] = np.nan  # of each batch, which is each shard
            return {"means": means}

        return encoder

    spec = EncoderSpec("means", "image", "m1", side=8)
    encode(here, [spec], build, Executor(), max_rejected_share=1)
    bad = reasons.refusals(here)[0].keys
    (row,) = [it for it in parsed(render(here)).rows["rows"] if it[0] == "means m1"]
    assert row[:3] == ["means m1", "not finite", str(len(bad))] and len(bad) > 1
    assert bad[0][:8] in row[3]


def test_the_page_fetches_nothing_and_foreign_text_stays_text(version, parsed):
    html = render(version)
    page = parsed(html)
    assert not {"script", "link", "iframe"} & set(page.seen)
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert all(source.startswith("data:image/webp;base64,") for source in page.values("src"))
    assert all(link.startswith("#") for link in page.values("href"))
    assert {link[1:] for link in page.values("href")} <= set(page.values("id"))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    assert not re.search(r"url\(|@import|https?:", re.sub("<bdi.*?</bdi>", "", html))
    text = "".join(page.text)
    assert "a dog <script>alert(1)</script> {{ 7 * 7 }} {% raw %}" in text
    assert "<img src=x onerror=alert(2)>{{ 7 * 7 }}␛[31m.png" in text
    assert "prefers-color-scheme: dark" in html


def test_pictures_are_those_that_are_stored(version, parsed):
    found = shown(parsed(render(version)))
    kept = {it["key"] for it in outcomes.read_outcomes(version) if it["outcome"] == "kept"}
    assert len(found.keys() & kept) >= min(dataset_page.KEPT, len(kept))
    exact = 0
    for shard in version.shards:
        for sample in shards.read_shard(version.url("shards", f"{shard.name}.tar")):
            stored, _ = images.decode(sample.image)
            for thumbnail in found.pop(sample.key, ()):
                if max(stored.size) <= dataset_page.PIXELATED:
                    assert np.array_equal(thumbnail, np.asarray(stored))
                    exact += 1
                else:
                    assert max(thumbnail.shape) == min(max(stored.size), dataset_page.SIDE)
                    small = np.asarray(stored.resize(thumbnail.shape[1::-1]), np.float32)
                    assert np.abs(small - thumbnail).mean() < 12
    assert exact > 3
    assert not found


def test_samples_come_from_several_shards(version, parsed):
    keys = list(shown(parsed(render(version))))[: dataset_page.KEPT]
    of = {}
    for shard in version.split():
        column = shards.read_table(version.dataset, shard.name, ["key"])["key"].to_pylist()
        of |= dict.fromkeys(column, shard.name)
    assert set(map(of.__getitem__, keys)) == {shard.name for shard in version.split()}


def test_look_alikes_stand_beside_what_they_look_like(version):
    found = {it["key"]: it for it in outcomes.read_outcomes(version)}
    it = dataset_page._Page(version)
    pairs = {
        found[it.rows.texts["key"][one]]["id"].rsplit("#")[1]: found[it.rows.texts["key"][other]]
        for reason, one, other in it._pairs()
        if reason == "near_duplicate"
    }
    assert pairs.keys() == {f"copy-{i}.jpg" for i in range(4)}
    for name, other in pairs.items():
        assert other["id"].endswith(f"#{name[5]}.png")
        assert other["outcome"] == "kept"


def test_of_many_that_look_the_same_the_first_is_shown(tmp_path):
    same = [(f"{i:02}.png", picture(3, 60 + i, 60), f"dog number {i}") for i in range(12)]
    url = str(tmp_path / "same")
    ingest([folder(tmp_path / "in", same)], url, replace(FIRST, heldout_share=0.5))
    version = manifest.read(url, 1)
    rows = outcomes.read_outcomes(version)
    kept = [it for it in rows if it["outcome"] == "kept"]
    assert len(kept) > 1 and version.counts["filtered:other_split"] > 1
    it = dataset_page._Page(version)
    pairs = it._pairs()
    assert len(pairs) == min(dataset_page.PAIRS, version.counts["filtered:other_split"])
    assert {it.rows.texts["key"][other] for _, _, other in pairs} == {kept[0]["key"]}


def test_what_the_rules_leave_out_is_shown_with_its_reason(version, parsed):
    html = render(version)
    section = html.split('id="left-out"')[1].split("</section>")[0]
    for reason, count in (("too small", 3), ("aspect", 1), ("caption long", 2)):
        part = section.split(f'<h3 class="spaced">{reason}')[1].split("<h3")[0]
        assert part.count("<img") == count
    assert "225 characters" in section  # that of words.png
    assert "90 × 40" in section


def test_thresholds_and_scores_are_in_the_histograms(version, parsed):
    def build(spec):
        def tone(pictures, captions):
            red = pictures[:, 0].mean((1, 2)).astype(np.float32)
            return {"red": np.where(red > 130, np.nan, red).astype(np.float32)}

        return tone

    for fingerprint, many in (("tone01", 1), ("tone02", 2)):  # the second took its place
        spec = ScorerSpec("tone", fingerprint, ("red",), side=8)
        score(version.dataset, version.shards[:many], [spec], build, Executor())
    rules = {"scores": {"red": [100.0, None]}, "scorers": {"tone": "tone02"}}
    ruled = replace(version, rules=version.rules | rules)
    html = render(ruled)
    text = " ".join(parsed(html).text)
    assert "unknown" in text
    assert "<h3>red</h3>" in html and "<h3>red (tone01)</h3>" in html
    for mark in ("min 20", "max 40", "1:2.24", "2.24:1", "least 100"):
        assert f">{mark}</text>" in html
    storage.delete(storage.join(version.dataset, "scores"))
    assert "least 100" not in render(ruled)


def test_buckets_hold_every_picture_of_the_version(version, parsed):
    def table(page):
        _, *some, total = [row[1:] for row in page.rows["buckets"]]
        return {tuple(map(int, row[0].split(" × "))): numbers(row)[0] for row in some}, total

    held, total = table(parsed(render(version)))
    assert sum(held.values()) == numbers(total)[0] == version.samples()
    sizes = images.buckets(32, multiple=8)
    encoding = encode(version, [pixels_spec(32, sizes)], None, Executor())["pixels"]
    page = parsed(render(version))
    held, _ = table(page)
    assert f"pixels {encoding.fingerprint[:8]}" in " ".join(page.text)
    wanted = Counter()
    for shard in version.split():
        dropped = version.dropped(shard)
        for place, sample in enumerate(
            shards.read_shard(version.url("shards", f"{shard.name}.tar"))
        ):
            if place not in dropped:
                wanted[sizes[images.nearest(sizes, *images.decode(sample.image)[0].size)]] += 1
    assert held == {size: wanted[size] for size in sizes}
    assert len(wanted) > 2


def test_versions_say_what_changed(version, parsed):
    third, second, first = parsed(render(version)).rows["versions"][1:]
    assert [numbers(row)[0] for row in (third, second, first)] == [3, 2, 1]
    assert numbers(first)[1:] == [30, 30, 0, 0, 0]
    assert "near_duplicates" in third[-1]
    assert "max_caption: 0 → 40" in third[-1]
    assert "rows read" not in third[-1]
    assert "+33 rows read" in second[-1]
    assert "more was added" in second[-1]


def test_languages_are_told_where_the_rules_speak_of_them(version, parsed):
    assert re.search(r"<td><b>en</b></td><td class=\"n\">\d\d</td>", render(version))
    earlier = render(manifest.read(version.dataset, 2))
    assert "Languages" not in earlier
    assert "The newest version is 3" in earlier


def test_a_large_data_set_is_measured_in_part_and_counted_whole(version, parsed, monkeypatch):
    monkeypatch.setattr(dataset_page, "MEASURED", 20)
    page = parsed(render(version))
    text = " ".join(page.text)
    stored = sum(shard.samples for shard in version.shards)
    measured = int(re.search(rf"Of (\d+) of {stored} stored pictures", text)[1])
    assert 0 < measured <= 20
    assert next(numbers(row) for row in page.rows["rows"] if row[0] == "all") == [63]


def test_memory_does_not_grow_with_the_rows(version, parsed, tmp_path, monkeypatch):
    copy = str(tmp_path / "dogs")
    shutil.copytree(version.dataset, copy)
    monkeypatch.setattr(outcomes, "_GROUP", 1 << 12)
    rows = outcomes.read_outcomes(version)
    bad = next(it for it in rows if it["outcome"] == "rejected")

    def shown(more):
        """The page's sum of rows and the most memory it took, of a version with more rows."""
        with outcomes.writing(copy) as (table, publish):
            table.add(outcomes.batch_of(rows))
            for start in range(0, more, 5000):
                some = [
                    {**bad, "id": f"{bad['source']}#{number}", "key": f"{number:032x}"}
                    for number in range(start, start + 5000)
                ]
                table.add(outcomes.batch_of(some))
            here = replace(version, dataset=copy, inputs=publish(), counts=table.counts)
        tracemalloc.start()
        try:
            page = render(here)
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        total = next(numbers(row) for row in parsed(page).rows["rows"] if row[0] == "all")
        return total, most

    shown(0)  # what is imported and remembered
    (few, before), (many, after) = shown(20_000), shown(200_000)
    assert (few, many) == ([20_063], [200_063])
    assert after - before < 2e6


def test_a_thumbnail_is_small_whatever_it_shows():
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8)
    data = images.encode(Image.fromarray(noise), "png")
    it = dataset_page._thumbnail("shards/x.tar", shards.ShardSample("k", data, "png", ("c",)))
    length = len(base64.b64decode(it["uri"].split(",")[1]))
    assert length <= dataset_page.BYTES
    most = dataset_page.KEPT + dataset_page.REASONS * dataset_page.LEFT_OUT + 2 * dataset_page.PAIRS
    assert most * dataset_page.BYTES * 4 / 3 < 1.5e6
    with pytest.raises(ValueError, match=r"x.tar, sample k: the stored picture cannot be decoded"):
        dataset_page._thumbnail("x.tar", shards.ShardSample("k", data[:900], "png", ("c",)))


def test_taken_down_and_expired(tmp_path, parsed):
    url = str(tmp_path / "few")
    source = folder(tmp_path / "in", list(rows())[:3])
    ingest([source], url, replace(FIRST, heldout_share=0))
    key = outcomes.read_outcomes(manifest.read(url, 1))[1]["key"]
    remove(url, [key])
    old, new = (parsed(render(manifest.read(url, number))) for number in (1, 2))
    for page in (old, new):
        assert key not in shown(page)
        assert len(shown(page)) == 2
        assert "removed" in " ".join(cell for row in page.rows["rows"] for cell in row)
    assert "Since then 1 picture was taken down" in " ".join(old.text)
    assert "1 picture taken down later" in old.rows["versions"][2][-1]
    gc(url, keep=1)
    with pytest.raises(ValueError, match=r"version 1 has expired.*the newest is 2"):
        render(manifest.read(url, 1))
    assert "has expired" in parsed(render(manifest.read(url, 2))).rows["versions"][2][-1]


def test_one_picture_is_a_data_set(tmp_path, parsed):
    url = str(tmp_path / "one")
    ingest([folder(tmp_path / "in", list(rows())[:1])], url, FIRST)
    write(tmp_path / "page.html", manifest.read(url, 1))
    page = parsed((tmp_path / "page.html").read_text())
    assert len(page.values("src")) == 1
    assert "left-out" not in page.values("id")
