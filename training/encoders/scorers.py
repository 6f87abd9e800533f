"""Scorers of stored samples for `pipeline.score`: CLIP, heads on CLIP's embedding, classifiers.

Weights come by path or hub id, safetensors only. Pictures come cropped to the centre and resized
(Lanczos) to the side a model sees: a model whose own preparation squashes or pads them sees a
little less of their edges than it would.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline import storage
from pipeline.manifest import fingerprint
from pipeline.score import Scorer, ScorerSpec, check_name

from .clip import Towers
from .shapes import clip_shape
from .sources import Source, fetch, files, open_source

__all__ = [
    "ClipHeadConfig",
    "ClipSimilarityConfig",
    "ImageClassifierConfig",
    "ScorerConfig",
    "build",
    "config_of",
    "spec_of",
]

VERSIONS = {"clip_similarity": 1, "clip_head": 1, "image_classifier": 1}
"""Raised by hand when the code of a kind gives other numbers."""


@dataclass(frozen=True, kw_only=True)
class ClipSimilarityConfig:
    """Cosine, in [-1, 1], of a picture and its first caption."""

    kind: Literal["clip_similarity"] = "clip_similarity"
    name: str = "clip_similarity"
    clip: str
    """A CLIP stage's directory, or a folder or hub id with a CLIP of open_clip."""

    def __post_init__(self):
        check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class ClipHeadConfig:
    """What a few linear layers say of a picture's normalised CLIP embedding.

    Read are the weights of LAION's heads, saved as safetensors under the names they have: the
    aesthetic predictors ("weight" and "bias", or "layers.0.weight" and so on, which were trained
    without activations) and the NSFW detectors ("linear_1.weight" and so on after "norm.mean" and
    "norm.variance"; activation "relu", output "sigmoid", but "linear" for H/14). Layers go by
    their numbers; numbers inside a Sequential ("layers.6", "layers.7") that follow each other
    leave no room for an activation between them.
    """

    kind: Literal["clip_head"] = "clip_head"
    name: str
    clip: str
    """The CLIP that the head was trained on, as in `clip_similarity`."""
    head: str
    """A safetensors file, or a folder or hub id with just one."""
    activation: Literal["none", "relu"] = "none"
    output: Literal["linear", "sigmoid"] = "linear"

    def __post_init__(self):
        check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class ImageClassifierConfig:
    """The probability of one label by a transformers image classifier."""

    kind: Literal["image_classifier"] = "image_classifier"
    name: str
    model: str
    """A folder or hub id, with preprocessor_config.json."""
    label: str
    """As in its config's id2label."""

    def __post_init__(self):
        check_name(self.name)


ScorerConfig = ClipSimilarityConfig | ClipHeadConfig | ImageClassifierConfig


def config_of(config: Mapping[str, Any], where: str = "scorer") -> ScorerConfig:
    """A scorer's config from JSON; ValueError as `stages.reconstruct` says."""
    from ..stages import reconstruct

    union: Any = ScorerConfig
    return reconstruct(union, config, where)


def spec_of(config: ScorerConfig) -> ScorerSpec:
    """The scorer of a config. ValueError when its weights are missing or of another kind."""
    places = {"clip", "head", "model"} & asdict(config).keys()
    config = replace(config, **{place: _placed(getattr(config, place)) for place in places})
    said = {name: value for name, value in asdict(config).items() if name not in places}
    source = _source(config)
    identity = {
        **said,
        "version": VERSIONS[config.kind],
        "weights": source.weights_sha256(),
        "config": source.config(),
        "dtype": "float32",
    }
    if isinstance(config, ImageClassifierConfig):
        side = _Classifier(config, source).side
    else:
        side, width = clip_shape(source)
        if isinstance(config, ClipHeadConfig):
            file = _head_file(config.head)
            _head(file, config, width)
            identity["head"] = storage.sha256(file)
    identity["side"] = side
    return ScorerSpec(config.name, fingerprint(identity), (config.name,), asdict(config), side)


