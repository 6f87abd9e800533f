"""A package is everything that draws the pictures, in one folder: weights, code, and how they came
to be.

    darkroom_1a2b3c4d5e6f/   the generator's code and all it imports of ours, by relative imports
    generator/               the stages' configs and safetensors
    serving.py               the MLflow model
    requirements.txt         what the code imports, at the versions at hand
    README.md                the model card
    scorecard.json           once it has been scored
    manifest.json            sha256 of each file, data set, recipe, lineage, scorecard

What draws (code, weights, recipe, lineage) makes a package's identity, the manifest's `package`;
the scorecard and the card describe it and may come later.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline import storage

FOLDERS = ("pipeline", "training", "evaluation", "flows")
ENTRY = "training.generator"
MANIFEST, CARD, SCORECARD = "manifest.json", "README.md", "scorecard.json"
_MODULE = re.compile(rf"({'|'.join(FOLDERS)})(\.\w+)+(:\w+)?")
_HERE = Path(__file__).parent
_SERVING = {"mlflow", "numpy", "pandas", "PIL"}
_DRAWING = {"einops", "jaxtyping", "numpy", "open_clip", "safetensors", "torch", "transformers"}
"""What drawing imports of others. The code that travels can also train and read data sets; a
service does neither.
"""


def package(
    generator_dir: str | Path,
    out_dir: str | Path,
    *,
    recipe: Mapping[str, Any],
    lineage: Mapping[str, Any],
    scorecard: Mapping[str, Any] | None = None,
    commit: str | None = None,
    code_root: str | Path | None = None,
) -> str:
    """Package what `training.assembling.assemble` wrote; returns the package's folder, below
    `out_dir`.

    The folder is named after the package's identity and appears whole, so packaging the same again
    finds it. `lineage` says what the weights were made from (data set, version, stages);
    `code_root` is where the code is taken from (here). ValueError when `generator_dir` holds no
    generator, or the code can't be made to travel.
    """
    generator = Path(generator_dir)
    if not (generator / "generator.json").is_file():
        raise ValueError(
            f"{generator}: no generator.json; package what training.assembling.assemble wrote"
        )
    sources, imported = code(Path(code_root) if code_root else _HERE.parent)
    described = storage.read_json(str(generator / "generator.json"))
    stages = described.get("stages", {})
    foreign = (
        {"diffusers"} if any(stage.get("pretrained") for stage in stages.values()) else set[str]()
    )
    needed = _SERVING | (imported & (_DRAWING | foreign))
    name = _serving().code_name(sources)
    files = {f"{name}/{path}": text for path, text in sources.items()}
    files["serving.py"] = (_HERE / "serving.py").read_bytes()
    files["requirements.txt"] = "".join(f"{line}\n" for line in _pins(needed)).encode()
    weights = {
        f"generator/{path.relative_to(generator).as_posix()}": path
        for path in sorted(generator.rglob("*"))
        if path.is_file()
    }
    hashes = {path: hashlib.sha256(text).hexdigest() for path, text in files.items()}
    hashes |= {path: storage.sha256(source) for path, source in weights.items()}
    said = {"recipe": dict(recipe), "lineage": dict(lineage)}
    identity = hashlib.sha256(storage.json_bytes({"files": hashes, **said})).hexdigest()
    target = Path(out_dir, identity[:16])
    if not (target / MANIFEST).exists():
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".package-", dir=out_dir))
        try:
            for path, text in files.items():
                _place(draft / path).write_bytes(text)
            for path, source in weights.items():
                shutil.copyfile(source, _place(draft / path))
            manifest = {"format": 1, "package": identity, "code": name, "commit": commit, **said}
            manifest |= {"files": hashes, "scorecard": None}
            if given := described.get("given"):
                manifest["given"] = given
            storage.publish_json(str(draft / MANIFEST), manifest)
            draft.chmod(0o755)
            try:
                os.rename(draft, target)
            except OSError:  # another process packaged the same meanwhile
                if not (target / MANIFEST).exists():
                    raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    if scorecard is not None or not (target / CARD).exists():
        describe(target, scorecard)
    return str(target)


def describe(package_dir: str | Path, scorecard: Mapping[str, Any] | None) -> None:
    """Write the scorecard and the model card into a package. Its identity stays; it loads at every
    moment.
    """
    target = Path(package_dir)
    manifest = storage.read_json(str(target / MANIFEST))
    manifest["scorecard"] = scorecard
    documents = {CARD: card(manifest).encode()}
    if scorecard is not None:
        documents[SCORECARD] = storage.json_bytes(scorecard)
    for path in (CARD, SCORECARD):
        manifest["files"].pop(path, None)
    storage.publish_json(str(target / MANIFEST), manifest)  # lists neither while they change
    for path, text in documents.items():
        storage.publish_bytes(str(target / path), text)
        manifest["files"][path] = hashlib.sha256(text).hexdigest()
    storage.publish_json(str(target / MANIFEST), manifest)


def code(root: Path) -> tuple[dict[str, bytes], set[str]]:
    """The generator's modules and all they import of ours {path: source}, and the names of other
    packages they import.

    Imports inside functions count too, those under TYPE_CHECKING don't. ValueError names file and
    line of an import that could not be followed or moved.
    """
    sources = {"__init__.py": b'"""The code of one packaged generator."""\n'}
    imported: set[str] = set()
    todo, seen = [ENTRY], set[str]()
    while todo:
        module = todo.pop()
        if module in seen or not module:
            continue
        seen.add(module)
        todo.append(module.rpartition(".")[0])  # the packages it lies in run first
        path = _file(root, module)
        if path is None:
            raise ValueError(f"{module}: imported by the generator's code, but not found in {root}")
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        inside = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name in _imports(tree, inside, path):
            if name.partition(".")[0] not in FOLDERS:
                imported.add(name.partition(".")[0])
            elif not name.endswith("?") or _file(root, name := name[:-1]):
                todo.append(name)
        sources[path.relative_to(root).as_posix()] = _relative(text, tree, inside).encode()
    return sources, imported


def _file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    return next(
        (file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None
    )


def _imports(tree: ast.AST, inside: str, path: Path) -> Iterator[str]:
    """Every module that `tree`, a module of the package `inside`, imports by statement.

    For `from a import b` that is `a` and `a.b?`: b may be a module.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from _imports(ast.Module([child], []), inside, path)
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in FOLDERS:
                    raise ValueError(
                        f"{path}:{node.lineno}: `import {alias.name}` can't travel under "
                        f"another name; write `from ... import`"
                    )
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = inside.split(".") if node.level else []
            base = ".".join([*parts[: len(parts) + 1 - node.level], *filter(None, [node.module])])
            yield base
            yield from (f"{base}.{alias.name}?" for alias in node.names)
        elif isinstance(node, ast.Constant) and _MODULE.fullmatch(str(node.value)):
            raise ValueError(
                f"{path}:{node.lineno}: the module name {node.value!r} in a string can't travel "
                f"under another name; import it by statement"
            )
        yield from _imports(node, inside, path)


