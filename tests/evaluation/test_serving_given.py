"""A service is told more than prompts: the picture to enlarge and a class, by columns; or the
picture to edit.
"""

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation import serving
from tests.evaluation.conftest import untrained

COLOURS = ["red", "blue"]
CLIP = {
    "embed": 24,
    "image": {"kind": "vit", "side": 16, "patch": 4, "width": 32, "layers": 1},
    "text": {"vocabulary": 1024, "context": 40, "width": 32, "layers": 1, "heads": 2},
}
BASE = {
    "data": "pixels",
    "low": {"side": 8, "strongest": 0.5},
    "attributes": [{"name": "colour", "answers": COLOURS}],
    "network": {
        "kind": "unet", "channels": 16, "channel_mult": [1], "attention": [1], "head_width": 16,
        "context_width": 32, "blocks": 1, "patch": 2,
    },
}  # fmt: skip


SYNTHESIS = {
    "data": "pixels",
    "listens": [],
    "map": {"palette": [["night", [0, 0, 0]], ["dusk", [120, 60, 90]], ["day", [255, 255, 255]]]},
    "network": BASE["network"],
}

PLAIN = {"data": "pixels", "network": BASE["network"]}
EDIT = {"network": {**BASE["network"], "in_channels": 3}, "inversion_steps": 3, "steps": 2}


def loud(stage: Any) -> None:
    import torch

    # Else it draws 0; and an edit would be its base.
    torch.nn.init.normal_(stage.network.out.weight, std=0.2 if stage.kind == "edit" else 0.3)


def opened(package: Path) -> serving.PackagedGenerator:
    it = serving.PackagedGenerator()
    it.load_context(SimpleNamespace(artifacts={"package": str(package)}, model_config={}))
    return it


@pytest.fixture(scope="module")
def packaged(tmp_path_factory) -> Path:
    """Real stages with random weights: a base that is told a text, a class and a picture."""
    from evaluation.packaging import package
    from training.assembling import assemble

    root = tmp_path_factory.mktemp("given")
    done = untrained(root, {"clip": CLIP, "base": BASE}, (3, 16, 16), loud)
    assemble(root / "generator", done, {"steps": 2, "guidance": 2.0})
    made = package(root / "generator", root / "packages", recipe={"name": "told"}, lineage={})
    return Path(made)


@pytest.fixture(scope="module")
def model(packaged):
    return opened(packaged)


@pytest.fixture(scope="module")
def synthesis(tmp_path_factory) -> Path:
    """A base that is told a label map and nothing else."""
    from evaluation.packaging import package
    from training.assembling import assemble

    root = tmp_path_factory.mktemp("maps")
    done = untrained(root, {"base": SYNTHESIS}, (3, 16, 16), loud)
    assemble(root / "generator", done, {"steps": 2})
    made = package(root / "generator", root / "packages", recipe={"name": "maps"}, lineage={})
    return Path(made)


@pytest.fixture(scope="module")
def editing(tmp_path_factory) -> Path:
    """A base that is told a text, and its edit."""
    from evaluation.packaging import package
    from training.assembling import assemble

    root = tmp_path_factory.mktemp("edits")
    done = untrained(root, {"clip": CLIP, "base": PLAIN, "edit": EDIT}, (3, 16, 16), loud)
    assemble(root / "generator", done, {"steps": 2, "guidance": 2.0})
    made = package(root / "generator", root / "packages", recipe={"name": "edits"}, lineage={})
    return Path(made)


@pytest.fixture(scope="module")
def shown() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (2, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def maps() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, (2, 16, 16), np.uint8)


@pytest.fixture(scope="module")
def low() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


def png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def pixels(files: list[bytes]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(it))) for it in files])


def test_a_row_tells_prompt_class_and_picture_in_every_form(model, low):
    prompts, colours = ["a ring", "a cross"], ["blue", None]
    labels = [{"colour": "blue"}, {}]
    wanted = model.generator(prompts, seed=5, low=low, labels=labels)
    files = [png(it) for it in low]
    texts = [base64.b64encode(it).decode() for it in files]
    columns = {"prompt": prompts, "colour": colours, "low": files}
    coded = columns | {"low": texts}
    rows = [dict(zip(coded, row, strict=True)) for row in zip(*coded.values(), strict=True)]
    for asked in (pd.DataFrame(columns), columns, coded, rows, pd.DataFrame([coded])):
        drawn = pixels(model.predict(None, asked, {"seed": 5}))
        np.testing.assert_array_equal(drawn, wanted)
    alone = model.predict(None, {"low": texts[0]}, {"level": 0.4})
    there = model.generator([""], low=low[:1], level=0.4)
    np.testing.assert_array_equal(pixels(alone), there)
    assert (there != model.generator([""], low=low[:1])).any()