def build(spec: ScorerSpec) -> Scorer:
    """The scorer that a spec names, on a GPU where there is one: what `pipeline.score` is handed.

    ValueError when the weights are others.
    """
    config = config_of(spec.options, f"scorer {spec.name}")
    now = spec_of(config)
    if now.fingerprint != spec.fingerprint:
        raise ValueError(
            f"scorer {spec.name}: its weights or config are {now.fingerprint}, "
            f"the spec names {spec.fingerprint}; make a new spec, or put the old weights back"
        )
    source, device = _source(config), "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(config, ImageClassifierConfig):
        score = _Classifier(config, source).load(device)
    else:
        clip = _clip(source, device)
        if isinstance(config, ClipHeadConfig):
            head = _head(_head_file(config.head), config, clip_shape(source)[1])
            score = lambda pixels, _: head(clip.images(pixels).cpu())
        else:
            score = lambda pixels, texts: (clip.images(pixels) * clip.texts(texts)).sum(1)

    @torch.no_grad()
    def scorer(pixels: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
        return {config.name: score(pixels, captions).float().cpu().numpy()}

    return scorer


def _placed(where: str) -> str:
    """A local path as others find it who stand in another directory; all else as it is."""
    path, hash_, inside = where.partition("#")
    return storage.absolute(path) + hash_ + inside if Path(path).exists() else where


def _source(config: ScorerConfig) -> Source:
    if isinstance(config, ImageClassifierConfig):
        source = open_source(config.model, "image_classifier")
        if not source.pretrained:
            raise ValueError(
                f"scorer {config.name}: {config.model} is a stage of kind {source.family!r}, "
                "wanted a transformers image classifier"
            )
        return source
    source = open_source(config.clip, "clip")
    if source.family != "clip":
        raise ValueError(
            f"scorer {config.name}: {config.clip} is a stage of kind {source.family!r}, wanted clip"
        )
    return source


class _Shared:
    """A CLIP that several scorers show the same pictures in turn."""

    def __init__(self, source: Source, device: str):
        self.towers, self.device = Towers(source).to(device), device
        self.seen: tuple[np.ndarray, Tensor] | None = None

    def images(self, pixels: np.ndarray) -> Float[Tensor, "picture embed"]:
        """Of uint8 [n, 3, side, side]. The array it looked at last costs nothing."""
        if self.seen is None or self.seen[0] is not pixels:
            x = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
            self.seen = pixels, self.towers.images(x)
        return self.seen[1]

    def texts(self, captions: Sequence[str]) -> Float[Tensor, "text embed"]:
        return self.towers.texts(captions)


_CLIPS: WeakValueDictionary[tuple[Source, str, str], _Shared] = WeakValueDictionary()


def _clip(source: Source, device: str) -> _Shared:
    """One for all scorers of a process that look through it, while there is any."""
    key = source, source.weights_sha256(), device
    clip = _CLIPS.get(key)
    if clip is None:
        clip = _CLIPS[key] = _Shared(source, device)
    return clip


def _head_file(where: str) -> Path:
    if where.endswith(".safetensors"):
        try:
            file = storage.local_copy(where)
        except FileNotFoundError:
            file = Path(where)
        if not file.is_file():
            raise ValueError(f"head {where}: no such file")
        return file
    found = [file for file in files(fetch(where)) if file.suffix == ".safetensors"]
    if len(found) > 1:
        raise ValueError(
            f"head {where}: found {', '.join(file.name for file in found)}; name one of them"
        )
    return found[0]


def _head(
    file: Path, config: ClipHeadConfig, width: int
) -> Callable[[Float[Tensor, "picture embed"]], Float[Tensor, " picture"]]:
    """The head in a file, for embeddings of `width`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise ValueError(f"head {file}: not a safetensors file ({error})") from None
    centre = tensors.pop("norm.mean", torch.zeros(width)).flatten()
    spread = tensors.pop("norm.variance", torch.ones(width)).flatten().sqrt().clamp(min=1e-10)
    if {len(centre), len(spread)} != {width}:
        raise ValueError(
            f"head {file}: norm is of {len(centre)} and {len(spread)} numbers, the embedding of "
            f"{config.clip} has {width}"
        )
    names = sorted({name.rpartition(".")[0] for name in tensors}, key=_natural)
    layers: list[tuple[Tensor, Tensor]] = []
    expected = width
    for name in names:
        weight = tensors.pop(f"{name}.weight".lstrip("."), torch.empty(0))
        bias = tensors.pop(f"{name}.bias".lstrip("."), torch.zeros(len(weight)))
        if weight.ndim != 2 or weight.shape[1] != expected or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"head {file}: layer {name!r} has weight {list(weight.shape)} and bias "
                f"{list(bias.shape)}, wanted those of a Linear from {expected}"
                + (f" (the embedding of {config.clip})" if not layers else "")
            )
        layers.append((weight, bias))
        expected = len(weight)
    if tensors or not layers or expected != 1:
        raise ValueError(
            f"head {file}: wanted the weights and biases of Linear layers that end in one number, "
            f"got layers {', '.join(names) or 'none'} that end in {expected}"
            + (f", and {', '.join(tensors)}" if tensors else "")
        )
    relu = config.activation == "relu"
    activated = [*(relu and _room(*pair) for pair in pairwise(names)), False]

    def head(x: Tensor) -> Tensor:
        x = (x - centre) / spread
        for (weight, bias), active in zip(layers, activated, strict=True):
            x = F.linear(x, weight, bias)
            x = x.relu() if active else x
        return (x.sigmoid() if config.output == "sigmoid" else x)[:, 0]

    return head


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(it), "") if it.isdigit() else (0, it) for it in re.split(r"(\d+)", name)]


def _room(name: str, after: str) -> bool:
    """Whether an activation may stand between two layers."""
    places = [re.fullmatch(r"(?:.*\.)?(\d+)", it) for it in (name, after)]
    if not all(places):
        return True
    first, second = (int(place[1]) for place in places if place)
    return second - first > 1


class _Classifier:
    """A transformers image classifier; its config and preparation are read at once, its weights
    by `load`.
    """

    def __init__(self, config: ImageClassifierConfig, source: Source):
        from transformers import AutoConfig, AutoImageProcessor

        self.directory = str(source.directory())
        self.described: Any = self._read("config", AutoConfig.from_pretrained)
        # The preparation in PIL gives the same numbers with and without torchvision.
        self.processor: Any = self._read(
            "image processor", AutoImageProcessor.from_pretrained, backend="pil"
        )
        labels = self.described.id2label
        found = [int(number) for number, label in labels.items() if label == config.label]
        if not found:
            raise ValueError(
                f"scorer {config.name}: {config.model} knows no label {config.label!r} "
                f"(known: {', '.join(map(str, labels.values()))})"
            )
        self.column, self.side = found[0], self._side()

    def load(self, device: str) -> Callable[[np.ndarray, Sequence[str]], Tensor]:
        from transformers import AutoModelForImageClassification

        loaded: Any = self._read(
            "image classifier",
            AutoModelForImageClassification.from_pretrained,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        model, info = loaded
        if missing := sorted(info["missing_keys"]):  # they would be random numbers
            raise ValueError(
                f"{self.directory}: its weights lack {', '.join(missing[:4])}; wanted a model that "
                "was trained to classify"
            )
        model = model.to(device).eval().requires_grad_(False)
        # As transformers' own pipeline: labels that do not exclude each other have sigmoids.
        single = len(self.described.id2label) > 1
        single &= self.described.problem_type != "multi_label_classification"

        def score(pixels: np.ndarray, captions: Sequence[str]) -> Tensor:
            from PIL import Image

            pictures = [Image.fromarray(picture.transpose(1, 2, 0)) for picture in pixels]
            given = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
            logits = model(pixel_values=given.to(device)).logits.float()
            return (logits.softmax(-1) if single else logits.sigmoid())[:, self.column]

        return score

    def _read(self, what: str, read: Callable[..., Any], **options: Any) -> Any:
        try:
            return read(self.directory, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{self.directory}: transformers reads no {what} there ({reason})"
            ) from None

    def _side(self) -> int:
        """What the model's own preparation resizes the shorter side to, in pixels."""
        processor = self.processor
        size = processor.size if processor.do_resize else getattr(processor, "crop_size", None)
        edges = [dict(size or {}).get(name) or 0 for name in ("shortest_edge", "height", "width")]
        if not any(edges):
            raise ValueError(
                f"{self.directory}: wanted preprocessor_config.json to say a shortest_edge or "
                f"height and width, got size {size}"
            )
        crop = getattr(processor, "crop_pct", None)  # ConvNext's: resized beyond, then cropped
        return int(max(edges) / crop) if crop and max(edges) < 384 else max(edges)
