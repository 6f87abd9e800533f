"""MLflow shows what the ledger says: a version is a verified package, an alias is the ledger's
projection.

The ledger is written first and the alias after it, so whatever is killed in between is mended by
projecting again. What is loaded is checked against the sha256 of every file, as recorded when it
was registered.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import mlflow
import mlflow.artifacts
import mlflow.pyfunc
import numpy as np
import torch
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image

from pipeline import storage
from training import tracking
from training.results import WEIGHTS

from .ledger import Entry, Ledger
from .packaging import CARD, FILE, MANIFEST, describe, example, package
from .sample import png
from .serving import open_generator, verify

__all__ = [
    "candidate",
    "canonical",
    "delete",
    "describe",
    "draw_in_fresh_process",
    "facts",
    "find",
    "load",
    "locate",
    "open_generator",
    "package",
    "project",
    "promote",
    "register",
    "rollback",
    "settle",
    "stages",
    "tag",
    "verify",
]

PACKAGE_TAG, MANIFEST_TAG = "darkroom.package", "darkroom.manifest"
_TRIES = 10
_OURS = ("pipeline", "training", "evaluation", "flows")


def register(
    package_dir: str | Path,
    name: str,
    *,
    tracking_uri: str | None = None,
    run_id: str | None = None,
    artifact_location: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Register a package as a version of the model `name`.

    A package that is registered already keeps its version.

    `run_id` links the run that made it; without one the files go to the experiment `name`, whose
    `artifact_location` counts when it does not exist yet. ValueError names a file of the package
    that is missing or changed.
    """
    folder = Path(package_dir)
    manifest = verify(folder)
    client = tracking.client(tracking_uri)
    with contextlib.suppress(MlflowException):  # it exists
        client.create_registered_model(_checked(name))
    if known := _registered(client, name, manifest["package"]):
        return known
    marks = {
        PACKAGE_TAG: manifest["package"],
        MANIFEST_TAG: storage.sha256(folder / MANIFEST),
    }
    if run_id:
        experiment = client.get_run(run_id).info.experiment_id
    else:
        experiment = _experiment(client, name, artifact_location)
    model = client.create_logged_model(
        experiment, name="generator", source_run_id=run_id, tags=marks, model_type="text-to-image"
    )
    if run_id:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    with _at(client.tracking_uri), _quiet():
        mlflow.pyfunc.log_model(
            name="generator",
            model_id=model.model_id,
            python_model=str(folder / "serving.py"),
            artifacts={"package": str(folder)},
            model_config={"manifest": marks[MANIFEST_TAG]},
            signature=_signature(storage.read_json(str(folder / "generator" / "generator.json"))),
            pip_requirements=(folder / "requirements.txt").read_text().split(),
        )
        client.create_model_version(
            name,
            source=f"models:/{model.model_id}",
            run_id=run_id,
            model_id=model.model_id,
            tags=marks | {"darkroom.code": manifest["code"]} | dict(tags or {}),
            description=(folder / CARD).read_text()[:4000],
        )
    registered = _registered(client, name, manifest["package"])
    assert registered is not None
    return registered


def load(model: str, *, tracking_uri: str | None = None, device: str | None = None) -> Any:
    """The generator of a registered model (`shapes`: its champion; `shapes@previous`; `shapes/3`;
    the same after `models:/`) or of a package folder, after checking every file. ValueError names
    the file that is missing or changed."""
    folder, sha256 = locate(model, tracking_uri=tracking_uri)
    return open_generator(folder, device, sha256)


def application(model: str, *, tracking_uri: str | None = None) -> tuple[str, Any, list[str]]:
    """(the registered version, MLflow's scoring server of it, an ASGI application, examples of
    what to POST to /invocations): {"inputs": [prompts], "params": {...}}, or {"dataframe_records":
    [...]} for a model that is told more than prompts, and a second one for a model that edits;
    answers are PNG files in base64. Everything is checked as `load` does. ValueError where there is
    no such version.
    """
    from mlflow.pyfunc import scoring_server

    folder, _ = locate(model, tracking_uri=tracking_uri)
    given = storage.read_json(str(folder / "generator" / "generator.json")).get("given", {})
    version = find(tracking.client(tracking_uri), model)
    mlflow.set_tracking_uri(tracking_uri or mlflow.get_tracking_uri())
    name = candidate(version.name, version.version)
    served = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    body = {"dataframe_records": [example(given)]} if given else {"inputs": ["a prompt"]}
    bodies = [body | {"params": {"seed": 1}}]
    if given.get("edit"):
        bodies.append({"dataframe_records": [{"picture": FILE}]})
    return name, scoring_server.init(served), [json.dumps(it) for it in bodies]


