"""What a recipe means on this installation: which data set, which stage directories, which model.

Identities are fingerprints of what decides a result. A stage that stays frozen when the data grows
is identified
by the data set's first version, any other by the version it learns from; so "done" is a question
about files, and
asking it imports neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.ledger import Ledger
from pipeline import ingest, storage
from pipeline import manifest as manifests
from pipeline.manifest import Manifest, fingerprint
from training import results
from training.resuming import learning

from .recipe import DENOISING, FROZEN, Recipe, RecipeError
from .settings import Settings

CODE_VERSION = 1
"""Raised by hand when a change of the code must train everything anew."""


def taken_down(stage: str) -> str | None:
    """The version of the data, told in words, from which a finished stage or one before it has
    learnt pictures that were taken down since.
    """
    for done in results.ancestry(stage):
        dataset, number = done["dataset"], done["version"]
        if number in manifests.versions(dataset):
            version = manifests.read(dataset, number)
            if version.digest == done["data_digest"] and version.redacted.get("keys"):
                return f"{dataset} version {number}"
    return None


@dataclass(frozen=True)
class Line:
    """A recipe on an installation."""

    recipe: Recipe
    settings: Settings

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Line:
        """What `to_json` wrote: the form in which a line travels as a flow's parameter."""
        places = Settings(Path(values["home"]), values["mlflow_uri"])
        return cls(Recipe.model_validate(values["recipe"]), places)

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.model_dump(mode="json"),
            "home": str(self.settings.home),
            "mlflow_uri": self.settings.mlflow_uri,
        }

    @property
    def slug(self) -> str:
        """The name as Prefect's artifacts allow it."""
        return self.recipe.name.replace("_", "-")

    @property
    def rules(self) -> ingest.IngestRules:
        """The recipe's, storing no picture larger than what is learnt from it."""
        rules = self.recipe.data.ingest
        return replace(rules, max_side=rules.max_side or self.recipe.data.side)

    @property
    def sources(self) -> tuple[str, ...]:
        """What the data set is made of. RecipeError where the recipe names nothing."""
        found = self.recipe.data.source_urls(self.recipe.seed)
        if not found:
            raise RecipeError(
                f"recipe {self.recipe.name} has no data: set data.sources to folders, tables or "
                "tars, e.g. data.sources='[\"my-pictures\"]', or data.scenes to a number of drawn "
                "scenes"
            )
        return found

    @cached_property
    def dataset(self) -> str:
        chosen = self.recipe.data.dataset or self.recipe.name
        return storage.absolute(chosen) if "/" in chosen else self.settings.dataset(chosen)

    def manifest(self) -> Manifest:
        """The data set's latest version. ValueError when nothing was ingested yet."""
        found = manifests.latest(self.dataset)
        if found is None:
            raise ValueError(
                f"data set {self.dataset} has no version yet; "
                f"run `darkroom ingest SOURCE... --dataset {self.dataset}` or `darkroom run`"
            )
        return found

    def stage_lineage(self, name: str, data: Manifest) -> str:
        """Fingerprint of what a stage is, whatever it has learnt from: where two agree, one can go
        on from the other.
        """
        stage, rules = self.recipe.stage(name), self.recipe.data.encode.changes
        return fingerprint(
            {
                "code": CODE_VERSION,
                "config": stage.config,
                "pretrained": stage.pretrained,
                "side": self.recipe.data.side,
                "inputs": [self.stage_identity(i, data) for i in self.recipe.inputs(name)],
                **({"encode": rules} if rules and name in DENOISING else {}),
            }
        )

    def stage_identity(self, name: str, data: Manifest) -> str:
        """`{stage}-{fingerprint}`: also the name of its directory."""
        origin = manifests.read(self.dataset, 1) if name in FROZEN and data.version > 1 else data
        first = self.recipe.stage(name).warm_start
        return f"{name}-" + fingerprint(
            {
                **({"warm_start": first} if first else {}),
                "lineage": self.stage_lineage(name, data),
                "training": learning(self.recipe.stage(name).training),
                "seed": self.recipe.seed,
                "data": origin.digest,
            }
        )

    def source(self, name: str, data: Manifest) -> str:
        """Where a stage's network comes from: its directory, or the pretrained model that stands in
        for it.
        """
        return self.recipe.stage(name).pretrained or str(self.stage_dir(name, data))

    def stage_dir(self, name: str, data: Manifest) -> Path:
        return self.settings.stage(self.stage_identity(name, data))

    def result(self, name: str, data: Manifest) -> dict[str, Any] | None:
        """The stage's stage.json, or None while it is not trained (a pretrained one never is)."""
        return results.committed(str(self.stage_dir(name, data)))

    def parent(self, name: str, data: Manifest, encodings: Mapping[str, str]) -> str | None:
        """The champion's stage, where it can be the first weights of a new one: same config, other
        data, of which no picture was taken down since; and it learnt from these `encodings`, name
        to fingerprint. A lineage does not tell: an encoder that was trained anew keeps its
        identity, and has other weights.
        """
        champion = None if name in FROZEN else self.ledger.champion()
        before = self.version_stages(champion).get(name) if champion else None
        done = results.committed(before) if before else None
        if before is None or done is None:
            return None
        if done["meta"].get("lineage") != self.stage_lineage(name, data):
            return None
        learnt = {it["name"]: it["fingerprint"] for it in done["encodings"]}
        if learnt != encodings or not learnt.keys() >= {*self.recipe.inputs(name)}:
            return None  # nothing tells which weights an input had that encodes nothing
        return None if taken_down(before) else before

    def warm_start(self, name: str) -> str | None:
        """Directory of the finished stage that the recipe names for a stage's first weights.
        ValueError when there is none, or pictures that it has seen were taken down.
        """
        asked, key = self.recipe.stage(name).warm_start, f"{name}.warm_start"
        if asked is None:
            return None
        found = self._named(name, asked, key)
        if seen := taken_down(found):
            raise ValueError(
                f"{key}: {asked} has learnt from pictures of {seen} that were taken down since; "
                f"train it anew, name another, or set {key}=null to start from nothing"
            )
        return found

    def _named(self, name: str, asked: str, key: str) -> str:
        if "://" in asked and not storage.is_local(asked):
            raise ValueError(f"{key}: {asked} is on no file system of this machine; copy it to one")
        if results.committed(storage.local_path(asked)):
            return storage.local_path(asked)
        model = asked.removeprefix("models:/")
        if "://" in model or model.startswith((".", "/", "~")):
            raise ValueError(f"{key}: {asked} holds no finished stage; train it first")
        version: str | None = model
        if "/" not in model:
            other, _, alias = model.partition("@")
            if alias not in ("", "champion"):
                raise ValueError(f"{key}: {asked}: only the champion can be named by an alias")
            version = Ledger(self.settings.ledger, other).champion()
        found = self.version_stages(version).get(name) if version else None
        if found is None or results.committed(found) is None:
            lacks = f"finished {name}" if version else "champion"
            raise ValueError(
                f"{key}: {asked} has no {lacks} here; train that model first, name the directory "
                f"of a finished stage, or set {key}=null to start from nothing"
            )
        return found

    def check_warm_starts(self) -> None:
        """ValueError for a warm start that would be needed and is not there."""
        if self.ledger.champion() is None:
            for name in self.recipe.stages:
                self.warm_start(name)

    def note_version(self, name: str, stages: Mapping[str, str]) -> None:
        """Remember which stages a registered version (`shapes/3`) is made of."""
        storage.publish_json(str(self._note(name)), dict(stages))

    def version_stages(self, name: str) -> dict[str, str]:
        """Stage -> where it lies; empty for a version that was made elsewhere."""
        note = self._note(name)
        noted = storage.read_json(str(note)) if note.exists() else {}
        return {stage: self.settings.stage_noted(where) for stage, where in noted.items()}

    def _note(self, name: str) -> Path:
        return self.settings.versions / f"{name}.json"

    def model_dir(self, data: Manifest) -> Path:
        """Generator, scores, package and report of the model these stages make."""
        parts = [self.stage_identity(name, data) for name in self.recipe.stages]
        recipe = self.recipe.model_dump(mode="json", include={"evaluation", "sampler"})
        samplers = {name: it for name, it in self.recipe.samplers.items() if it}
        recipe |= {"samplers": samplers} if samplers else {}
        identity = fingerprint({"stages": parts, "data": data.digest} | recipe)
        return self.settings.model(f"{self.recipe.name}-{identity}")

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.settings.ledger, self.recipe.name)
