"""What enters is checked where it enters, and the refusal says what was got and what was wanted."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from pipeline.schema import EncoderSpec, Encoding, Field, batch_fields, check, framing


def test_fields_say_what_fits():
    field = Field("float16", (None, 4))
    assert str(field) == "float16[rows, any, 4]"
    assert field.fits(np.zeros((3, 7, 4), np.float16))
    assert not field.fits(np.zeros((3, 7, 5), np.float16))
    assert not field.fits(np.zeros((3, 4), np.float16))
    assert not field.fits(np.zeros((3, 7, 4), np.float32))
    assert Field.of(np.zeros((3, 2, 4), np.uint8)) == Field("uint8", (2, 4))
    stored = json.loads(json.dumps({"dtype": "uint8", "shape": [2, 4]}))
    assert Field.from_json(stored) == Field("uint8", (2, 4))
    one, other = Field("uint8", (2, 4, 4)), Field("uint8", (2, 4, 6))
    assert Field.spanning([one]) == one
    assert Field.spanning([one, other]) == Field("uint8", (2, 4, None))
    with pytest.raises(ValueError, match=r"no field spans uint8\[rows, 2, 4, 4\], int8\[rows, 2\]"):
        Field.spanning([one, Field("int8", (2,))])


def test_text_encodings_give_tokens_mask_and_pooled():
    stored = {"tokens": Field("float16", (64,)), "pooled": Field("float16", (32,))}
    assert batch_fields("t5", "text", stored) == {
        "t5_tokens": Field("float16", (None, 64)),
        "t5_mask": Field("bool", (None,)),
        "t5_pooled": Field("float16", (32,)),
    }
    moments = {"moments": Field("float16", (8, 4, 4))}
    assert batch_fields("autoencoder", "image", moments) == moments


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, r"here: field x is missing \(found none\)"),
        ({"x": np.zeros((2, 3))}, r"x is float64\[2, 3\], wanted float32\[rows, 3\]"),
        ({"x": np.zeros((2, 4), "f4")}, r"x is float32\[2, 4\], wanted float32\[rows, 3\]"),
        ({"x": np.float32(1)}, r"x is float32\[\], wanted"),
        ({"x": np.zeros((5, 3), "f4")}, "x has 5 rows, wanted 2"),
    ],
)
def test_what_does_not_fit_is_refused(arrays, message):
    fields = {"x": Field("float32", (3,))}
    check("here", {"x": np.zeros((2, 3), "f4"), "other": np.zeros(1)}, fields, 2)
    with pytest.raises(ValueError, match=message):
        check("here", arrays, fields, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "Clip-L"}, "encoder name 'Clip-L': wanted a-z"),
        ({"kind": "sound"}, "kind must be 'image' or 'text', got 'sound'"),
        ({"fingerprint": "../x"}, "cannot name a directory"),
        ({"side": 64}, "an image encoder needs a side, a text encoder has none"),
        ({"kind": "image"}, "an image encoder needs a side"),
        ({"flip": True}, "buckets and flip are for pictures, not for text"),
        ({"buckets": [(8, 8)]}, "buckets and flip are for pictures, not for text"),
        (
            {"kind": "image", "side": 8, "buckets": [(8, 0), (0, 8)]},
            r"got 2: \(\(8, 0\), \(0, 8\)\)",
        ),
        ({"kind": "image", "side": 8, "buckets": [(8, n) for n in range(1, 300)]}, "got 299"),
    ],
)
def test_specs_are_checked(wrong, message):
    right = {"name": "clip", "kind": "text", "fingerprint": "0a1b", "options": {"batch": 8}}
    spec = EncoderSpec(**right)
    assert EncoderSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    with pytest.raises(ValueError, match=message):
        EncoderSpec(**right | wrong)


def test_buckets_survive_json_and_the_square_alone_is_none():
    spec = EncoderSpec("vae", "image", "0a1b", side=8, buckets=((8, 8), (16, 4), (8, 8)), flip=True)
    assert spec.buckets == spec.sizes == ((8, 8), (16, 4))
    assert EncoderSpec(**json.loads(json.dumps(asdict(spec)))) == spec
    square = EncoderSpec("vae", "image", "0a1b", side=8)
    assert EncoderSpec("vae", "image", "0a1b", side=8, buckets=((8, 8),)) == square
    assert square.sizes == ((8, 8),)
    assert EncoderSpec("t5", "text", "0a1b").sizes == ()


def test_only_what_is_not_the_default_adds_to_an_identity():
    assert framing(8) == framing(8, ((8, 8),)) == framing(None) == {}
    assert framing(8, ((8, 8), (16, 4)), True) == {"buckets": [[8, 8], [16, 4]], "flip": True}


def test_an_encoding_lies_under_its_fingerprint():
    encoding = Encoding.at("memory://heap/data", "t5", "text", "0a1b")
    assert encoding == Encoding("t5", "text", "0a1b", "memory://heap/data/encodings/0a1b")
    assert encoding.arrays_url("train-1") == f"{encoding.url}/train-1.safetensors"
    assert encoding.arrays_url("train-1", (16, 8)) == f"{encoding.url}/train-1.16x8.safetensors"
    assert encoding.stated_url((16, 8)) == f"{encoding.url}/encoder.16x8.json"