def locate(model: str, *, tracking_uri: str | None = None) -> tuple[Path, str | None]:
    """The local package folder of a model, and the sha256 that its manifest was registered with."""
    if (Path(model) / MANIFEST).is_file():
        return Path(model), None
    client = tracking.client(tracking_uri)
    version = find(client, model)
    if MANIFEST_TAG not in version.tags:
        raise ValueError(
            f"{version.name} version {version.version}: not one of ours (no tag {MANIFEST_TAG})"
        )
    folder = _fetch(client, version)
    found = sorted(folder.glob(f"artifacts/*/{MANIFEST}"))
    if not found:
        raise ValueError(
            f"{version.name} version {version.version}: {folder}/artifacts/*/{MANIFEST} is "
            f"missing; roll back, or register the package again"
        )
    return found[0].parent, version.tags[MANIFEST_TAG]


def find(client: MlflowClient, model: str) -> ModelVersion:
    """The version that `name`, `name@alias` or `name/number` means, with or without `models:/`
    before it.
    """
    parts = re.fullmatch(r"(?:models:/)?([\w.-]+)(?:@([\w-]+)|/(\d+))?", model)
    if not parts:
        raise ValueError(
            f"{model!r}: neither a package folder nor NAME, NAME@ALIAS or NAME/VERSION"
        )
    name, alias, number = parts.groups()
    try:
        if number:
            return client.get_model_version(name, number)
        return client.get_model_version_by_alias(name, alias or "champion")
    except MlflowException as error:
        what = f"version {number}" if number else f"alias {alias or 'champion'}"
        raise ValueError(
            f"{model}: the registry knows no {what} of the model {name} ({error.message})"
        ) from None


def candidate(name: str, version: int | str) -> str:
    """What a ledger calls a registered version: `shapes/3`; `load` understands it too."""
    return f"{name}/{version}"


def canonical(model: str, *, tracking_uri: str | None = None) -> str:
    """What a ledger calls a registered model, named in any of the ways `load` understands."""
    version = find(tracking.client(tracking_uri), model)
    return candidate(version.name, version.version)


def stages(model: str, *, tracking_uri: str | None = None) -> dict[str, str]:
    """Stage -> what names its weights: the fingerprint of its training, or that it is pretrained,
    and the beginning of their sha256. Models that say the same of a stage share it."""
    folder, _ = locate(model, tracking_uri=tracking_uri)
    described = storage.read_json(str(folder / "generator" / "generator.json"))
    return {
        name: f"{it.get('fingerprint') or 'pretrained'}, weights {it['weights_sha256'][:12]}"
        for name, it in described.get("stages", {}).items()
    }


def tag(model: str, tags: Mapping[str, str], *, tracking_uri: str | None = None) -> None:
    """Set tags of a registered version."""
    client = tracking.client(tracking_uri)
    version = find(client, model)
    for key, value in tags.items():
        client.set_model_version_tag(version.name, version.version, key, value)


def promote(
    ledger: Ledger,
    version: int,
    verdict: Mapping[str, Any] | None = None,
    *,
    tracking_uri: str | None = None,
) -> Entry:
    """Make a registered version the champion, whoever serves now. Doing it again changes nothing.

    ValueError when there is no such version, or it is no package of ours.
    """
    name = candidate(ledger.name, version)
    if MANIFEST_TAG not in find(tracking.client(tracking_uri), name).tags:
        raise ValueError(f"{name}: not registered by darkroom; register its package first")
    entry = Entry(kind="promote", candidate=name, verdict=verdict)
    return settle(ledger, lambda _: entry, tracking_uri=tracking_uri)


def settle(
    ledger: Ledger, decide: Callable[[str | None], Entry], *, tracking_uri: str | None = None
) -> Entry:
    """`ledger.settle`, then the aliases: `decide` is asked again when another one came first."""
    entry = ledger.settle(decide)
    project(ledger, tracking_uri=tracking_uri)
    return entry


