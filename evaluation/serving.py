"""A packaged generator as an MLflow model: prompts in, PNG files out; beside the prompts whatever
else its stages are told, or in their place the pictures that it edits.

MLflow copies this one file beside the package and runs it ("models from code") where darkroom is
not installed, so it imports nothing of darkroom. What it uses of the package it checks against the
manifest first; the package's code then runs from the checked bytes, under a name made of their
digest, so that two versions live in one process.
"""

import base64
import hashlib
import importlib
import importlib.abc
import importlib.util
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from pandas.api.types import is_list_like, is_scalar
from PIL import Image


def code_name(sources: Mapping[str, bytes]) -> str:
    """`darkroom_` and 12 hex characters that name these sources {path below the package:
    content}.
    """
    lines = (
        f"{hashlib.sha256(text).hexdigest()}  {path}\n" for path, text in sorted(sources.items())
    )
    return "darkroom_" + hashlib.sha256("".join(lines).encode()).hexdigest()[:12]


def verify(package: str | Path, manifest_sha256: str | None = None) -> dict[str, Any]:
    """The manifest of a package folder whose every file is as it was packaged.

    ValueError names the first file that is missing or changed; `manifest_sha256` covers the
    manifest itself.
    """
    package = Path(package)
    path = package / "manifest.json"
    _check(path, manifest_sha256)
    manifest = json.loads(path.read_bytes())
    for name, want in manifest["files"].items():
        _check(package / name, want)
    return manifest


def open_generator(
    package: str | Path, device: str | None = None, manifest_sha256: str | None = None
) -> Any:
    """The package's generator, loaded by the package's own code: `(prompts, *, negative, guidance,
    steps, seed, ...)` -> uint8 [n, H, W, 3]. ValueError names a file that is missing or changed."""
    package = Path(package)
    manifest = verify(package, manifest_sha256)
    name = manifest["code"]
    if name not in sys.modules:
        root = package / name
        listed = [file for file in manifest["files"] if file.startswith(f"{name}/")]
        sources = {file.partition("/")[2]: (package / file).read_bytes() for file in listed}
        if code_name(sources) != name:
            raise ValueError(
                f"{root}: this code is {code_name(sources)}; take the package anew from the "
                f"registry"
            )
        sys.meta_path.insert(0, _Sources(name, root, sources))
    module = importlib.import_module(f"{name}.training.generator")
    return module.Generator.load(str(package / "generator"), device=device)


def _check(path: Path, want: str | None) -> None:
    advice = "take the package anew from the registry, or roll back"
    if not path.is_file():
        raise ValueError(f"{path}: this file of the package is missing; {advice}")
    if want is not None:
        with path.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != want:
            raise ValueError(
                f"{path}: changed since it was packaged "
                f"(sha256 {got[:12]}, recorded {want[:12]}); {advice}"
            )


class _Sources(importlib.abc.MetaPathFinder, importlib.abc.ExecutionLoader):
    """Imports a package from sources in memory.

    Neither byte code that lies about nor a change on disk after the check can run.
    """

    def __init__(self, name: str, root: Path, sources: Mapping[str, bytes]) -> None:
        self.files: dict[str, tuple[str, str]] = {}
        for path, text in sources.items():
            parts = path.removesuffix(".py").split("/")
            module = ".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)])
            self.files[module] = (str(root / path), text.decode())

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname not in self.files:
            return None
        spec = importlib.util.spec_from_loader(fullname, self)
        assert spec is not None
        if spec.submodule_search_locations is not None:
            spec.submodule_search_locations = []  # what else lies in the folder is not packaged
        return spec

    def is_package(self, fullname: str) -> bool:
        return self.files[fullname][0].endswith("__init__.py")

    def get_source(self, fullname: str) -> str:
        return self.files[fullname][1]

    def get_filename(self, fullname: str) -> str:
        return self.files[fullname][0]


def _prompts(model_input: Any) -> list[str]:
    """The prompts in a table (column `prompt`, else its first), a list, a mapping or a string, in
    order.
    """
    if isinstance(model_input, pd.DataFrame):
        column = "prompt" if "prompt" in model_input else model_input.columns[0]
        model_input = model_input[column].tolist()
    elif isinstance(model_input, Mapping):
        model_input = model_input["prompt"]
    if isinstance(model_input, str):
        return [model_input]
    if not isinstance(model_input, Sequence):
        raise ValueError(
            f"expected prompts as strings, got {type(model_input).__name__}: {model_input!r:.80}"
        )
    return [prompt for entry in model_input for prompt in _prompts(entry)]


