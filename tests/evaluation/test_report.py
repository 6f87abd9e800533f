"""The page is whole, self-contained and safe, whatever the captions say."""

import base64
import io
import re
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.gate import GatePolicy, decide
from evaluation.page import duration
from evaluation.prompts import Prompt
from evaluation.report import DataStory, ReportInputs, StageStory, render, write
from evaluation.sample import png
from evaluation.scorecard import (
    Basis,
    EvaluationConfig,
    Option,
    Scale,
    Scorecard,
    Scored,
    Tried,
    Value,
)
from pipeline import shapes

HOSTILE = (
    "a cat <script>alert(1)</script> {{ 7 * 7 }} {% raw %} "
    "\x1b[31mred\x1b[0m \x9b2J \u202egnp \" onload='x' &amp;"
)


def scored(kind: Any = "shapes", hostile=False, side=32, seed=0):
    scenes = [shapes.scene(seed, i) for i in range(24)]
    groups = ("seen", "unseen") if kind == "shapes" else ("heldout", "unseen_name")
    prompts = [
        Prompt(
            HOSTILE if hostile else shapes.caption(it, 0, i, "heldout"), groups[i % 2], it.truth()
        )
        for i, it in enumerate(scenes)
    ]
    pictures = np.stack([shapes.draw(it, side) for it in scenes])
    main = "correct" if kind == "shapes" else "retrieval"
    config = EvaluationConfig(kind=kind, gallery=12)
    clip = Basis(
        judge="the line's own CLIP",
        weights="ab" * 32,
        resize="to 32",
        count=24,
        prompts="p",
        reference="r",
        reference_count=90,
    )
    oracle = Basis(judge="oracle", count=24, prompts="p")
    values = {
        main: Value(value=0.917, low=0.88, high=0.94, basis=oracle),
        f"{main}_unguided": Value(value=0.5, low=0.4, high=0.6, basis=oracle),
        f"{main}_shuffled": Value(value=0.01, low=0.0, high=0.03, basis=oracle),
        "clip_score": Value(value=31.27, low=31.0, high=31.5, basis=clip),
        "kid": Value(value=0.00213, low=0.001, high=0.003, basis=clip),
        "fid": Value(value=12.5, basis=clip),
        "precision": Value(value=0.81, basis=clip),
        "recall": Value(value=0.62, basis=clip),
    }
    rows = [
        Scale(
            scale=s,
            values={main: f, "kid": k, "precision": f, "recall": 1 - f / 2, "clip_score": 30.0},
            pareto=s > 1,
        )
        for s, f, k in ((1.0, 0.5, 0.004), (3.0, 0.917, 0.002), (6.0, 0.93, 0.003))
    ]
    card = Scorecard(
        config=config,
        scale=3.0,
        headline={name: value.value for name, value in values.items()},
        values=values,
        sweep=tuple(rows),
        groups={
            group: {main: 0.9 + 0.03 * k, "clip_score": 31.0, "prompts": 12.0}
            for k, group in enumerate(groups)
        },
        attributes={
            "colour": {"all": 0.99, "seen": 1.0, "unseen": 0.98, "unguided": 0.7, "shuffled": 0.12}
        }
        if kind == "shapes"
        else {},
        speed={"pictures_per_second": 17.3, "peak_memory_bytes": 1.2e9},
    )
    sweep = {row.scale: pictures[:8] for row in rows}
    return Scored(card, prompts, pictures, pictures, sweep, {main: np.ones(24)})


def inputs(**more):
    model = more.pop("scored", None) or scored()
    evidence = model.evidence(
        "candidate", {"integrity": True, "lineage": True, "infra": "the picture differs"}
    )
    return ReportInputs(
        name="shapes",
        version="v7",
        scored=model,
        verdict=decide(evidence, None, GatePolicy(absolute={"correct": 0.9}, min_samples=10)),
        stages=(
            StageStory(
                name="autoencoder",
                history=[{"images_seen": 1000 * k, "loss": 1 / k} for k in range(1, 50)],
                seconds=93,
                parameters=1_234_567,
                images_seen=49_000,
                measured={"psnr": 31.4},
                preview=png(np.zeros((8, 16, 3), np.uint8)),
            ),
            StageStory(
                name="base",
                history=[
                    {"images_seen": 64, "loss": None},
                    {"images_seen": 128, "loss": float("nan")},
                ],
            ),
        ),
        data=DataStory(
            version=3,
            digest="d" * 16,
            counts={
                "kept": 900,
                "filtered": 50,
                "rejected": 30,
                "duplicate": 20,
                "rejected:truncated": 30,
                "filtered:too_small": 50,
            },
            splits={"train": 800, "heldout": 100},
            sources=("shapes://?scenes=1000",),
        ),
        seconds={"ingest": 12.0, "scoring": 140.0},
        lineage={"commit": "abc", "stages": {"base": "base-1"}},
        recipe={"name": "shapes", "seed": 0},
        created=datetime(2026, 3, 4, 5, 6, tzinfo=UTC),
        **more,
    )