def rollback(ledger: Ledger, to: int | None = None, *, tracking_uri: str | None = None) -> Entry:
    """Return to the version that served before, or to an earlier one. ValueError without one, or
    where it was deleted.
    """
    earlier = None if to is None else candidate(ledger.name, to)
    if (target := earlier or ledger.previous()) is not None:
        find(tracking.client(tracking_uri), target)
    entry = ledger.rollback(earlier)
    project(ledger, tracking_uri=tracking_uri)
    return entry


def project(ledger: Ledger, *, tracking_uri: str | None = None) -> dict[str, int]:
    """Make the aliases say what the ledger says; returns {alias: version}.

    champion serves, previous is where a rollback leads, challenger is a candidate that the newest
    entry refused. Others' aliases stay; a version that was deleted has none.
    """
    client = tracking.client(tracking_uri)
    for attempt in range(_TRIES):
        entries = ledger.entries()
        last = entries[-1] if entries else None
        said = {
            "champion": ledger.champion(),
            "previous": ledger.previous(),
            "challenger": last.candidate if last and last.kind == "reject" else None,
        }
        try:
            found = _aliases(client, ledger.name)
            there = {alias: name for alias, name in said.items() if name and _exists(client, name)}
            wanted = {alias: _version(name) for alias, name in there.items()}
            for alias in said:
                if alias in wanted and found.get(alias) != wanted[alias]:
                    client.set_registered_model_alias(ledger.name, alias, str(wanted[alias]))
                elif alias in found and alias not in wanted:
                    client.delete_registered_model_alias(ledger.name, alias)
        except MlflowException:  # another projection set the same alias in the same moment
            if attempt == _TRIES - 1:
                raise
            time.sleep(0.1 * attempt)
            continue
        if len(ledger.entries()) == len(entries):  # else a newer champion may just have been undone
            return wanted
    raise RuntimeError(f"{ledger.url}: it grows faster than its aliases can be set; project again")


def delete(ledger: Ledger, version: int, *, tracking_uri: str | None = None) -> None:
    """Delete a registered version. ValueError for the champion and for where a rollback leads."""
    name = candidate(ledger.name, version)
    for role, kept in (("champion", ledger.champion()), ("previous", ledger.previous())):
        if name == kept:
            raise ValueError(f"{name} is the {role}; promote another version before deleting it")
    client = tracking.client(tracking_uri)
    find(client, name)
    client.delete_model_version(ledger.name, str(version))


def facts(
    model: str,
    *,
    tracking_uri: str | None = None,
    lineage: Iterable[str] = ("dataset", "version", "data_digest"),
    **drawing: Any,
) -> dict[str, bool | str]:
    """What a gate wants to know beyond scores: True where it holds, else the reason why not.

    integrity: every file is as it was packaged. lineage: the manifest says these things, and each
    trained stage's weights are those that its training left. infra: `draw_in_fresh_process`.
    """
    try:
        folder, sha256 = locate(model, tracking_uri=tracking_uri)
        manifest = verify(folder, sha256)
    except ValueError as error:
        return {"integrity": str(error), "lineage": "unknown", "infra": "not tried"}
    missing = [name for name in lineage if manifest["lineage"].get(name) in (None, "")]
    stages = storage.read_json(str(folder / "generator" / "generator.json")).get("stages", {})
    changed = [
        name
        for name, stage in stages.items()
        if stage.get("weights_sha256") != manifest["files"].get(f"generator/{name}/{WEIGHTS}")
        and not stage.get("pretrained")
    ]
    told = f"the manifest does not say: {', '.join(missing)}" if missing else ""
    told = f"not the weights that were trained: {', '.join(changed)}" if changed else told
    drawn = draw_in_fresh_process(model, tracking_uri=tracking_uri, **drawing)
    infra = drawn["passed"] or drawn["reason"]
    return {"integrity": True, "lineage": told or True, "infra": infra}