def _table(model_input: Any) -> pd.DataFrame:
    """One row a picture: a table, a mapping of lists, or a list of mappings or of prompts."""
    if isinstance(model_input, pd.DataFrame):
        table = model_input
    elif isinstance(model_input, str):
        table = pd.DataFrame({"prompt": [model_input]})
    elif isinstance(model_input, Mapping):
        many = any(is_list_like(it) for it in model_input.values())
        table = pd.DataFrame(dict(model_input) if many else [dict(model_input)])
    elif not isinstance(model_input, Sequence):
        raise ValueError(
            f"expected a table or rows, got {type(model_input).__name__}: {model_input!r:.80}"
        )
    elif all(isinstance(it, str) for it in model_input):
        table = pd.DataFrame({"prompt": list(model_input)})
    else:
        table = pd.DataFrame(list(model_input))
    # A mapping of lists may arrive as one row that holds them.
    listed = [name for name in table if any(is_list_like(it) for it in table[name])]
    return table.explode(listed, ignore_index=True) if listed else table


def _columns(model_input: Any) -> set[str]:
    """The names in a table, a mapping, or a list of rows."""
    if isinstance(model_input, pd.DataFrame):
        return {str(name) for name in model_input}
    rows = [model_input] if isinstance(model_input, Mapping) else model_input
    rows = [] if isinstance(rows, str) or not isinstance(rows, Sequence) else rows
    return {str(name) for row in rows if isinstance(row, Mapping) for name in row}


def _said(value: Any) -> str:
    """A cell's text; "" where there is none."""
    return value if isinstance(value, str) else ""


def _blank(value: Any) -> bool:
    """Whether a cell says nothing."""
    return value == "" if isinstance(value, str) else is_scalar(value) and bool(pd.isna(value))


def _asks_edit(table: pd.DataFrame) -> bool:
    """Whether a table's rows are to be edited rather than drawn. ValueError where they say neither.

    A row without its picture is refused where it is read: the caller forgot it.
    """
    if not len(table.columns):
        # MLflow drops what has no name, as in a list of prompts.
        raise ValueError(
            "wanted rows with a prompt or a picture, got neither: ask by "
            '[{"prompt": ...}] or [{"picture": ...}]'
        )
    if "picture" not in table:
        return False
    return "prompt" not in table or not all(_blank(it) for it in table["picture"])


def _given(table: pd.DataFrame, given: Mapping[str, Any]) -> dict[str, Any]:
    """A table's columns as what the generator is given beside prompts. ValueError names a column
    that is missing or unknown.
    """
    names = list(given.get("labels", {}))
    files = {"low": "low", "map": "map", "edit": "picture"}
    wanted = ["prompt", *names, *(it for key, it in files.items() if given.get(key))]
    if unknown := [str(name) for name in table if name not in wanted]:
        raise ValueError(f"no column {', '.join(unknown)} is known; there are {', '.join(wanted)}")
    told: dict[str, Any] = {}
    if names:
        rows = table.reindex(columns=names).to_dict("records")
        told["labels"] = [{n: v for n, v in row.items() if _said(v)} for row in rows]
    if side := given.get("low"):
        if "low" not in table:
            raise ValueError(f"column low: wanted a PNG file of {side} x {side} pixels in each row")
        told["low"] = _pixels(table, "low", side)
    if maps := given.get("map"):
        side = maps["side"]
        if "map" not in table:
            raise ValueError(f"column map: wanted a PNG file of {side} x {side} pixels in each row")
        told["map"] = np.stack([_indices(it, row, side) for row, it in enumerate(table["map"])])
    return told


def _indices(data: Any, row: int, side: int) -> np.ndarray:
    """A PNG file of indices, or its base64, as they are [side, side]."""
    where = f"column map, row {row}"
    picture, depth = _opened(data, where, side)
    # Grey of fewer bits would be stretched to 8.
    if picture.mode != "P" and (picture.mode != "L" or depth != 8):
        raise ValueError(
            f"{where}: got colours of mode {picture.mode}, wanted indices of classes, as 8 bits of "
            "grey or places in a palette"
        )
    try:
        return np.array(picture)
    except (ValueError, OSError, SyntaxError):
        raise ValueError(f"{where}: a PNG file that is broken") from None


def _pixels(table: pd.DataFrame, column: str, side: int) -> np.ndarray:
    """A column of PNG files, or their base64, as pixels [row, side, side, 3]."""
    found: list[np.ndarray] = []
    for row, data in enumerate(table[column]):
        where = f"column {column}, row {row}"
        picture, _ = _opened(data, where, side)
        ground = Image.new("RGBA", picture.size, "white")
        try:
            whole = Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")
        except (ValueError, OSError, SyntaxError):
            raise ValueError(f"{where}: a PNG file that is broken") from None
        found.append(np.asarray(whole))
    return np.stack(found) if found else np.zeros((0, side, side, 3), np.uint8)


