"""A recipe says what to make; it is JSON, and its keys have one spelling everywhere.

`key=value` on the command line, a path in a file, the place of an error and a parameter in MLflow
are the same dotted key. Stage configs are kept as plain JSON here and checked by the stage itself
(training.stages), so that asking "is this already done?" imports no torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evaluation.config import EvaluationConfig
from evaluation.gate import GatePolicy
from pipeline.execute import Executor
from pipeline.ingest import NO_SCORERS, IngestRules, Scorers
from pipeline.manifest import fingerprint
from pipeline.schema import PICTURE_EMBEDDING
from training.resuming import learning

STAGES = (
    "autoencoder", "clip", "t5", "prior", "base", "sr1", "sr2", "classifier", "noisy_clip", "edit",
)  # fmt: skip
DENOISING = ("prior", "base", "sr1", "sr2")
"""The stages that draw, in their order: a prior draws embeddings of pictures, sr1 enlarges what the
base drew, sr2 what sr1 did. All are of one kind."""
GUIDES = ("classifier", "noisy_clip")
FROZEN = ("autoencoder", "clip", "t5")
"""Trained once on a data set and kept when it grows: what they encoded stays valid."""


class RecipeError(ValueError):
    """The recipe cannot be used as it is; the message names the key."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EncodeRecipe(_Part):
    """How the base's pictures and captions are encoded."""

    max_aspect: float = Field(default=1.0, ge=1)
    """Pictures are cut to buckets of the same area, up to so many times as long as wide; 1: to
    squares."""
    multiple: int = Field(default=32, ge=1)
    """Of which the sides of buckets are multiples, in pixels."""
    flip: bool = False
    """Whether the mirror image of each picture is encoded too."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """In which the encoders compute; bf16 is faster on a GPU and about 1 % off."""

    def buckets(self, side: int) -> tuple[tuple[int, int], ...]:
        """() for squares alone. ValueError when side is no multiple."""
        if self.max_aspect == 1:
            return ()
        from pipeline.images import buckets

        return buckets(side, multiple=self.multiple, max_aspect=self.max_aspect)

    @property
    def changes(self) -> dict[str, Any]:
        """What is not as usual."""
        return self.model_dump(mode="json", exclude_defaults=True)


class DataRecipe(_Part):
    """What is learnt from."""

    sources: tuple[str, ...] = ()
    """URLs of folders, tables and tars; see pipeline.sources."""
    scenes: int = Field(default=0, ge=0)
    """Drawn scenes (pipeline.shapes), beside the sources."""
    objects: int = Field(default=1, ge=1, le=2)
    """Objects in a drawn scene."""
    side: int = Field(default=32, ge=8)
    """Side of the pictures that are learnt, in pixels."""
    dataset: str | None = None
    """URL of the data set, or its name in the home; by default that of the recipe."""
    ingest: IngestRules = IngestRules()
    scorers: tuple[dict[str, Any], ...] = ()
    """Models whose scores `ingest.scores` speaks of (training.encoders.scorers)."""
    encode: EncodeRecipe = EncodeRecipe()

    def source_urls(self, seed: int) -> tuple[str, ...]:
        drawn = (
            f"shapes://?scenes={self.scenes}&seed={seed}&side={self.side}&objects={self.objects}",
        )
        return self.sources + (drawn if self.scenes else ())

    @model_validator(mode="after")
    def _sides(self) -> DataRecipe:
        self.encode.buckets(self.side)
        return self


def kind_of(stage: str) -> str:
    """The kind (training.stages) of the stage of this name."""
    return "base" if stage in DENOISING else stage


class StageRecipe(_Part):
    """One network: its config (training.stages) and its training (training.config)."""

    config: dict[str, Any] = {}
    training: dict[str, Any] = {}
    pretrained: str | None = None
    """A path or hub id that is taken instead of training (encoders only)."""
    warm_images: int | None = None
    """Images of a retraining that starts from the champion; by default as many as from scratch."""
    warm_start: str | None = None
    """While there is no champion to start from: the directory of a finished stage, or a registered
    model whose stage of this name it is (NAME, the champion; NAME/VERSION), with weights of the
    same shapes. It may have learnt at another resolution."""
    sampler: dict[str, Any] | None = None
    """How prior, sr1 and sr2 draw (training.generator.StageSampler); the base's is the recipe's."""


class Recipe(_Part):
    """Everything that decides what model comes out, and when."""

    name: str = Field(default="shapes", pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Name of the data set, the experiment and the registered model."""
    seed: int = 0
    data: DataRecipe = DataRecipe()
    autoencoder: StageRecipe = StageRecipe()
    clip: StageRecipe = StageRecipe()
    t5: StageRecipe = StageRecipe()
    prior: StageRecipe | None = None
    """Draws the picture's CLIP embedding, which a base is told that listens to "clip_image"
    (unCLIP); none by default."""
    base: StageRecipe | None = StageRecipe()
    """Draws latents or pictures; None: the autoencoder draws alone, from N(0, I) (VAE)."""
    sr1: StageRecipe | None = None
    """Enlarges the base's pictures; none by default."""
    sr2: StageRecipe | None = None
    """Enlarges those of sr1; none by default."""
    classifier: StageRecipe | None = None
    """A judge of noisy pictures, for classifier guidance; none by default."""
    noisy_clip: StageRecipe | None = None
    """A CLIP of noisy pictures, for CLIP guidance as GLIDE has it; none by default."""
    edit: StageRecipe | None = None
    """A copy of the base that draws one thing in another's place (DiffusionCLIP); none by
    default."""
    sampler: dict[str, Any] = {"kind": "dpmpp2m", "steps": 16}
    """How pictures are drawn (training.generator.BaseSampler); the sweep chooses the guidance, and
    what `evaluation.options` names."""
    evaluation: EvaluationConfig = EvaluationConfig()
    gate: GatePolicy = GatePolicy()
    executor: Executor = Executor(kind="auto")
    parallel: int = Field(default=1, ge=1)
    """Stages that train at once, each in a process of its own; what comes of it is the same."""
    schedule: str = "0 3 * * *"
    """Cron line of the scheduled retraining."""

    @model_validator(mode="after")
    def _places(self) -> Recipe:
        apart = self.executor if self.parallel == 1 else Executor(kind="processes")
        check_places(apart, self.data.dataset or "", *self.data.sources)
        return self

    def stage(self, name: str) -> StageRecipe:
        if name not in self.stages:
            near = _nearest(name, self.stages)
            raise RecipeError(f"no stage {name!r} in recipe {self.name}{near}")
        return getattr(self, name)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of this recipe's model, in the order of their making."""
        left_out = {name: getattr(self, name) is None for name in STAGES}
        left_out["autoencoder"] = self.in_pixels
        # CLIP stays where nobody listens to it: it judges.
        drawing = [name for name in DENOISING if not left_out[name]]
        left_out["t5"] = not any("t5" in self._listens(name, ("t5",)) for name in drawing)
        order = sorted(STAGES, key=lambda name: name != "clip") if self._seen_by_clip else STAGES
        return tuple(name for name in order if not left_out.get(name))

    @property
    def in_pixels(self) -> bool:
        """Whether the base denoises the pictures themselves, not an autoencoder's latents."""
        return self.base is not None and self.base.config.get("data") == "pixels"

    def inputs(self, name: str) -> tuple[str, ...]:
        """The stages that a stage learns from."""
        if name == "autoencoder" and self._seen_by_clip:
            return ("clip",)
        if name == "edit":
            return ("clip" if self.noisy_clip is None else "noisy_clip", "base")
        if name not in DENOISING:
            return ()
        frozen = tuple(it for it in self.stages if it in FROZEN)
        if name == "base":
            silent = "t5" not in self._listens(name, ("t5",))
            return tuple(it for it in frozen if it != "t5" or not silent)
        needed = {*self._listens(name, ("clip", "t5"))}
        needed |= {"clip"} if self.is_told_embedding(name) else set()
        needed |= {"clip"} if self._aligned_with_clip(name) else set()
        return tuple(it for it in frozen if it in needed)

    @property
    def drawing(self) -> tuple[str, ...]:
        """The stages that draw."""
        return tuple(name for name in self.stages if name in DENOISING)

    def is_told_embedding(self, name: str) -> bool:
        """Whether a drawing stage's batches hold the embedding of the picture itself."""
        return name == "prior" or PICTURE_EMBEDDING in self._listens(name, ())

    def sees_pixels(self, name: str) -> bool:
        """Whether a drawing stage's batches hold the pictures as they are."""
        config = self.stage(name).config
        told = (config.get(it) for it in ("low", "map", "alignment"))
        return config.get("data") == "pixels" or any(told)

    @property
    def samplers(self) -> dict[str, dict[str, Any]]:
        """Of the stages that draw, beside the base."""
        return {it: self.stage(it).sampler or {} for it in self.drawing if it != "base"}

    def with_options(self, chosen: Mapping[str, Any]) -> Recipe:
        """The same, its samplers set as options of a call would set them: "steps" is the base's,
        "sr1.steps" that of sr1. RecipeError for a stage that does not draw.
        """
        mine, changed = dict(self.sampler), self.samplers
        for name, value in chosen.items():
            stage, dot, key = name.partition(".")
            if dot and stage not in changed:
                has = ", ".join(f"{it}." for it in changed) or "none"
                raise RecipeError(
                    f"no stage {stage!r} that draws beside the base; there are {has}, and the "
                    "base's own options have no stage before them"
                )
            if dot:
                changed[stage] = {**changed[stage], key: value}
            else:
                mine[name] = value
        stages = {
            name: self.stage(name).model_copy(update={"sampler": it})
            for name, it in changed.items()
            if it
        }
        return self.model_copy(update={"sampler": mine, **stages})

    def _listens(self, name: str, usual: tuple[str, ...]) -> tuple[str, ...]:
        stage: StageRecipe = getattr(self, name)
        said = stage.config.get("listens")
        return usual if said is None else tuple(said)

    def _aligned_with_clip(self, name: str) -> bool:
        """Whether a drawing stage's states are aligned with the recipe's own CLIP."""
        alignment = self.stage(name).config.get("alignment")
        return isinstance(alignment, dict) and not alignment.get("tower")

    @property
    def _seen_by_clip(self) -> bool:
        """Whether the autoencoder's perceptual loss looks through the recipe's own CLIP."""
        perceptual = None if self.autoencoder.pretrained else self.autoencoder.config
        perceptual = (perceptual or {}).get("perceptual")
        return isinstance(perceptual, dict) and not perceptual.get("tower")

    @property
    def identity(self) -> str:
        """Fingerprint of what decides the result; when and on how many machines does not."""
        body = self.model_dump(mode="json", exclude={"schedule", "executor", "parallel"})
        for name in self.stages:
            body[name]["training"] = learning(self.stage(name).training)
        for name in STAGES:  # what says nothing is as if it were not there
            if body[name] is None and name not in (*GUIDES, "base"):
                del body[name]
            for key in ("warm_start", "sampler"):
                if body.get(name) and body[name][key] is None:
                    del body[name][key]
        return fingerprint(body)