def draw_in_fresh_process(
    model: str,
    *,
    prompt: str = "a red circle",
    seed: int = 0,
    steps: int | None = None,
    tracking_uri: str | None = None,
    timeout_seconds: float = 900,
) -> dict[str, Any]:
    """Whether a service could draw with this model: a new process in which darkroom can't be
    imported, no connection can be opened and no pickle be read draws the picture that this process
    draws, pixel for pixel.

    Returns passed, reason (empty when passed), seconds and different_pixels. A registered model is
    loaded through MLflow's pyfunc, a package folder through its serving.py.
    """
    folder, sha256 = locate(model, tracking_uri=tracking_uri)
    served = folder.parent.parent if sha256 else folder
    given = storage.read_json(str(folder / "generator" / "generator.json")).get("given", {})
    record, told = _trial(given, prompt)
    job = {
        "folder": str(served.resolve()),
        "prompt": prompt,
        "record": record,
        "params": {"seed": seed} | ({"steps": steps} if steps else {}),
        "threads": torch.get_num_threads(),
        "hidden": _OURS,
    }
    here = open_generator(folder, None, sha256)([prompt], seed=seed, steps=steps, **told)[0]
    lines = ("from __future__ import annotations", inspect.getsource(_draw_alone), "_draw_alone()")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment |= {
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", "\n".join(lines), json.dumps(job)],
                cwd=scratch,
                env=environment,
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
            )
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            reason = said[-1] if done.returncode else ""
        except subprocess.TimeoutExpired:
            reason = f"no picture after {timeout_seconds:.0f} s"
        seconds = time.perf_counter() - started
        if reason:
            return {"passed": False, "reason": reason, "seconds": seconds, "different_pixels": None}
        there = np.asarray(Image.open(Path(scratch, "picture.png")))
    same = there.shape == here.shape
    different = int((there != here).any(-1).sum()) if same else int(np.prod(here.shape[:2]))
    reason = f"{different} pixels differ from the picture drawn here" if different else ""
    return {
        "passed": not different,
        "reason": reason,
        "seconds": seconds,
        "different_pixels": different,
    }


def _draw_alone() -> None:
    """Runs in the fresh process, from its source text: the job is its argument, picture.png its
    result.
    """
    import importlib.abc
    import importlib.util
    import json
    import sys
    import types
    from pathlib import Path

    job = json.loads(sys.argv[1])
    folder = Path(job["folder"])

    class Hidden(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname, path=None, target=None):  # pyright: ignore
            if fullname.partition(".")[0] in job["hidden"]:
                raise ModuleNotFoundError(f"{fullname} is not part of the package", name=fullname)

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        if event == "pickle.find_class":
            raise PermissionError(f"the model reads a pickle of {args[0]}.{args[1]}")
        inet = event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(
            args[1], tuple
        )
        if inet or event == "socket.getaddrinfo":
            raise PermissionError(
                f"the model opens a connection ({event} {args[1 if inet else 0]})"
            )

    sys.meta_path.insert(0, Hidden())
    sys.addaudithook(refuse)

    import torch

    torch.set_num_threads(job["threads"])
    asked: Any = [job["prompt"]]
    if record := job["record"]:
        import base64

        import pandas as pd

        for name in {"low", "map"} & record.keys():
            record[name] = base64.b64decode(record[name])
        asked = pd.DataFrame([record])
    if (folder / "MLmodel").exists():
        import mlflow.pyfunc

        pictures = mlflow.pyfunc.load_model(str(folder)).predict(asked, params=job["params"])
    else:
        spec = importlib.util.spec_from_file_location("packaged_serving", folder / "serving.py")
        assert spec and spec.loader
        serving = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(serving)
        model = serving.PackagedGenerator()
        model.load_context(
            types.SimpleNamespace(artifacts={"package": str(folder)}, model_config={})
        )
        pictures = model.predict(None, asked, job["params"])
    Path("picture.png").write_bytes(pictures[0])