def _opened(data: Any, where: str, side: int) -> tuple[Image.Image, int]:
    """(a PNG file of this side, or its base64, whose pixels are not read yet; bits of a value)."""
    try:
        file = data.encode() if isinstance(data, str) else memoryview(data).tobytes()
        if not file.startswith(b"\x89PNG"):  # MLflow decodes one of its two forms of a request
            file = base64.b64decode(file, validate=True)
        picture = Image.open(io.BytesIO(file), formats=["PNG"])
    except (TypeError, ValueError, OSError):
        raise ValueError(f"{where}: wanted a PNG file, or its base64") from None
    if picture.size != (side, side):
        raise ValueError(
            f"{where}: got {picture.width} x {picture.height} pixels, wanted {side} x {side}"
        )
    return picture, file[24]


_OWN = (
    "prompts", "negative", "guidance", "steps", "seed", "labels", "low", "map", "level", "known"
)  # fmt: skip
"""Of a call: what has a place of its own in a request, or none."""
_WAY = '{"noise": 0.5, "inversion_steps": 40, "steps": 8}'
"""Of an edit: what options may say."""


def _options(
    text: str, own: Sequence[str] = _OWN, such: str = '{"sampler": "ddim", "sr1.steps": 8}'
) -> dict[str, Any]:
    """A call's options from JSON. ValueError for what is none, or has a parameter of its `own`."""
    wanted = f"wanted a JSON object such as {such}"
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ValueError(f"options: {error}; {wanted}") from None
    if not isinstance(options, dict):
        raise ValueError(f"options: got {text:.80}, {wanted}")
    if odd := [name for name in options if name in own]:
        raise ValueError(f"options: {odd[0]} is none of them; it has a place of its own, or none")
    return options


def _png(picture: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


class PackagedGenerator(PythonModel):
    """Artifact `package`: the package folder; model config `manifest`: the sha256 of its
    manifest.
    """

    def load_context(self, context: Any) -> None:
        config = context.model_config or {}
        self.generator = open_generator(
            context.artifacts["package"], config.get("device"), config.get("manifest")
        )

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]: the base returns nothing
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[bytes]:
        """One PNG for each prompt; picture i is drawn from seed + i.

        Besides a table with a `prompt` column, a list of strings or {"prompt": ...} is understood.
        A generator whose stages are told more reads it from columns: `low`, a PNG file of the
        picture to enlarge, `map`, one of its label map, and one for each attribute of its classes.
        Params: negative_prompt,
        guidance, steps, seed, level, how strongly `low` is damaged first, and options, a JSON
        object of whatever else a call knows: {"sampler": "ddim", "guidance_interval": [0.1, 0.8],
        "sr1.steps": 8}. What is left out is the package's default.

        A generator with an edit stage reads from `picture` a PNG file in each row and edits it
        instead. Nothing but options counts then: {"noise": 0.5, "inversion_steps": 40, "steps": 8}.
        """
        params = {key: value for key, value in (params or {}).items() if value is not None}
        given: Mapping[str, Any] = getattr(self.generator, "given", {})
        if "picture" in _columns(model_input) and "edit" not in given:
            raise ValueError(
                "column picture: this model edits no picture, as it has no edit stage; ask one "
                "that has, or leave the column out"
            )
        if given:
            table = _table(model_input)
            told = _given(table, given)
            if "edit" in given and _asks_edit(table):
                return self._edited(table, params, given["edit"]["side"])
            blank = [""] * len(table)
            prompts = [_said(it) for it in table["prompt"]] if "prompt" in table else blank
        else:
            prompts, told = _prompts(model_input), {}
        if given.get("low") and "level" in params:
            told["level"] = float(params["level"])
        told |= _options(params.get("options") or "{}")
        pictures = self.generator(
            prompts,
            negative=params.get("negative_prompt") or None,
            guidance=params.get("guidance"),
            steps=params.get("steps"),
            seed=int(params.get("seed", 0)),
            **told,
        )
        return [_png(picture) for picture in pictures]

    def _edited(self, table: pd.DataFrame, params: Mapping[str, Any], side: int) -> list[bytes]:
        """One PNG for each row's picture. ValueError where something else is said of a row."""
        for name in table:
            if name != "picture" and not all(_blank(it) for it in table[name]):
                raise ValueError(
                    f"column {name}: an edit is told nothing but the picture; ask for what is to "
                    "be drawn in a request of its own"
                )
        # MLflow fills in what a request leaves out.
        usual = {"negative_prompt": "", **self.generator.defaults}
        for name in ("negative_prompt", "guidance", "steps"):
            if params.get(name, usual[name]) != usual[name]:
                raise ValueError(
                    f"{name}: it is of what is drawn from prompts; an edit is told how by options, "
                    f"such as {_WAY}"
                )
        chosen = _options(params.get("options") or "{}", ("pictures",), _WAY)
        edited = self.generator.edit(_pixels(table, "picture", side), **chosen)
        return [_png(picture) for picture in edited]


set_model(PackagedGenerator())