def check_places(executor: Executor, *urls: str) -> None:
    """RecipeError where the executor's workers would not find what lies at a URL."""
    here = [url for url in urls if url.startswith("memory://")]
    if here and executor.chosen != "local":
        raise RecipeError(
            f"{here[0]}: each worker has a memory of its own; "
            "give a folder or an object store (s3://..., gs://...)"
        )


def load(recipe: str, overrides: Iterable[str] = ()) -> Recipe:
    """A preset's name or a YAML/JSON file, with `key=value` overrides."""
    from .presets import PRESETS

    if recipe in PRESETS:
        body = _body(PRESETS[recipe]())
    elif recipe.endswith((".json", ".yaml", ".yml")):
        body = _file(Path(recipe), PRESETS)
    else:
        near = _nearest(recipe, PRESETS)
        raise RecipeError(f"no recipe {recipe!r}{near}; a file ends in .json or .yaml")
    _override(body, overrides)
    return parse(body)


def ingest_rules(overrides: Iterable[str], known: IngestRules | None = None) -> IngestRules:
    """Those of a data set that is there, or the usual ones, with `key=value` of theirs."""
    body = Recipe().model_dump(mode="json")
    if known:
        body["data"]["ingest"] = asdict(known)
    _override(body, (f"data.ingest.{override}" for override in overrides))
    return parse(body).data.ingest