def _trial(given: Mapping[str, Any], prompt: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(the record that asks a service for a picture of the prompt, what the generator itself is
    given for the same); nothing for a model of prompts alone.
    """
    if not given:
        return {}, {}
    record, told = {"prompt": prompt} if given["text"] else {}, {}
    label = {name: answers[0] for name, answers in given.get("labels", {}).items()}
    if label:
        record, told = record | label, {"labels": [label]}
    if side := given.get("low"):
        ramp = np.linspace(0, 255, side).astype(np.uint8)
        picture = np.stack([*np.meshgrid(ramp, ramp), np.full((side, side), 128, np.uint8)], -1)
        file = base64.b64encode(png(picture)).decode()
        record, told = record | {"low": file}, told | {"low": picture[None]}
    if maps := given.get("map"):
        side = maps["side"]
        row = np.arange(side, dtype=np.uint8) % len(maps["classes"])
        indices = np.broadcast_to(row, (side, side))
        file = base64.b64encode(png(indices)).decode()
        record, told = record | {"map": file}, told | {"map": indices[None]}
    return record, told


def _signature(generator: Mapping[str, Any]) -> ModelSignature:
    defaults, given = generator.get("defaults", {}), generator.get("given", {})
    params = [
        ParamSpec("negative_prompt", "string", ""),
        ParamSpec("guidance", "double", float(defaults.get("guidance", 1.0))),
        ParamSpec("steps", "long", int(defaults.get("steps", 16))),
        ParamSpec("seed", "long", 0),
        ParamSpec("options", "string", ""),
    ]
    # The prompt's column has no name: MLflow refuses a plain list of strings where the column has
    # one.
    columns: list[ColSpec | TensorSpec] = [ColSpec("string")]
    if given:
        labels = given.get("labels", {})
        if odd := {"prompt", "low", "map", "picture"}.intersection(labels):
            raise ValueError(f"an attribute of classes named {odd.pop()}: services need that name")
        # A list of prompts must not pass for rows in which nothing is said. Where each row is
        # drawn or edited no column is required, and serving.py refuses such rows.
        edits = bool(given.get("edit"))
        columns = [ColSpec("string", "prompt", required=not edits)] if given["text"] else []
        told = given["text"] or edits
        columns += [ColSpec("string", name, required=not told) for name in labels]
        if edits:
            columns.append(ColSpec("binary", "picture", required=False))
        if given.get("low"):
            columns.append(ColSpec("binary", "low"))
            params.append(ParamSpec("level", "double", float(defaults.get("level", 0.0))))
        if given.get("map"):
            columns.append(ColSpec("binary", "map"))
    return ModelSignature(Schema(columns), Schema([ColSpec("binary")]), ParamSchema(params))


def _checked(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(
            f"a model's name may hold letters, digits, dots, dashes and underscores, got {name!r}"
        )
    return name


def _experiment(client: MlflowClient, name: str, artifact_location: str | None) -> str:
    with contextlib.suppress(MlflowException):  # it exists, or another process was first
        return client.create_experiment(name, artifact_location)
    found = client.get_experiment_by_name(name)
    assert found is not None
    return found.experiment_id


def _registered(client: MlflowClient, name: str, package: str) -> int | None:
    """The version that holds the package. Of two that were registered at once, the first: everyone
    finds the same.
    """
    found = client.search_model_versions(f"name = '{name}' and tag.`{PACKAGE_TAG}` = '{package}'")
    return min((int(version.version) for version in found), default=None)


def _exists(client: MlflowClient, name: str) -> bool:
    """Whether a version that the ledger names was not deleted."""
    try:
        client.get_model_version(name.rpartition("/")[0], str(_version(name)))
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _version(name: str) -> int:
    version = name.rpartition("/")[2]
    if not version.isdigit():
        raise ValueError(f"the ledger's {name!r} is not the name of a version, like shapes/3")
    return int(version)


def _aliases(client: MlflowClient, name: str) -> dict[str, int]:
    try:
        found = client.get_registered_model(name).aliases
    except MlflowException as error:
        raise ValueError(f"the registry knows no model {name} ({error.message})") from None
    return {alias: int(version) for alias, version in found.items()}


def _fetch(client: MlflowClient, version: ModelVersion) -> Path:
    """The version's files on this machine: where they lie, or a copy in `$DARKROOM_HOME/cache`."""
    where = client.get_model_version_download_uri(version.name, version.version)
    if urlparse(where).scheme in ("", "file"):
        return Path(url2pathname(urlparse(where).path))
    cache = Path(os.environ.get("DARKROOM_HOME", ".darkroom"), "cache", "models")
    target = cache / version.tags[MANIFEST_TAG][:16]
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as draft:
            with _at(client.tracking_uri), _quiet():
                place = Path(draft, "model")
                place.mkdir()
                uri = f"models:/{version.name}/{version.version}"
                got = mlflow.artifacts.download_artifacts(uri, dst_path=str(place))
            with contextlib.suppress(OSError):  # another process fetched it meanwhile
                os.rename(got, target)
    return target


@contextlib.contextmanager
def _at(tracking_uri: str) -> Iterator[None]:
    """MLflow's global tracking URI, for the calls that know no other."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(tracking_uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without MLflow's advice, which is about models that are logged by hand."""
    logger = logging.getLogger("mlflow")
    level, bar = logger.level, os.environ.get("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")
    logger.setLevel(logging.ERROR)
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        os.environ.pop("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR")
        if bar is not None:
            os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = bar