def test_what_a_stage_took_is_told_by_the_stage_itself(parsed):
    """It was found done in a moment; it had been trained over two sittings."""
    told = replace(inputs(), seconds={"autoencoder": 0.1, "scoring": 60.0})
    assert sum(it.seconds for it in told.stages) == 93
    assert f"{duration(93 + 60)} of work in all" in " ".join(parsed(render(told)).text)


@pytest.mark.parametrize("kind", ["shapes", "captions"])
def test_the_page_is_well_formed_and_fetches_nothing(kind, parsed):
    page = parsed(render(inputs(scored=scored(kind))))
    assert "script" not in page.seen
    sources = page.values("src")
    assert len(sources) == 12 + 6 * 3 + 1
    assert all(source.startswith("data:image/") for source in sources)
    assert all(link.startswith("#") for link in page.values("href"))
    anchors = {link[1:] for link in page.values("href")}
    assert anchors <= set(page.values("id"))
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    text = " ".join(page.text)
    assert not re.search(r"url\(|@import|https?:", text)
    for said in (
        "91.7 %",
        "88.0 to 94.0 %",
        "v7",
        "Kept out",
        "the picture differs",
        "1.23 M",
        "psnr",
        "4 March 2026",
    ):
        assert said in text, said
    for said in ("truncated: 30", "800", "2 min 20 s", "base-1", "line's own CLIP"):
        assert said in text, said


def test_each_option_that_was_swept_has_a_table_and_its_choice_is_marked(parsed):
    def option(name, chosen, values):
        rows = [
            Tried(
                value=it,
                values={"correct": 0.9 - 0.1 * k, "kid": 0.002, "precision": 0.8, "recall": 0.6},
                between={"correct": (0.85 - 0.1 * k, 0.95 - 0.1 * k)},
            )
            for k, it in enumerate(values)
        ]
        return Option(name=name, metric="correct", chosen=chosen, tried=tuple(rows))

    plain = scored()
    options = (
        option("sr1.level", 0.05, (0.0, 0.05, 0.15)),
        option("guidance_interval", (0.2, 0.8), ((0.0, 1.0), (0.2, 0.8))),
        option("kind", "heun", ("heun", HOSTILE)),
    )
    card = plain.scorecard.model_copy(update={"options": options})
    html = render(inputs(scored=replace(plain, scorecard=card)))
    page = parsed(html)
    rows = page.rows["sampling"]
    assert rows[0] == [
        "Value",
        "Shows what was asked",
        "Kernel distance (KID)",
        "Precision",
        "Recall",
    ]
    assert [row[0] for row in rows[1:4]] == ["0", "0.05chosen", "0.15"]
    assert rows[2][1] == "80.0 %75.0 to 85.0 %"
    assert [row[0] for row in rows[5:7]] == ["0 to 1", "0.2 to 0.8chosen"]
    assert "Fidelity and diversity by sr1.level" in page.text
    assert "Fidelity and diversity by kind" not in html
    assert "sr1.level 0.05, guidance_interval 0.2 to 0.8, kind heun, 32 pixels" in " ".join(
        page.text
    )
    assert "script" not in page.seen
    assert "#sampling" in page.values("href")
    assert "sampling" not in parsed(render(inputs())).values("id")


def test_pictures_in_the_page_are_the_pictures(parsed):
    model = scored()
    first = parsed(render(inputs(scored=model))).values("src")[0]
    data = base64.b64decode(first.removeprefix("data:image/png;base64,"))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), model.pictures[0])