def _override(body: dict[str, Any], overrides: Iterable[str]) -> None:
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise RecipeError(f"override {override!r}: expected key=value, e.g. seed=1")
        _put(body, key.split("."), _value(value), key)


def parse(body: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        raise RecipeError("; ".join(_line(body, e) for e in error.errors())) from None


def check_stages(recipe: Recipe) -> None:
    """Check the stage configs as the stages will: imports torch."""
    from training.config import TrainingConfig
    from training.stages import CONFIGS, compares_rows, reconstruct

    for name in recipe.stages:
        stage = recipe.stage(name)
        try:
            reconstruct(CONFIGS[kind_of(name)], stage.config, f"{name}.config")
            training = reconstruct(TrainingConfig, stage.training, f"{name}.training")
            if compares_rows(kind_of(name)):
                training.check_comparing(name)
        except ValueError as error:
            raise RecipeError(str(error)) from None
    _check_scorers(recipe)
    if recipe.base is None:
        _check_alone(recipe)
        return
    _check_sampler(recipe)
    _check_cascade(recipe)
    _check_options(recipe)
    for name in GUIDES:
        if getattr(recipe, name) is not None:
            _check_guide(recipe, name)
    if recipe.edit is not None:
        _check_edit(recipe)


def scorers(recipe: Recipe) -> Scorers:
    """What scores the samples: imports torch where there is any."""
    if not recipe.data.scorers:
        return NO_SCORERS
    from training.encoders import scorers

    configs = [
        scorers.config_of(it, f"data.scorers[{i}]") for i, it in enumerate(recipe.data.scorers)
    ]
    return Scorers(tuple(map(scorers.spec_of, configs)), scorers.build)


def _check_scorers(recipe: Recipe) -> None:
    try:
        given = {column for spec in scorers(recipe).specs for column in spec.columns}
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if odd := sorted(recipe.data.ingest.scores.keys() - given):
        raise RecipeError(
            f"data.ingest.scores.{odd[0]}: no scorer gives it{_nearest(odd[0], given)}; "
            "add one to data.scorers"
        )


def _check_alone(recipe: Recipe) -> None:
    """An autoencoder that draws alone has a prior, and nobody beside it."""
    if recipe.autoencoder.pretrained or recipe.autoencoder.config.get("network", {}).get(
        "codebook"
    ):
        raise RecipeError(
            "base: null leaves the autoencoder to draw from N(0, I), which needs one that is "
            "trained here, without a codebook: unset autoencoder.pretrained and "
            "autoencoder.config.network.codebook"
        )
    idle = [it for it in STAGES if it not in FROZEN and getattr(recipe, it) is not None]
    if idle:
        raise RecipeError(f"{idle[0]}: there is no base for it to work with; set it to null")
    from training.generator import BaseSampler
    from training.stages import reconstruct

    try:
        sampler = reconstruct(BaseSampler, recipe.sampler, "sampler")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    if sampler.level:
        raise RecipeError("sampler.level: there is no base that enlarges a picture; set it to 0")
    if recipe.evaluation.options:
        raise RecipeError("evaluation.options: there is no base that draws by them; set it to {}")


def _check_sampler(recipe: Recipe) -> None:
    """What only the scoring would find out, after hours of training."""
    from training.generator import BaseSampler
    from training.stages import CONFIGS, reconstruct

    base: Any = reconstruct(CONFIGS["base"], recipe.stage("base").config, "base.config")
    try:
        sampler = reconstruct(BaseSampler, recipe.sampler, "sampler")
        sampler.check_threshold(base.data, "sampler.threshold")
        if base.low:
            base.low.check(sampler.level, "sampler.level")
    except ValueError as error:
        raise RecipeError(str(error)) from None
    try:
        sampler.build_grid(base.diffusion.build_path())
    except ValueError as error:
        raise RecipeError(f"sampler: {error}") from None
    if sampler.level and not base.low:
        raise RecipeError("sampler.level: the base enlarges no picture; set base.config.low, or 0")
    if sampler.variance == "learned" and not base.network.learned_variance:
        raise RecipeError(
            "sampler.variance: 'learned' needs a network that learns it; set "
            "base.config.network.learned_variance=true, or use 'small' or 'large'"
        )


def _check_cascade(recipe: Recipe) -> None:
    """That each stage draws what the next one is told."""
    from training.generator import StageSampler
    from training.stages import CONFIGS, reconstruct

    configs: dict[str, Any] = {
        name: reconstruct(CONFIGS["base"], recipe.stage(name).config, f"{name}.config")
        for name in recipe.drawing
    }
    encoded = recipe.data.encode
    for name, given in recipe.samplers.items():
        try:
            sampler = reconstruct(StageSampler, given, f"{name}.sampler")
            sampler.check_threshold(configs[name].data, f"{name}.sampler.threshold")
            sampler.build_grid(configs[name].diffusion.build_path())
            if configs[name].low:
                configs[name].low.check(sampler.level, f"{name}.sampler.level")
        except ValueError as error:
            raise RecipeError(str(error)) from None
        if sampler.variance == "learned" and not configs[name].learned_variance:
            raise RecipeError(f"{name}.sampler.variance: 'learned' needs a network that learns it")
    for name in recipe.stages:
        if recipe.stage(name).sampler is not None and name not in recipe.samplers:
            raise RecipeError(
                f"{name}.sampler: only stages before and after the base have one; the base's is "
                "`sampler`"
            )
    for name, config in configs.items():
        if encoded.flip and recipe.is_told_embedding(name):
            raise RecipeError("data.encode.flip: CLIP embeds pictures as they are; set it to false")
        if config.map and name != "base":
            raise RecipeError(
                f"{name}.config.map: the base alone is told label maps; set it to null"
            )
        if encoded.max_aspect > 1 and (config.side or config.low or config.map):
            raise RecipeError(f"data.encode.max_aspect: {name} shrinks squares alone; set it to 1")
        drawn = config.side or recipe.data.side
        if config.data == "pixels" and recipe.data.side % drawn:
            raise RecipeError(f"{name}.config.side: got {drawn}, no divisor of data.side")
        if config.low and (drawn % config.low.side or drawn == config.low.side):
            raise RecipeError(
                f"{name}.config.low.side: got {config.low.side}, no proper divisor of {drawn}"
            )
    if configs["base"].data == "embedding":
        raise RecipeError(
            "base.config: the base draws pictures or latents: set data to moments or pixels"
        )
    if "prior" in configs:
        if configs["prior"].data != "embedding":
            raise RecipeError("prior.config.data: a prior draws embeddings; set it to embedding")
        if not recipe.is_told_embedding("base"):
            raise RecipeError(
                f"base.config.listens: a prior draws {PICTURE_EMBEDDING}, which the base does not "
                "listen to; add it, or set prior=null"
            )
    side = configs["base"].side or recipe.data.side
    for before, name in (("base", "sr1"), ("sr1", "sr2")):
        if name not in configs:
            continue
        if before not in configs:
            raise RecipeError(f"{name}: it enlarges what {before} drew, and there is none")
        low = configs[name].low
        if configs[name].data != "pixels" or low is None:
            raise RecipeError(f"{name}.config: it enlarges pictures: set data=pixels and low.side")
        if low.side != side:
            raise RecipeError(
                f"{name}.config.low.side: got {low.side}, and {before} draws {side} px; make them "
                "equal"
            )
        side = configs[name].side or recipe.data.side
    if side != recipe.data.side:
        last = recipe.drawing[-1]
        raise RecipeError(
            f"{last}.config.side: got {side}, the last stage draws data.side: {recipe.data.side}"
        )


def _check_options(recipe: Recipe) -> None:
    """Each value that the sweep will try is one that the samplers take."""
    for name, values in recipe.evaluation.options.items():
        for value in values:
            try:
                tried = recipe.with_options({name: value})
                _check_sampler(tried)
                _check_cascade(tried)
            except RecipeError as error:
                raise RecipeError(f"evaluation.options.{name}: {error}") from None


def _check_guide(recipe: Recipe, guide: str) -> None:
    """A judge of noisy pictures guides pixels, at the noise levels it was trained on."""
    from training.stages import CONFIGS, reconstruct

    if not recipe.in_pixels:
        raise RecipeError(f"{guide}: it guides pixels alone; set base.config.data=pixels")

    judge, base = (
        cast(Any, reconstruct(CONFIGS[name], recipe.stage(name).config, f"{name}.config"))
        for name in (guide, "base")
    )
    if judge.side != base.side:
        raise RecipeError(
            f"{guide}.config.side: got {judge.side}, and the base that it guides draws "
            f"{base.side}; make the two equal"
        )
    # A path is made once for each description.
    if judge.diffusion.build_path() is not base.diffusion.build_path():
        raise RecipeError(
            f"{guide}.config.diffusion: another path than that of base.config.diffusion, whose "
            "noise levels it is to judge; make the two equal"
        )


def _check_edit(recipe: Recipe) -> None:
    """An edit is judged by a CLIP of the line's own, in pixels."""
    if not recipe.in_pixels:
        raise RecipeError("edit: it edits pixels alone; set base.config.data=pixels")
    for key in ("low", "map"):
        if recipe.stage("base").config.get(key):
            raise RecipeError(
                f"edit: it edits by what draws from nothing; set base.config.{key}=null"
            )
    if recipe.stage("base").config.get("side") not in (None, 0, recipe.data.side):
        raise RecipeError("edit: it edits pictures of data.side; set base.config.side=0")
    for name in recipe.inputs("edit"):
        if not recipe.stage(name).pretrained:
            continue
        raise RecipeError(
            f"{name}.pretrained: an edit is trained, by the line's own CLIP; unset it"
        )


def _file(path: Path, presets: Mapping[str, Any]) -> dict[str, Any]:
    import yaml

    try:
        body = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"recipe file {path} does not exist") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe file {path} is neither YAML nor JSON: {error}") from None
    if not isinstance(body, dict):
        raise RecipeError(f"recipe file {path}: expected a mapping, got {type(body).__name__}")
    base = body.pop("preset", None)
    if base is None:
        return body
    if base not in presets:
        raise RecipeError(f"preset: no recipe {base!r}{_nearest(base, presets)}")
    merged = _body(presets[base]())
    _merge(merged, body)
    return merged


