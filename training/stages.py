"""The kinds of stage by name, and the one place where JSON becomes their configs and modules.

config.json and weights.safetensors, in a stage directory or in a generator's folder, are all that
is needed to have a module back.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pipeline import storage

from .autoencoding import AutoencoderStage, AutoencoderStageConfig
from .classifying import ClassifierStage, ClassifierStageConfig
from .config import TrainingConfig
from .contrastive import ClipStage, ClipStageConfig
from .denoising import BaseStage, BaseStageConfig
from .denoising_text import T5Stage, T5StageConfig
from .diffusionclip import EditStage, EditStageConfig
from .noisy_contrastive import NoisyClipStage, NoisyClipStageConfig
from .results import CONFIG, WEIGHTS
from .stage import Stage, copy_exactly

CONFIGS: Mapping[str, type] = {
    "autoencoder": AutoencoderStageConfig,
    "clip": ClipStageConfig,
    "t5": T5StageConfig,
    "base": BaseStageConfig,
    "classifier": ClassifierStageConfig,
    "noisy_clip": NoisyClipStageConfig,
    "edit": EditStageConfig,
}
STAGES: Mapping[str, type[Stage]] = {
    "autoencoder": AutoencoderStage,
    "clip": ClipStage,
    "t5": T5Stage,
    "base": BaseStage,
    "classifier": ClassifierStage,
    "noisy_clip": NoisyClipStage,
    "edit": EditStage,
}

T = TypeVar("T")


def create(
    kind: str, config: Mapping[str, Any] | Any, inputs: Mapping[str, str] | None = None
) -> Stage:
    """A fresh stage from its config (dataclass or JSON) and the directories of earlier stages."""
    built = config if is_dataclass(config) else config_of(kind, config)
    make: Any = _known(STAGES, kind)
    return make(built, dict(inputs or {}))


def compares_rows(kind: str) -> bool:
    """Whether a stage of this kind does (see Stage); not so for kinds that are not known here."""
    return kind in STAGES and STAGES[kind].compares_rows


def load(stage_dir: str | Path) -> Stage:
    """A trained stage, frozen and in eval mode, from its directory alone.

    ValueError when config.json and weights.safetensors do not belong together.
    """
    from safetensors.torch import load_file

    directory = str(stage_dir)
    described = storage.read_json(storage.join(directory, CONFIG))
    stage = create(described["kind"], described["config"]).eval().requires_grad_(False)
    weights = storage.local_copy(storage.join(directory, WEIGHTS))
    copy_exactly(load_file(weights), stage.exported(), str(weights))
    return stage


def config_of(kind: str, config: Mapping[str, Any]) -> Any:
    """The config dataclass of a kind of stage, from JSON; ValueError as `reconstruct` says."""
    return reconstruct(_known(CONFIGS, kind), config, kind)


def training_of(training: Mapping[str, Any]) -> TrainingConfig:
    """How a stage is trained, from JSON; ValueError as `reconstruct` says."""
    return reconstruct(TrainingConfig, training, "training")


def _known(kinds: Mapping[str, T], kind: str) -> T:
    if kind not in kinds:
        raise ValueError(f"no stage of kind {kind!r}{_nearest(kind, kinds)}")
    return kinds[kind]


def reconstruct(kind: type[T], data: Any, where: str = "config") -> T:
    """A (nested) config dataclass from JSON: lists become tuples, `kind` tells unions apart.

    ValueError names the place (`base.network.channels`), what it got, and the nearest right key.
    """
    return _value(kind, data, where)


def _value(hint: Any, data: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return data
    if origin in (Union, types.UnionType):
        return _union(arguments, data, where)
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{where}: got {data!r}, wanted {' or '.join(map(repr, arguments))}")
        return data
    if origin is tuple:
        if not isinstance(data, (list, tuple)):
            raise ValueError(f"{where}: got {data!r}, wanted a list")
        if arguments[-1:] == (...,):
            arguments = (arguments[0],) * len(data)
        if len(arguments) != len(data):
            raise ValueError(f"{where}: got {len(data)} values, wanted {len(arguments)}: {data!r}")
        return tuple(
            _value(a, d, f"{where}[{i}]")
            for i, (a, d) in enumerate(zip(arguments, data, strict=True))
        )
    if isinstance(hint, type) and is_dataclass(hint):
        return data if isinstance(data, hint) else _dataclass(hint, data, where)
    if origin is dict and isinstance(data, Mapping):
        return {key: _value(arguments[1], it, f"{where}.{key}") for key, it in data.items()}
    if origin is not None:  # Mapping[str, X] and the like
        hint = origin
    if hint is float and type(data) is int:
        return float(data)
    if (type(data) is bool and hint is not bool) or not isinstance(data, hint):
        wanted = "nothing (null)" if hint is type(None) else hint.__name__
        raise ValueError(f"{where}: got {data!r}, wanted {wanted}")
    return data


def _union(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in choices:
        return None
    if isinstance(data, Mapping):
        configs = [c for c in choices if isinstance(c, type) and is_dataclass(c)]
        if not configs:  # as the mapping that is among them, else as what is wanted in its place
            wanted = [c for c in choices if get_origin(c) is dict]
            return _value((wanted or choices)[0], data, where)
        kinds = {k: c for c in configs for k in _kinds(c)}
        if "kind" not in data:  # the first one is the usual one
            return _value(configs[0], data, where)
        if data["kind"] not in kinds:
            near = _nearest(str(data["kind"]), kinds)
            raise ValueError(f"{where}.kind: got {data['kind']!r}{near}")
        return _value(kinds[data["kind"]], data, where)
    if any(type(data) is c for c in choices):
        return data
    refused = []
    for choice in choices:
        if choice is not type(None):
            try:
                return _value(choice, data, where)
            except ValueError as error:
                refused.append(str(error))
    raise ValueError(refused[0])


def _kinds(config: type) -> tuple[str, ...]:
    hint = get_type_hints(config).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else ()


def _dataclass(config: type, data: Any, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: got {data!r}, wanted the fields of {config.__name__}")
    hints, known = get_type_hints(config), {f.name: f for f in fields(config) if f.init}
    for key in data:
        if key not in known:
            raise ValueError(f"{where}: no key {key!r}{_nearest(str(key), known)}")
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(
                f"{where}: {name} is missing ({config.__name__} has no default for it)"
            )
    values = {key: _value(hints[key], data[key], f"{where}.{key}") for key in data}
    try:
        return config(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, 1, 0.5)
    listed = ", ".join(sorted(known))
    return f"; did you mean {near[0]!r}? (known: {listed})" if near else f" (known: {listed})"
