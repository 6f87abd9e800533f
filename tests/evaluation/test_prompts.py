"""Prompts are balanced, new in wording, true to the split, and the same each time."""

import pytest

from evaluation.prompts import caption_prompts, dataset_prompts, digest, shape_prompts
from evaluation.shapes_oracle import judge
from pipeline import shapes, shards
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest


def drawn(folder, objects=1, scenes=600, **rules):
    source = f"shapes://?scenes={scenes}&seed=3&side=16&objects={objects}"
    rules = IngestRules(shard_samples=256, near_duplicates="keep", **rules)
    return ingest([source], str(folder), rules, Executor(kind="local")).manifest


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("shapes"))


def truth_of(it):
    assert it.truth is not None
    return it.truth


def rows(manifest, split):
    return [
        row
        for shard in manifest.split(split)
        for row in shards.read_table(manifest.dataset, shard.name).to_pylist()
    ]


def combinations(manifest, split):
    import json

    return {shapes.combination(json.loads(row["label"])) for row in rows(manifest, split)}


def test_half_of_the_prompts_are_combinations_that_training_never_showed(manifest):
    prompts = shape_prompts(manifest, 64, seed=1)
    trained, held = combinations(manifest, "train"), combinations(manifest, "heldout")
    assert [{a.group, b.group} for a, b in zip(prompts[::2], prompts[1::2], strict=True)] == [
        {"seen", "unseen"}
    ] * 32
    for it in prompts:
        name = shapes.combination(truth_of(it))
        assert (name in trained) == (it.group == "seen")
        assert (name in held) >= (it.group == "unseen")


@pytest.mark.parametrize("blocks", [4, 8, 16, 20])
def test_blocks_hold_both_groups_however_they_are_dealt(manifest, blocks):
    seen = [it.group == "seen" for it in shape_prompts(manifest, 320)]
    size = len(seen) // blocks
    for block in range(blocks):
        assert sum(seen[block * size : (block + 1) * size]) == size // 2
        assert abs(sum(seen[block::blocks]) - size / 2) <= 0.2 * size


def test_no_wording_is_one_of_training(manifest):
    trained = {caption for row in rows(manifest, "train") for caption in row["captions"]}
    prompts = shape_prompts(manifest, 100)
    assert not trained & {it.text for it in prompts}
    assert len({it.text for it in prompts}) > 90


def test_a_prompt_says_what_its_truth_says(manifest):
    for it in shape_prompts(manifest, 20):
        assert truth_of(it)["colour"] in it.text
        assert all(
            judge(shapes.draw(shapes.scene_of(truth_of(it), 0, 0), 32), truth_of(it)).values()
        )


def test_prompts_are_a_function_of_data_and_seed(manifest):
    assert shape_prompts(manifest, 50, seed=1) == shape_prompts(manifest, 50, seed=1)
    assert digest(shape_prompts(manifest, 50, seed=1)) != digest(
        shape_prompts(manifest, 50, seed=2)
    )


def test_more_prompts_than_combinations_repeat_none_before_all_were_used(manifest):
    held = combinations(manifest, "heldout")
    asked = [it for it in shape_prompts(manifest, 4 * len(held) + 8) if it.group == "unseen"]
    names = [shapes.combination(truth_of(it)) for it in asked]
    assert set(names[: len(held)]) == held
    assert len(names) == 2 * len(held) + 4


def test_scenes_of_two_objects_and_sets_that_hold_nothing_out(tmp_path):
    pairs = shape_prompts(drawn(tmp_path / "pairs", objects=2, scenes=200), 12)
    assert [truth_of(it)["relation"].split()[0] in it.text for it in pairs] == [True] * 12
    whole = drawn(tmp_path / "whole", scenes=100, heldout_share=0.0)
    assert {it.group for it in shape_prompts(whole, 20)} == {"seen"}
    with pytest.raises(ValueError, match="held-out captions"):
        caption_prompts(whole, 20)


def test_two_objects_are_held_out_together_in_every_relation_and_on_every_ground(tmp_path):
    manifest = drawn(tmp_path / "pairs", objects=2, scenes=1500)
    trained, held = combinations(manifest, "train"), combinations(manifest, "heldout")
    assert not trained & held
    assert 0.07 < len(held) / len(trained | held) < 0.13
    assert len(trained | held) > 700
    truth = shapes.scene(3, 0, objects=2).truth()
    told = truth | {"objects": truth["objects"][::-1], "relation": "above", "background": "pink"}
    assert shapes.combination(told) == shapes.combination(truth)

    prompts = shape_prompts(manifest, 128)
    groups = {group: [it for it in prompts if it.group == group] for group in ("seen", "unseen")}
    assert {group: len(asked) for group, asked in groups.items()} == {"seen": 64, "unseen": 64}
    for group, pairs in (("seen", trained), ("unseen", held)):
        assert {shapes.combination(truth_of(it)) for it in groups[group]} <= pairs
        assert len({str(truth_of(it)) for it in groups[group]}) == 64
        assert {truth_of(it)["relation"] for it in groups[group]} == set(shapes.RELATIONS)


def test_wordings_of_two_objects_kept_for_evaluation_are_of_known_words():
    def words(wording):
        scenes = (shapes.scene(3, index, objects=2) for index in range(1500))
        said = (shapes.caption(it, 3, index, wording) for index, it in enumerate(scenes))
        return {word for text in said for word in text.replace(",", "").split()}

    assert words("heldout") <= words("training")


def test_captions_come_from_the_held_out_splits(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for index in range(120):
        (folder / f"{index}.png").write_bytes(picture(index))
        style = ("plain", "bright", "dark")[index % 3]
        lines.append(
            f'{{"file": "{index}.png", "caption": "thing {index // 3}", "style": "{style}"}}'
        )
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    manifest = ingest(
        [str(folder)],
        str(tmp_path / "set"),
        IngestRules(heldout_share=0.2, unseen_share=0.2, near_duplicates="keep"),
        Executor(kind="local"),
    ).manifest
    for split, group in (("heldout", "heldout"), ("unseen", "unseen_name")):
        captions = {caption for row in rows(manifest, split) for caption in row["captions"]}
        found = dataset_prompts(manifest, split, 1000)
        assert {it.text for it in found} == captions
        assert {it.group for it in found} == {group}
        assert len(found) == manifest.samples(split)
        assert dataset_prompts(manifest, split, 5, seed=1) == dataset_prompts(
            manifest, split, 5, seed=1
        )
    both = caption_prompts(manifest, 20)
    assert [it.group for it in both[:4]] == ["heldout", "unseen_name", "unseen_name", "heldout"]
    with pytest.raises(ValueError, match="split"):
        dataset_prompts(manifest, "train", 5)


def picture(index):
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(shapes.draw(shapes.scene(11, index), 16)).save(file, "PNG")
    return file.getvalue()


def test_a_set_without_drawn_scenes_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for index in range(20):
        (tmp_path / "in" / f"{index}.png").write_bytes(picture(index))
        (tmp_path / "in" / f"{index}.txt").write_text(f"a thing {index}")
    manifest = ingest(
        [str(tmp_path / "in")], str(tmp_path / "set"), IngestRules(), Executor(kind="local")
    ).manifest
    with pytest.raises(ValueError, match='kind "captions"'):
        shape_prompts(manifest, 20)