def test_what_is_transparent_lies_on_white(model, low):
    clear = np.concatenate([low[0], np.zeros((8, 8, 1), np.uint8)], -1)
    drawn = model.predict(None, {"low": png(clear)}, {})
    white = np.full((1, 8, 8, 3), 255, np.uint8)
    np.testing.assert_array_equal(pixels(drawn), model.generator([""], low=white))


def test_what_a_row_lacks_or_has_too_much_is_named(model, low):
    file = png(low[0])
    for asked, said in [
        (["a ring"], "column low: wanted a PNG file of 8 x 8 pixels in each row"),
        ({"low": file, "color": "red"}, "no column color is known; there are prompt, colour, low"),
        ({"low": png(low[0, :4])}, "column low, row 0: got 8 x 4 pixels, wanted 8 x 8"),
        ({"low": "nonsense"}, "column low, row 0: wanted a PNG file, or its base64"),
        ({"low": [file, None]}, "column low, row 1: wanted a PNG file, or its base64"),
        ({"low": b"GIF89a" + file}, "row 0: wanted a PNG file"),
        ({"low": file[:-30]}, "row 0: a PNG file that is broken"),
        ({"low": file, "colour": "mauve"}, "colour 'mauve' is none of red, blue"),
    ]:
        with pytest.raises(ValueError, match=said):
            model.predict(None, asked, {})


def test_the_card_says_what_to_give(packaged):
    page = (packaged / "README.md").read_text()
    row = '[{"prompt": "a red circle", "colour": "red", "low": open("small.png", "rb").read()}]'
    assert f"rows = pd.DataFrame({row})" in page
    assert "- `colour`: one of red, blue." in page
    assert "8 x 8 pixels" in page


def test_a_row_tells_a_label_map(synthesis, maps):
    from evaluation.packaging import example
    from training.generator import Generator

    model = opened(synthesis)
    given = json.loads((synthesis / "manifest.json").read_text())["given"]
    assert given == {"map": {"classes": ["night", "dusk", "day"], "side": 16}, "text": False}
    assert example(given) == {"map": "BASE64 OF A PNG FILE"}
    wanted = Generator.load(synthesis / "generator", "cpu")([""] * 2, seed=5, map=maps)
    assert (wanted[0] != wanted[1]).any()
    coloured = Image.fromarray(maps[1])
    coloured.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    file = io.BytesIO()
    coloured.save(file, "PNG")
    files = [png(maps[0]), file.getvalue()]
    coded = {"map": [base64.b64encode(it).decode() for it in files]}
    for asked in (pd.DataFrame({"map": files}), coded):
        drawn = pixels(model.predict(None, asked, {"seed": 5}))
        np.testing.assert_array_equal(drawn, wanted)
    for asked, said in [
        ({"prompt": ["a"]}, "column map: wanted a PNG file of 16 x 16 pixels in each row"),
        ({"map": png(maps[0, :8])}, "column map, row 0: got 16 x 8 pixels, wanted 16 x 16"),
        ({"map": png(wanted[0])}, "column map, row 0: got colours of mode RGB, wanted indices"),
        ({"map": [files[0], "x"]}, "column map, row 1: wanted a PNG file, or its base64"),
        ({"map": png(maps[0] + 1)}, r"map\[0\]: got index 3, wanted 0 to 2: night, dusk, day"),
        ({"map": files[0], "low": files[0]}, "no column low is known; there are prompt, map"),
    ]:
        with pytest.raises(ValueError, match=said):
            model.predict(None, asked, {})
    page = (synthesis / "README.md").read_text()
    assert 'rows = pd.DataFrame([{"map": open("map.png", "rb").read()}])' in page
    assert "which class each pixel is to have: 0 night, 1 dusk, 2 day;" in page


def test_pictures_are_edited_in_every_form(editing, shown):
    model = opened(editing)
    wanted = model.generator.edit(shown)
    assert (wanted != model.generator.edit(shown, edited=False)).any()
    files = [png(it) for it in shown]
    coded = [base64.b64encode(it).decode() for it in files]
    rows = [{"prompt": "", "picture": it} for it in coded]
    for asked in (
        pd.DataFrame({"picture": files}), {"picture": files}, {"picture": coded}, rows,
        pd.DataFrame([{"picture": coded}]), pd.DataFrame({"prompt": [None] * 2, "picture": files}),
    ):  # fmt: skip
        np.testing.assert_array_equal(pixels(model.predict(None, asked, {"seed": 5})), wanted)
    options = {"noise": 0.4, "inversion_steps": 5, "steps": 3, "edited": False}
    alone = model.predict(None, {"picture": coded[0]}, {"options": json.dumps(options)})
    there = model.generator.edit(shown[:1], **options)
    np.testing.assert_array_equal(pixels(alone), there)
    assert model.predict(None, pd.DataFrame({"picture": files[:0]}), {}) == []

    drawn = model.generator(["a", "b"], seed=3)
    blank = {"prompt": ["a", "b"], "picture": [None, ""]}
    for asked in (["a", "b"], {"prompt": ["a", "b"]}, blank, pd.DataFrame(blank)):
        np.testing.assert_array_equal(pixels(model.predict(None, asked, {"seed": 3})), drawn)