def test_foreign_text_stays_text(parsed):
    hostile = scored(hostile=True)
    html = render(replace(inputs(scored=hostile, champion=hostile), name=HOSTILE))
    page = parsed(html)
    assert "script" not in page.seen
    assert not any(name.startswith("on") for _, name, _ in page.attributes)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)
    text = "".join(page.text)
    assert "<script>alert(1)</script> {{ 7 * 7 }} {% raw %} ␛[31mred␛[0m" in text
    assert "&amp;amp;" in html
    assert html.count("<bdi>") >= 12 + 6 + 1


def test_recipes_and_lineage_are_foreign_text_too(parsed):
    html = render(
        ReportInputs(
            name="x", scored=scored(), recipe={"a": HOSTILE}, lineage={"</details>": HOSTILE}
        )
    )
    page = parsed(html)
    assert "script" not in page.seen
    assert "</details>" in "".join(page.text)
    assert "\x1b" not in html


def test_a_picture_that_shows_something_else_is_marked(parsed):
    model = scored()
    model.pictures[1] = model.pictures[0]
    page = parsed(render(inputs(scored=model)))
    assert page.values("class").count("miss") == 1
    assert any("wrong" in text for text in page.text)


def test_what_is_left_out_is_not_on_the_page(tmp_path, parsed):
    write(tmp_path / "report.html", ReportInputs(name="bare", scored=scored()))
    page = parsed((tmp_path / "report.html").read_text())
    text = " ".join(page.text)
    assert "Not judged" in text
    assert not {"gate", "training", "data"} & set(page.values("id"))


def test_a_champion_stands_beside_only_where_it_may():
    model = scored()
    page = render(inputs(scored=model, champion=scored()))
    assert "; champion 91.7 %" in page
    other = scored()
    for name, value in other.scorecard.values.items():
        other.scorecard.values[name] = value.model_copy(
            update={"basis": value.basis.model_copy(update={"count": 9})}
        )
    assert "champion 91" not in render(inputs(scored=model, champion=other))


def test_a_replaced_stage_stands_beside_the_champions_with_what_it_changed(parsed):
    def model(share, sr1):
        card = scored()
        card.per_prompt["correct"][: round(24 * (1 - share))] = 0
        stages = {"t5": "t5-0, weights aa", "sr1": sr1}
        facts = dict.fromkeys(("integrity", "lineage", "infra"), True)
        return card, card.evidence(HOSTILE if "old" in sr1 else "shapes/8", facts, stages)

    (new, mine), (old, theirs) = model(1.0, "sr1-new, weights bb"), model(0.75, "sr1-old <i>")
    verdict = decide(mine, theirs, GatePolicy(absolute={"correct": 0.9}, min_samples=10))
    page = parsed(render(replace(inputs(scored=new, champion=old), verdict=verdict)))
    stages, metrics = page.rows["stages"][1:3], page.rows["stages"][4:]
    assert stages == [
        ["t5", "shared", "t5-0, weights aa", "t5-0, weights aa"],
        ["sr1", "new", "sr1-new, weights bb", "sr1-old <i>"],
    ]
    first = metrics[0]
    assert first[0] == "Shows what was asked"
    assert (first[3], first[5]) == ("+0.0 points", "24")  # of the cards' equal values
    assert first[4].startswith("-") and " to +" in first[4]
    assert [row[4] for row in metrics if row[0] == "Fréchet distance (FID)"] == [""]
    assert "#stages" in page.values("href")
    assert "stages" not in parsed(render(inputs())).values("id")


def test_large_pictures_are_stored_smaller_and_smoothed(parsed):
    page = parsed(render(ReportInputs(name="x", scored=scored(side=160))))
    assert page.values("src")[0].startswith("data:image/jpeg;")
    assert "px" not in page.values("class")


def test_a_stage_tells_its_story_only_when_it_is_finished(tmp_path):
    with pytest.raises(ValueError, match="not finished"):
        StageStory.of("base", tmp_path)
    (tmp_path / "stage.json").write_text(
        '{"seconds": 3.5, "parameters": 7, "images_seen": 9, "measured": {"psnr": 30}}'
    )
    (tmp_path / "history.jsonl").write_text('{"images_seen": 9, "loss": 0.5}\n')
    story = StageStory.of("base", tmp_path)
    assert (story.seconds, story.parameters, story.history[0]["loss"], story.preview) == (
        3.5,
        7,
        0.5,
        None,
    )