def _relative(text: str, tree: ast.AST, inside: str) -> str:
    """The text with imports of our folders made relative: `training.x` -> `..training.x`."""
    lines = text.splitlines(keepends=True)
    dots = "." * (inside.count(".") + 2)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module is not None
            if node.module.partition(".")[0] in FOLDERS:
                line = lines[node.lineno - 1].encode()
                head, tail = line[: node.col_offset], line[node.col_offset :]
                tail = re.sub(rb"^from\s+", f"from {dots}".encode(), tail)
                lines[node.lineno - 1] = (head + tail).decode()
    return "".join(lines)


def _pins(imported: set[str]) -> list[str]:
    """`name==version` of the installed distributions that hold these packages; of several, the one
    of the same name.
    """
    known = _distributions()
    names = {
        min(known[package], key=lambda name: name != package)
        for package in imported
        if package in known
    }
    return sorted(f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names)


@functools.cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


def _place(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _serving() -> Any:
    from . import serving  # imports mlflow: only when something is packaged

    return serving


def card(manifest: Mapping[str, Any]) -> str:
    """The model card in Markdown: how to use it, what it was made from, how good it is."""
    lineage, scorecard = manifest["lineage"], manifest["scorecard"]
    given: Mapping[str, Any] = manifest.get("given", {})
    title = str(manifest["recipe"].get("name") or lineage.get("name") or "Darkroom generator")
    parts = [
        f"# {title}",
        "A text-to-image model made by Darkroom. "
        "The same prompt, seed and settings draw the same picture.",
        "## Use",
        *(_use_given(given) if given else [_USE]),
        "## Made from",
        _table(lineage | {"commit": manifest["commit"], "package": manifest["package"]}),
        "## Scores",
        _table(scorecard) if scorecard else "Not scored yet.",
        "Scores hold for the prompts, reference pictures and extractor that they name, and for "
        "nothing else. The data decides what the model can draw and what it is biased towards.",
        "## Recipe",
        f"```json\n{json.dumps(manifest['recipe'], indent=1, sort_keys=True)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


_USE = """```python
import mlflow

model = mlflow.pyfunc.load_model("models:/NAME@champion")
png = model.predict(["a red circle"], params={"seed": 7})[0]
```"""


_USE_EDIT = """```python
rows = pd.DataFrame([{"picture": open("picture.png", "rb").read()}])
options = '{"noise": 0.5, "inversion_steps": 40, "steps": 8}'
png = model.predict(rows, params={"options": options})[0]
```"""


def _use_given(given: Mapping[str, Any]) -> list[str]:
    """How to use a model that is told more than prompts."""
    files = ("low", "map")
    cells = [f'"{key}": "{value}"' for key, value in example(given).items() if key not in files]
    cells += ['"low": open("small.png", "rb").read()'] if given.get("low") else []
    cells += ['"map": open("map.png", "rb").read()'] if given.get("map") else []
    more: list[str] = []
    told = [f"`{name}`: one of {', '.join(it)}." for name, it in given.get("labels", {}).items()]
    if side := given.get("low"):
        told.append(
            f"`low`: a PNG file of {side} x {side} pixels, the picture that is enlarged; over HTTP "
            "its base64. The parameter `level` says how strongly it is damaged first."
        )
    if maps := given.get("map"):
        side, names = maps["side"], ", ".join(f"{i} {it}" for i, it in enumerate(maps["classes"]))
        told.append(
            f"`map`: a PNG file of {side} x {side} pixels, 8 bits of grey or a palette, whose "
            f"values say which class each pixel is to have: {names}; over HTTP its base64."
        )
    if edit := given.get("edit"):
        side, source, target = edit["side"], edit["source"], edit["target"]
        more.append(_USE_EDIT)
        told.append(
            f"`picture`: a PNG file of {side} x {side} pixels, in each row and in place of all "
            f"else: what is {source} there becomes {target}; over HTTP its base64. The parameter "
            "`options` says how, of which any may be left out."
        )
    if not given["text"]:
        told.append("It hears no prompts.")
    return [
        "```python\nimport mlflow\nimport pandas as pd\n\n"
        'model = mlflow.pyfunc.load_model("models:/NAME@champion")\n'
        f"rows = pd.DataFrame([{{{', '.join(cells)}}}])\n"
        'png = model.predict(rows, params={"seed": 7})[0]\n```',
        *more,
        "\n".join(f"- {it}" for it in told),
    ]


FILE = "BASE64 OF A PNG FILE"


def example(given: Mapping[str, Any]) -> dict[str, str]:
    """What a service may be asked to draw by a row; `given` is that of generator.json."""
    row = {"prompt": "a red circle"} if given["text"] else {}
    row |= {name: answers[0] for name, answers in given.get("labels", {}).items()}
    return row | {it: FILE for it in ("low", "map") if given.get(it)}


def _table(values: Mapping[str, Any], limit: int = 60) -> str:
    rows = [f"| {key} | {value} |" for key, value in _leaves(values)]
    more = [f"| ... | {len(rows) - limit} more in the manifest |"] if len(rows) > limit else []
    return "\n".join(["| | |", "|---|---|", *rows[:limit], *more])


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(value[key], f"{path}.{key}" if path else str(key))
    elif value is not None:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        text = text if len(text) <= 120 else text[:117] + "..."
        yield path, text.replace("|", "\\|").replace("\n", " ")