@pytest.mark.parametrize(
    ("more", "params", "said"),
    [
        ({"picture": "nonsense"}, {}, "column picture, row 0: wanted a PNG file, or its base64"),
        ({"picture": ""}, {}, "column picture, row 0: wanted a PNG file, or its base64"),
        ({"picture": ["FILE", None]}, {}, "column picture, row 1: wanted a PNG file"),
        ({"picture": "BROKEN"}, {}, "column picture, row 0: a PNG file that is broken"),
        ({"picture": "SMALL"}, {}, "column picture, row 0: got 16 x 8 pixels, wanted 16 x 16"),
        ({"prompt": "a"}, {}, "column prompt: an edit is told nothing but the picture"),
        ({"low": "a"}, {}, "no column low is known; there are prompt, picture"),
        ({}, {"steps": 9}, "steps: it is of what is drawn from prompts; an edit is told how by"),
        ({}, {"guidance": 4.0}, "guidance: it is of what is drawn from prompts"),
        ({}, {"negative_prompt": "red"}, "negative_prompt: it is of what is drawn from prompts"),
        ({}, {"options": '{"sampler": "ddim"}'}, "edit: it has no sampler; it has noise, inver"),
        ({}, {"options": '{"noise": 0}'}, r"noise: got 0.0, wanted a time above 0"),
        ({}, {"options": '{"steps": 2.5}'}, r"edit.steps: got 2.5, wanted int"),
        ({}, {"options": '{"edited": "no"}'}, "edited: got 'no', wanted True or False"),
        ({}, {"options": '{"pictures": 1}'}, "options: pictures is none of them"),
        ({}, {"options": "[]"}, 'wanted a JSON object such as {"noise": 0.5'),
    ],
)
def test_what_an_edit_cannot_be_told_is_named(editing, shown, more, params, said):
    file = png(shown[0])
    files = {"FILE": file, "BROKEN": file[:-30], "SMALL": png(shown[0, :8])}

    def real(it):
        return [real(one) for one in it] if isinstance(it, list) else files.get(it, it)

    asked = {name: real(it) for name, it in ({"picture": "FILE"} | more).items()}
    with pytest.raises(ValueError, match=said):
        opened(editing).predict(None, asked, params)


def test_models_without_an_edit_say_so(packaged, synthesis, make, shown):
    file = base64.b64encode(png(shown[0])).decode()
    refused = "column picture: this model edits no picture, as it has no edit stage"
    for package in (packaged, synthesis, make()):
        model = opened(package)
        for asked in (
            pd.DataFrame([{"picture": file}]), {"picture": file}, [{"picture": file}],
            {"prompt": ["a"], "picture": [file]},
        ):  # fmt: skip
            with pytest.raises(ValueError, match=refused):
                model.predict(None, asked, {})


def test_an_editing_model_says_what_to_give(editing):
    from evaluation.packaging import example

    given = json.loads((editing / "manifest.json").read_text())["given"]
    assert given == {"edit": {"side": 16, "source": "red", "target": "blue"}, "text": True}
    assert example(given) == {"prompt": "a red circle"}
    page = (editing / "README.md").read_text()
    assert 'rows = pd.DataFrame([{"prompt": "a red circle"}])' in page
    assert 'rows = pd.DataFrame([{"picture": open("picture.png", "rb").read()}])' in page
    assert "what is red there becomes blue" in page


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """A function that registers a package as a model's first version: (what MLflow loads, the
    registry's address)."""
    import mlflow

    from evaluation import registry

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)

    def made(package, name):
        assert str(registry.register(package, name, tracking_uri=uri)) == "1"
        assert registry.facts(f"{name}/1", tracking_uri=uri, lineage=())["infra"] is True
        return mlflow.pyfunc.load_model(f"models:/{name}/1"), uri

    return made