def _body(recipe: Recipe) -> dict[str, Any]:
    """A recipe as JSON in which each key can be replaced alone."""
    body = recipe.model_dump(mode="json")
    if options := body["evaluation"].get("options"):
        body["evaluation"]["options"] = dict(options)
    return body


def _merge(into: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _put(body: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    place = body
    for part in path[:-1]:
        inner = place.setdefault(part, {})
        if inner is None:
            inner = place[part] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{key}: {part} is a value, not a group of keys")
        place = inner
    place[path[-1]] = value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _line(body: Mapping[str, Any], error: Mapping[str, Any]) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _known(error["loc"][:-1])
        return f"{where}: unknown key{_nearest(str(error['loc'][-1]), known)}"
    return f"{where}: {error['msg']}, got {error['input']!r}"


def _known(loc: tuple[Any, ...]) -> list[str]:
    """The keys that exist at a place of the recipe."""
    import dataclasses

    model: Any = Recipe
    for part in loc:
        fields = getattr(model, "model_fields", None) or getattr(model, "__pydantic_fields__", {})
        field = fields.get(part)
        if field is None:
            return []
        choices = get_args(field.annotation)  # of `StageRecipe | None`
        described = [it for it in choices if hasattr(it, "model_fields")]
        model = described[0] if described else field.annotation
    if dataclasses.is_dataclass(model):
        return [field.name for field in dataclasses.fields(model)]
    return list(getattr(model, "model_fields", {}))


def _nearest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""
