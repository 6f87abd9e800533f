"""A tiny line, really trained for a few updates: scenes -> autoencoder, clip, t5 -> base."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SIDE = 16

CONFIGS: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "network": {"channels": 8, "channel_mult": [1, 2], "latent_channels": 3},
        "measured_pictures": 64,
    },
    "clip": {
        "embed": 24,
        "image": {"kind": "vit", "side": SIDE, "patch": 4, "width": 32, "layers": 1},
        "text": {"vocabulary": 1024, "context": 40, "width": 32, "layers": 1, "heads": 2},
    },
    "t5": {
        "width": 32,
        "layers": 1,
        "heads": 2,
        "feedforward": 64,
        "max_bytes": 96,
        "mean_span": 5.0,
    },
    "base": {
        "network": {
            "kind": "unet",
            "channels": 16,
            "channel_mult": [1],
            "attention": [1],
            "head_width": 16,
            "context_width": 32,
            "blocks": 1,
        },
        "preview": {"steps": 2},
    },
    "classifier": {
        "network": {
            "in_channels": 3,
            "channels": 16,
            "channel_mult": [1],
            "attention": [1],
            "head_width": 16,
            "blocks": 1,
            "patch": 2,
        }
    },
}
CONFIGS["noisy_clip"] = {
    **CONFIGS["classifier"],
    "embed": 32,
    "text": {"context": 24, "vocabulary": 600, "width": 32, "layers": 1, "heads": 2},
}
CONFIGS["edit"] = {"inversion_steps": 4, "steps": 2}
IMAGES = {
    "autoencoder": 480, "clip": 800, "t5": 320, "base": 480, "classifier": 480, "noisy_clip": 1600,
    "edit": 160,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Where the tiny line's results are."""

    root: Path
    data: Any
    """Manifest: 64 training and 16 held-out scenes."""
    stages: dict[str, str]
    """Stage name -> its finished directory. The edit's inputs are `clip` and `pixel_base`."""
    specs: list[Any]
    """The encoders that the base learned from."""

    @property
    def pixel_base(self) -> str:
        """A base that denoises the pictures themselves."""
        return str(self.root / "pixel-base")

    def loader(self, *encodings: str, batch: int = 16, splits=("train",)) -> Any:
        from pipeline.encode import pixels_spec
        from pipeline.load import Loader
        from pipeline.schema import Encoding

        chosen = [s for s in [pixels_spec(SIDE), *self.specs] if s.name in encodings]
        at = [Encoding.at(self.data.dataset, s.name, s.kind, s.fingerprint) for s in chosen]
        return Loader(self.data, at, splits=splits, global_batch=batch, seed=0)

    def history(self, name: str) -> list[dict[str, Any]]:
        from training import results

        return results.history(self.stages[name])


def truths(count: int, first: int = 0) -> list[dict[str, Any]]:
    """What the drawn scenes show."""
    from pipeline import shapes

    return [shapes.scene(5, index).truth() for index in range(first, first + count)]


def drawn(count: int, first: int = 0) -> tuple[np.ndarray, list[str]]:
    """(pixels uint8 [n, 3, SIDE, SIDE], captions) of drawn scenes."""
    from pipeline import shapes

    scenes = [shapes.scene(5, index) for index in range(first, first + count)]
    pixels = np.stack([shapes.draw(it, SIDE).transpose(2, 0, 1) for it in scenes])
    return pixels, [shapes.caption(it, 5, first + i) for i, it in enumerate(scenes)]


@pytest.fixture(scope="session")
def scenes():
    return drawn(32)


@pytest.fixture(scope="session")
def line(tmp_path_factory) -> Line:
    from pipeline import manifest
    from pipeline.encode import encode, pixels_spec
    from pipeline.execute import Executor
    from training import encoders
    from training.job import Job, run

    root = tmp_path_factory.mktemp("line")
    dataset = str(root / "data")
    made = tuple(
        shard(dataset, split, *drawn(n, first), truths(n, first)) for split, n, first in SPLITS
    )
    manifest.publish(manifest.Manifest(dataset, 1, None, made))
    data = manifest.read(dataset, 1)
    local = Executor(kind="local")
    pixels = pixels_spec(SIDE)
    encode(data, [pixels], None, local)

    stages: dict[str, str] = {}

    def train(kind: str, specs: list[Any], name: str = "", **config: Any) -> None:
        output = root / (name or kind)
        run(
            Job(
                kind=kind,
                fingerprint=output.name,
                config=CONFIGS[kind] | config,
                training={
                    "images": IMAGES[kind], "batch": 16, "learning_rate": 3e-3, "log_images": 80,
                    "checkpoint_images": 10_000, "ema_halflife_images": 20,
                },
                dataset=dataset,
                version=1,
                encodings=tuple(
                    {"name": s.name, "kind": s.kind, "fingerprint": s.fingerprint} for s in specs
                ),
                inputs=dict(stages),
                output=str(output),
            )
        )  # fmt: skip
        stages[name or kind] = str(output)

    train("autoencoder", [pixels])
    inputs, stages = stages, {}
    train("clip", [pixels])
    train("t5", [])
    stages = {**inputs, **stages}
    specs = [
        encoders.spec_of(where, name, SIDE if name == "autoencoder" else None)
        for name, where in stages.items()
    ]
    encode(data, specs, encoders.build, local)
    train("base", specs)
    stages, inputs = {}, stages
    train("classifier", [pixels])
    train("noisy_clip", [pixels])
    stages, inputs = {n: inputs[n] for n in ("clip", "t5")}, {**inputs, **stages}
    train("base", [pixels, *specs[1:]], "pixel-base", data="pixels")
    stages = {"clip": inputs["clip"], "base": stages["pixel-base"]}
    train("edit", [pixels])
    stages = {**inputs, "edit": stages["edit"]}
    return Line(root, data, stages, specs)


@pytest.fixture(scope="module")
def ray(request):
    """Ray on two CPUs, whose workers know what the module of the tests defines."""
    import ray
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(request.module)  # workers cannot import tests
    ray.shutdown()  # the session of other folders' tests, where they ran before
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


SPLITS = (("train", 64, 0), ("heldout", 16, 64))


def shard(
    dataset: str,
    split: str,
    pixels: np.ndarray,
    captions: list[str],
    labels: list[dict[str, Any]],
) -> Any:
    from PIL import Image

    from pipeline.shards import ShardSample, write_shard

    rows = []
    for picture, caption, label in zip(pixels, captions, labels, strict=True):
        out = io.BytesIO()
        Image.fromarray(picture.transpose(1, 2, 0)).save(out, "PNG")
        key = hashlib.blake2b(out.getvalue(), digest_size=16).hexdigest()
        rows.append(ShardSample(key, out.getvalue(), "png", (caption,), {"label": label}))
    return write_shard(sorted(rows, key=lambda row: row.key), dataset, split)