@pytest.mark.slow
def test_mlflow_and_its_server_edit(editing, make, shown, registered):
    import mlflow
    from fastapi.testclient import TestClient
    from mlflow.exceptions import MlflowException

    from evaluation import registry

    served, uri = registered(editing, "edits")
    signature = served.metadata.signature
    assert signature.inputs.input_names() == ["prompt", "picture"]
    assert signature.inputs.required_input_names() == []
    generator = opened(editing).generator
    wanted, files = generator.edit(shown), [png(it) for it in shown]
    drawn = served.predict(pd.DataFrame({"picture": files}))
    np.testing.assert_array_equal(pixels(drawn), wanted)
    drawn = served.predict(pd.DataFrame({"prompt": ["a ring"]}), params={"seed": 3})
    np.testing.assert_array_equal(pixels(drawn), generator(["a ring"], seed=3))
    with pytest.raises(ValueError, match="wanted rows with a prompt or a picture, got neither"):
        served.predict(["a ring"])

    _, app, examples = registry.application("edits/1", tracking_uri=uri)
    assert [json.loads(it)["dataframe_records"] for it in examples] == [
        [{"prompt": "a red circle"}],
        [{"picture": "BASE64 OF A PNG FILE"}],
    ]
    client = TestClient(app)
    coded = [base64.b64encode(it).decode() for it in files]
    options = {"noise": 0.4, "steps": 3}
    chosen = generator.edit(shown, **options)
    rows = [{"picture": it} for it in coded]
    for body in (
        {"dataframe_records": rows},
        {"dataframe_split": {"columns": ["picture"], "data": [[it] for it in coded]}},
        {"inputs": {"picture": coded}},
    ):
        for params, there in (({}, wanted), ({"options": json.dumps(options)}, chosen)):
            answer = client.post("/invocations", json=body | {"params": params})
            assert answer.status_code == 200, answer.text
            found = pixels([base64.b64decode(it) for it in answer.json()["predictions"]])
            np.testing.assert_array_equal(found, there)
    alone = client.post("/invocations", json={"inputs": {"picture": coded[0]}})
    found = pixels([base64.b64decode(it) for it in alone.json()["predictions"]])
    np.testing.assert_array_equal(found, generator.edit(shown[:1]))
    answer = client.post("/invocations", json={"dataframe_records": rows, "params": {"steps": 9}})
    assert answer.status_code == 400 and "an edit is told how by options" in answer.text

    version = registry.register(make(), "plain", tracking_uri=uri)
    app = registry.application(f"plain/{version}", tracking_uri=uri)[1]
    answer = TestClient(app).post("/invocations", json={"dataframe_records": rows})
    assert answer.status_code == 400 and "this model edits no picture" in answer.text
    with pytest.raises((ValueError, MlflowException), match="this model edits no picture"):
        mlflow.pyfunc.load_model(f"models:/plain/{version}").predict(pd.DataFrame(rows))


@pytest.mark.slow
def test_mlflow_takes_label_maps(synthesis, maps, registered):
    served, _ = registered(synthesis, "maps")
    wanted = opened(synthesis).generator([""], seed=3, map=maps[:1])
    drawn = served.predict(pd.DataFrame([{"map": png(maps[0])}]), params={"seed": 3})
    np.testing.assert_array_equal(pixels(drawn), wanted)


@pytest.mark.slow
def test_mlflow_and_its_server_take_what_the_generator_takes(packaged, model, low, registered):
    from fastapi.testclient import TestClient
    from mlflow.exceptions import MlflowException

    from evaluation import registry

    served, uri = registered(packaged, "told")
    row = {"prompt": "a ring", "colour": "blue", "low": png(low[0])}
    wanted = model.generator(["a ring"], seed=3, low=low[:1], labels=[{"colour": "blue"}])
    drawn = served.predict(pd.DataFrame([row]), params={"seed": 3})
    np.testing.assert_array_equal(pixels(drawn), wanted)
    plain = model.generator(["a ring"], seed=3, low=low[:1], level=0.25)
    del row["colour"]
    drawn = served.predict(pd.DataFrame([row]), params={"seed": 3, "level": 0.25})
    np.testing.assert_array_equal(pixels(drawn), plain)
    with pytest.raises(MlflowException, match="missing inputs"):
        served.predict(["a ring"])

    name, app, (example,) = registry.application("told/1", tracking_uri=uri)
    assert name == "told/1"
    record = json.loads(example)["dataframe_records"][0]
    assert record == {
        "prompt": "a red circle", "colour": "red", "low": "BASE64 OF A PNG FILE",
    }  # fmt: skip
    client = TestClient(app)
    texts = [base64.b64encode(png(it)).decode() for it in low]
    both = model.generator(["a", "b"], seed=3, low=low, labels=[{"colour": "red"}, {}])
    columns = {"prompt": ["a", "b"], "colour": ["red", ""], "low": texts}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for body in ({"dataframe_records": rows}, {"inputs": columns}):
        answer = client.post("/invocations", json=body | {"params": {"seed": 3}})
        assert answer.status_code == 200, answer.text
        files = [base64.b64decode(it) for it in answer.json()["predictions"]]
        np.testing.assert_array_equal(pixels(files), both)
    wrong = rows[0] | {"low": texts[0][:40]}
    answer = client.post("/invocations", json={"dataframe_records": [wrong]})
    assert answer.status_code == 400
