"""Commands about data sets, on pictures of our own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import build_dataset, commands, data_commands
from flows.line import Line
from flows.recipe import RecipeError, check_stages, load
from flows.settings import settings
from pipeline import manifest
from pipeline.encode import encode
from pipeline.execute import Executor
from pipeline.schema import EncoderSpec
from pipeline.score import read_scores


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DARKROOM_HOME", str(tmp_path / "home"))
    return tmp_path


def pictures(folder: Path, first: int, count: int) -> str:
    folder.mkdir()
    for n in range(first, first + count):
        Image.new("RGB", (40 + n, 48), (20 * n, 255 - 20 * n, 7 * n)).save(folder / f"{n}.png")
        (folder / f"{n}.txt").write_text(f"shade number {n}")
    return str(folder)


def ingest(
    *sources: str,
    side: int | None = None,
    rules: tuple[str, ...] = (),
    scorers: Sequence[Mapping[str, str]] = (),
) -> dict:
    return data_commands.ingest([*sources], "shades", side, [*rules], json.dumps(scorers))


def test_what_is_not_said_of_a_data_set_is_as_it_has_it(home):
    one, two = pictures(home / "one", 0, 4), pictures(home / "two", 4, 3)
    assert ingest(one, side=32, rules=("shard_samples=2",))["version"] == 1
    grown = ingest(two, rules=("min_side=1",))
    assert (grown["version"], grown["counts"]["seen"], grown["new"]) == (2, 7, 3)
    first, second = (manifest.read(grown["dataset"], version) for version in (1, 2))
    assert second.rules["max_side"] == 32
    assert second.rules["shard_samples"] == 2
    assert {it.name for it in first.shards} <= {it.name for it in second.shards}


def test_rules_that_store_all_anew_leave_no_source_behind(home):
    one, two = pictures(home / "one", 0, 4), pictures(home / "two", 4, 3)
    made = ingest(one, side=32)
    with pytest.raises(ValueError, match=r"max_side 32 -> 16.*some from .*/one; name these"):
        ingest(two, side=16)
    assert manifest.versions(made["dataset"]) == [1]
    anew = ingest(one, two, side=16)
    assert (anew["version"], anew["counts"]["kept"]) == (2, 7)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """A tiny CLIP as open_clip publishes it; what it says is noise, but the same each time."""
    import torch
    from open_clip.model import CLIP
    from safetensors.torch import save_file

    from training import contrastive, stages

    folder = tmp_path_factory.mktemp("clip")
    image = {"kind": "vit", "side": 16, "width": 32, "layers": 1}
    text = {"vocabulary": 49408, "context": 20, "width": 16, "heads": 2, "layers": 1}
    config = stages.config_of("clip", {"embed": 12, "image": image, "text": text})
    described = contrastive.model_config(config)
    torch.manual_seed(0)
    save_file(CLIP(**described).state_dict(), folder / "open_clip_model.safetensors")
    levels = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": described, "preprocess_cfg": levels})
    )
    return str(folder)


def scores_of(dataset: str) -> np.ndarray:
    version = manifest.latest(dataset)
    assert version is not None
    made_by = [*version.rules["scorers"].values()]
    found = [read_scores(dataset, it.name, made_by)["clip_similarity"] for it in version.shards]
    return np.sort(np.concatenate(found))


def test_a_recipe_chooses_by_clip_similarity(home, clip):
    """Through the recipe, the command that adds to its data set, the counts and `explain`."""
    scorers = [{"kind": "clip_similarity", "clip": clip}]
    sources = [pictures(home / "one", 0, 6)]
    given = [
        "name=shades",
        f"data.sources={json.dumps(sources)}",
        f"data.scorers={json.dumps(scorers)}",
        "data.ingest.heldout_share=0",
    ]
    line = Line(load("pictures", given), settings())
    every = build_dataset.ingest_sources(line)
    assert every.counts["kept"] == 6
    scores = scores_of(line.dataset)
    bound = float(scores[2:4].mean())
    assert len(scores) == 6 and scores[2] < bound < scores[3]
    given.append(f"data.ingest.scores={json.dumps({'clip_similarity': [bound, None]})}")
    recipe = load("pictures", given)
    check_stages(recipe)
    line = Line.from_json(json.loads(json.dumps(Line(recipe, settings()).to_json())))
    result = build_dataset.ingest_sources(line)
    assert (result.counts["kept"], result.counts["filtered:clip_similarity"]) == (3, 3)
    assert build_dataset.ingest_sources(line).reused

    rows = data_commands.explain("shades", "/one")["rows"]
    left = [it for it in rows if it["reason"] == "clip_similarity"]
    assert sorted(it["detail"] for it in left) == sorted(
        f"clip_similarity {score:.6g} < {bound}" for score in scores[:3].tolist()
    )

    more = pictures(home / "two", 6, 3)
    with pytest.raises(ValueError, match="'clip_similarity', which no scorer gives.*--scorers"):
        ingest(more)
    grown = ingest(more, scorers=scorers)
    kept = int((scores_of(line.dataset) >= bound).sum())
    assert (grown["counts"]["seen"], grown["counts"]["kept"]) == (9, kept)
    assert grown["counts"]["filtered:clip_similarity"] == 9 - kept


def test_scorers_are_checked_before_anything_is_read(home):
    source = pictures(home / "one", 0, 1)
    for odd in ("[{", '{"kind": "clip_similarity"}'):
        with pytest.raises(RecipeError, match=r"data\.scorers"):
            data_commands.ingest([source], "shades", None, [], odd)
    with pytest.raises(ValueError, match=r"data\.scorers\[0\].*'clip_similarity'"):
        ingest(source, scorers=[{"kind": "clip_similarly", "clip": "x"}])
    with pytest.raises(ValueError, match="the score 'nsfw', which no scorer gives"):
        ingest(source, rules=('scores={"nsfw": [null, 0.5]}',))
    assert not (home / "home" / "datasets" / "shades").exists()


class Short:
    """Reads 15 letters of a text, and makes nothing of one that ends with a 3."""

    limit = 15

    def __call__(self, texts):
        lengths = np.array([[len(text)] for text in texts], np.float16)
        lengths[[text.endswith("3") for text in texts]] = np.nan
        return [np.ones((min(len(text), 15), 2), np.float16) for text in texts], lengths

    def truncated(self, texts):
        return np.array([len(text) > 15 for text in texts])


def test_encode_tells_what_was_cut_and_what_was_rejected(home, monkeypatch):
    """Bad inputs 22 and 39: captions are "shade number N", of 14 letters or 15."""
    source = pictures(home / "one", 5, 10)
    (home / "one" / "5.txt").write_text("shade number five")
    ingest(source, rules=("heldout_share=0",))
    line = Line(load("shapes", ["name=shades"]), settings())
    data, spec = line.manifest(), EncoderSpec("clip", "text", "short")

    def encode_stages(*_):
        encode(data, [spec], lambda _: Short(), Executor(), max_rejected_share=1)

    monkeypatch.setattr(commands, "_line", lambda *_: line)
    monkeypatch.setattr(commands, "_prepare", lambda *_: (data, []))
    monkeypatch.setattr(build_dataset, "encode_stages", encode_stages)
    monkeypatch.setattr(build_dataset, "encoder_specs", lambda *_: [spec])
    told = commands.encode("shapes", [])
    assert told["rejected"] == {"clip": 1}
    assert (told["texts"]["clip"]["captions"], told["texts"]["clip"]["cut"]) == (10, 1)
    assert "  clip 10 captions, 1 cut, in " in told["text"]
    assert "  clip rejected 1: not_finite" in told["text"]
    (row,) = data_commands.explain("shades", "#13.png")["rows"]
    assert [it["encoder"] for it in row["encoders"]] == ["clip"]
    said = data_commands.explain("shades", "#13.png")["text"]
    assert "  encoder clip (short) rejected it: not_finite" in said
    shown = data_commands.show("shades", None, str(home / "page.html"))
    assert shown["encoders_rejected"] == {"clip short": 1}
