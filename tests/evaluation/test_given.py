"""What is told beside a prompt is of its own picture, and what keeps to it is measured so."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from evaluation import metrics
from evaluation.config import EvaluationConfig
from evaluation.given import (
    Given,
    asked_of,
    bicubic,
    drawn_for,
    held_out,
    read_maps,
    read_pictures,
    shrunk,
    truths_of,
)
from evaluation.prompts import Prompt, caption_prompts
from evaluation.report import ReportInputs, render
from evaluation.scorecard import score
from evaluation.shapes_oracle import ATTRIBUTES, judge_all
from pipeline import shapes
from pipeline.encode import encode, pixels_spec
from pipeline.execute import Executor
from pipeline.ingest import IngestRules, ingest
from pipeline.load import Loader
from pipeline.schema import Encoding


def prompts_of(count: int, objects: int = 1) -> list[Prompt]:
    scenes = [shapes.scene(0, i, objects) for i in range(count)]
    return [Prompt(f"{i}", "seen", it.truth()) for i, it in enumerate(scenes)]


PROMPTS = prompts_of(48)


def pictured(prompts):
    return drawn_for(prompts, 32, 7)


@pytest.mark.parametrize("objects", [1, 2])
def test_a_prompt_brings_a_scene_of_its_truth(objects):
    prompts = prompts_of(40, objects)
    drawn = drawn_for(prompts, 32, 7)
    assert judge_all(drawn, truths_of(prompts, ATTRIBUTES))["all"].all()
    np.testing.assert_array_equal(drawn, drawn_for(prompts, 32, 7))
    np.testing.assert_array_equal(drawn[:9], drawn_for(prompts[:9], 32, 7))
    assert (drawn != drawn_for(prompts, 32, 8)).any()


def test_a_caption_brings_its_held_out_picture(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), np.uint8)
    for index, pixels in enumerate(colours):
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"thing {index}")
    local = Executor(kind="local")
    rules = IngestRules(heldout_share=0.3, unseen_share=0.2, near_duplicates="keep")
    data = ingest([str(folder)], str(tmp_path / "set"), rules, local).manifest
    spec = pixels_spec(16)
    encode(data, [spec], None, local)
    at = [Encoding.at(data.dataset, spec.name, spec.kind, spec.fingerprint)]
    prompts = caption_prompts(data, 10)
    splits = tuple(it for it in ("heldout", "unseen") if data.split(it))
    found = held_out(prompts, Loader(data, at, splits=splits, global_batch=4, seed=0))
    wanted = np.stack([colours[int(it.text.split()[1])] for it in prompts])
    np.testing.assert_array_equal(found, wanted)
    train = Loader(data, at, splits=("train",), global_batch=4, seed=0)
    with pytest.raises(ValueError, match="10 prompts without a picture, 'thing"):
        held_out(prompts, train)


class Enlarger:
    """Enlarges by repeating pixels, or knows the real pictures."""

    low_side, reads_text = 16, False

    def __init__(self, knows: bool = False):
        self.knows = knows

    def __call__(self, prompts, *, low, guidance=None, steps=None, seed=0):
        if not self.knows:
            return low.repeat(2, 1).repeat(2, 2)
        return pictured(PROMPTS)[[int(it) for it in prompts]]


class Classy:
    """Is told colour and shape, and draws them right, somewhere on some ground."""

    reads_labels, reads_text = True, False

    def __init__(self):
        self.classes = {"colour": tuple(shapes.COLOURS), "shape": shapes.SHAPES}

    def __call__(self, prompts, *, labels, guidance=None, steps=None, seed=()):
        assert all(it.keys() == {"colour", "shape"} for it in labels)
        truths = [{**shapes.scene(3, s).truth(), **it} for it, s in zip(labels, seed, strict=True)]
        return np.stack([shapes.draw(shapes.scene_of(it, 1, 1), 32) for it in truths])


COLOURS = {**shapes.COLOURS, **shapes.BACKGROUNDS}


class Synthesis:
    """Is told label maps; draws each class in its colour, or all in one, or the real pictures."""

    reads_text = False
    map_classes = tuple(COLOURS)
    map_colours = np.array(list(COLOURS.values()), np.uint8)
    map_judge = "the model's palette", "0"

    def __init__(self, draws="colours"):
        self.draws = draws

    def mapped(self, pictures):
        away = pictures[..., None, :].astype(int) - self.map_colours
        return (away**2).sum(-1).argmin(-1).astype(np.uint8)

    def __call__(self, prompts, *, map, guidance=None, steps=None, seed=0):
        if self.draws == "real":
            return pictured(PROMPTS)[[int(it) for it in prompts]]
        return self.map_colours[map if self.draws == "colours" else np.zeros_like(map)]


class Thumbnails:
    def __init__(self):
        self.tuple_id = {"extractor": "thumbnails", "weights": "none", "resize": "to 8"}

    def images(self, pictures):
        small = shrunk(pictures, 8).reshape(len(pictures), -1) - 128
        return (small / np.linalg.norm(small, axis=1, keepdims=True)).astype(np.float32)

    def texts(self, captions):
        return self.images(pictured(PROMPTS))


def scored(painter, options=None, **more):
    config = EvaluationConfig(
        kind="shapes", prompts=48, guidance_scales=(1.0,), sweep_prompts=16, kid_block=16, blocks=8,
        options=options or {},
    )  # fmt: skip
    reference = np.stack([shapes.draw(shapes.scene(5, i), 32) for i in range(48)])
    return score(
        painter, config, prompts=PROMPTS, clip=Thumbnails(), reference=reference, **more
    )  # fmt: skip


def test_only_what_a_model_reads_is_told():
    assert Given.of(lambda prompts: None, PROMPTS) == Given()
    given = Given.of(Enlarger(), PROMPTS, pictured)
    assert given.labels is None
    assert given.low is not None
    assert np.abs(given.low - shrunk(pictured(PROMPTS), 16)).max() <= 0.5
    np.testing.assert_array_equal(given.options(slice(3, 5))["low"], given.low[3:5])
    with pytest.raises(ValueError, match="its prompts bring none"):
        Given.of(Enlarger(), PROMPTS)
    truths = [{"colour": it, "shape": "ring", "place": "centre"} for it in ("red", "mauve")]
    asked = [Prompt("x", "seen", it) for it in truths]
    told = Given.of(Classy(), asked).options()
    assert told == {"labels": [{"colour": "red", "shape": "ring"}, {}]}


def test_the_score_of_an_enlargement_is_known():
    plain, right = scored(Enlarger(), pictured=pictured), scored(Enlarger(True), pictured=pictured)
    real = pictured(PROMPTS)
    low = shrunk(real, 16).round().astype(np.uint8)
    for found in (plain, right):
        values = found.scorecard.values
        wanted = metrics.psnr(bicubic(low, 32), real).mean()
        assert values["psnr_bicubic"].value == pytest.approx(wanted)
        gain = values["psnr"].value - wanted
        assert values["psnr_gain"].value == pytest.approx(gain)
        assert found.scorecard.headline["psnr_gain"] == pytest.approx(gain)
        assert values["psnr"].basis.judge == "pixels"
    most = 10 * np.log10(255**2 * 12)
    assert right.per_prompt["psnr"].tolist() == pytest.approx([most] * 48)
    assert right.scorecard.headline["correct"] == 1.0
    assert (right.scorecard.values["psnr_gain"].low or 0) > 10
    assert plain.per_prompt["consistency"].tolist() == pytest.approx([most] * 48)
    assert plain.scorecard.headline["psnr"] < 35
    assert right.scorecard.headline["consistency"] > 50
    page = render(ReportInputs(name="enlarged", scored=plain))
    assert "PSNR of bicubic enlargement" in page
    assert "dB when enlarged bicubically" in page


class Stepwise(Enlarger):
    """In one step as bicubic enlargement does it; in more it draws the real pictures."""

    def __call__(self, prompts, *, low, guidance=None, steps=None, seed=0):
        self.knows = True
        return bicubic(low, 32) if steps == 1 else super().__call__(prompts, low=low)


def test_what_enlarges_without_a_word_is_swept_by_its_psnr():
    """The oracle cannot tell: it reads a bicubic enlargement rightly too."""
    found = scored(Stepwise(), pictured=pictured, options={"steps": (1, 2, 4)})
    (option,) = found.scorecard.options
    assert option.metric == "psnr"
    assert [row.values["correct"] for row in option.tried] == [1.0, 1.0, 1.0]
    assert found.scorecard.chosen == {"steps": 2}
    assert found.scorecard.sweep[0].scale == 1.0
    page = render(ReportInputs(name="enlarged", scored=found))
    assert "PSNR, in dB, by steps" in page


def test_a_map_is_that_of_the_prompts_picture():
    it = Synthesis()
    given = Given.of(it, PROMPTS, pictured)
    assert (given.low, given.labels) == (None, None)
    np.testing.assert_array_equal(given.real, pictured(PROMPTS))
    np.testing.assert_array_equal(given.map, it.mapped(pictured(PROMPTS)))
    np.testing.assert_array_equal(given.shown, it.map_colours[given.map])
    assert given.options(slice(3, 5)).keys() == {"map"}
    np.testing.assert_array_equal(given.options(slice(3, 5))["map"], given.map[3:5])
    with pytest.raises(ValueError, match="draws by the label maps of pictures, and its prompts br"):
        Given.of(it, PROMPTS)
    assert asked_of(it) == ATTRIBUTES


def test_agreement_with_a_map_is_known():
    """1 for the real pictures themselves, and for one colour alone its share of the maps."""
    maps = Synthesis().mapped(pictured(PROMPTS))
    chance = (np.roll(maps, -(1 + 48 // 3), 0) == maps).mean()
    for draws, wanted, shuffled in (
        ("real", 1.0, chance), ("colours", 1.0, chance), ("red", (maps == 0).mean(), None),
    ):  # fmt: skip
        found = scored(Synthesis(draws), pictured=pictured)
        values = found.scorecard.values
        assert values["map_agreement"].value == pytest.approx(wanted)
        assert found.scorecard.headline["map_agreement"] == pytest.approx(wanted)
        assert found.per_prompt["map_agreement"].shape == (48,)
        assert values["map_agreement"].basis.judge == "the model's palette"
        if shuffled is not None:
            assert values["map_agreement_shuffled"].value == pytest.approx(shuffled)
        assert {"psnr", "consistency", "map_agreement_real"}.isdisjoint(values)
    low, high = (values["map_agreement"].low, values["map_agreement"].high)
    assert low < values["map_agreement"].value < high
    page = render(ReportInputs(name="by maps", scored=found))
    assert "of pixels as the label map says" in page
    assert "Keeps to the label map" in page


def test_maps_are_compared_and_shown():
    from evaluation.comparison import Contender, compare
    from evaluation.comparison import render as compared

    contenders = [Contender(it, Synthesis(it)) for it in ("colours", "red")]
    drawn = compare(contenders, PROMPTS, seed=0, pictured=pictured)
    assert drawn[0].measures["map_agreement"].mean == 1.0
    assert "psnr" not in drawn[0].measures
    maps = Synthesis().mapped(pictured(PROMPTS))
    other = drawn[1].measures["map_agreement"]
    assert other.mean == pytest.approx((maps == 0).mean())
    assert other.against_first is not None
    assert other.against_first.mean == pytest.approx(other.mean - 1)
    page = compared("maps", drawn, PROMPTS)
    assert '<th scope="col">Given</th>' in page
    assert '<th scope="col">Keeps to the map</th>' in page
    assert "PSNR" not in page


def test_of_a_model_that_is_told_classes_alone_nothing_else_is_asked():
    whole = scored(Classy())
    found = whole.scorecard
    assert asked_of(Classy()) == found.asked == ("colour", "shape")
    assert found.headline["correct"] == 1.0
    assert found.attributes.keys() == {"colour", "shape"}
    assert found.values["correct"].basis.judge == "oracle, of colour, shape"
    page = render(ReportInputs(name="classes", scored=whole))
    assert 'class="miss"' not in page
    assert asked_of(Enlarger()) == asked_of(lambda prompts: None) == ATTRIBUTES


def test_bicubic_is_that_of_pillow():
    """Where nothing leaves the bytes: Pillow cuts it off between rows and columns too."""
    low = np.random.default_rng(0).integers(64, 192, (2, 8, 8, 3), np.uint8)
    there = [Image.fromarray(it).resize((32, 32), Image.Resampling.BICUBIC) for it in low]
    wanted = np.stack([np.asarray(it) for it in there]).astype(int)
    assert np.abs(bicubic(low, 32) - wanted).max() <= 1


def test_psnr_is_that_of_the_mean_squared_error():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    grey = np.stack([black[0], black[0] + 10])
    assert metrics.psnr(grey, black).tolist() == pytest.approx([58.922, 28.131], abs=1e-3)
    with pytest.raises(ValueError, match="each picture needs the one it is held to"):
        metrics.psnr(black, black[:1])


def test_pictures_to_enlarge_are_read_from_a_file_or_a_folder(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    for name in ("b.png", "a.webp"):
        Image.fromarray(picture).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("none")
    assert list(read_pictures(str(tmp_path), 8)) == ["a", "b"]
    np.testing.assert_array_equal(read_pictures(str(tmp_path / "b.png"), 8)["b"], picture)
    with pytest.raises(ValueError, match=r"a.webp: got 8 x 8 pixels, wanted 16 x 16"):
        read_pictures(str(tmp_path), 16)
    (tmp_path / "b.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="b.png: not_image"):
        read_pictures(str(tmp_path / "b.png"), 8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no picture there"):
        read_pictures(str(tmp_path / "empty"), 8)


def nibbles(values: np.ndarray) -> bytes:
    """A PNG file of 4 bits of grey a pixel."""
    rows = (values[:, ::2] << 4 | values[:, 1::2]).astype(np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", *values.shape[::-1], 4, 0, 0, 0, 0),
        b"IDAT": zlib.compress(data), b"IEND": b"",
    }  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(it)) + name + it + struct.pack(">I", zlib.crc32(name + it))
        for name, it in parts.items()
    )


def test_maps_are_read_as_the_indices_they_hold(tmp_path):
    indices = np.random.default_rng(0).integers(0, 5, (8, 8), np.uint8)
    Image.fromarray(indices).save(tmp_path / "grey.png")
    coloured = Image.fromarray(indices)
    coloured.putpalette(np.random.default_rng(1).integers(0, 256, 15, np.uint8).tobytes())
    coloured.save(tmp_path / "palette.png")
    names = ("sky", "sea", "sand", "rock", "tree")
    found = read_maps(str(tmp_path), 8, names)
    assert list(found) == ["grey", "palette"]
    for it in found.values():
        np.testing.assert_array_equal(it, indices)
    file = str(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_maps(file, 8, names)["grey"], indices)
    with pytest.raises(ValueError, match=r"grey.png: got 8 x 8 pixels, wanted 16 x 16"):
        read_maps(file, 16, names)
    with pytest.raises(ValueError, match=r"grey.png: got index 4, wanted 0 to 2: sky, sea, sand"):
        read_maps(file, 8, names[:3])
    (tmp_path / "grey.png").write_bytes(nibbles(indices))
    with pytest.raises(ValueError, match="mode L, wanted indices of classes, as 8 bits"):
        read_maps(file, 8, names)
    Image.fromarray(indices).convert("RGB").save(file)
    with pytest.raises(ValueError, match="mode RGB, wanted indices"):
        read_maps(file, 8, names)
    (tmp_path / "grey.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"grey.png: no PNG file, or a broken one"):
        read_maps(file, 8, names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no picture there \(.png\)"):
        read_maps(str(tmp_path / "empty"), 8, names)
