"""What the commands about data sets do: plain functions from their arguments to JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import storage
from training import results

from . import copies
from .progress import meter
from .settings import Settings, settings

if TYPE_CHECKING:
    from pipeline.ingest import Scorers
    from pipeline.manifest import Manifest


NEW_SIDE = 512
"""The largest side in pixels that is stored in a new data set, unless it is said."""


def ingest(
    sources: list[str],
    dataset: str,
    side: int | None,
    rules: list[str],
    scorers: str = "[]",
) -> dict[str, Any]:
    from pipeline import manifest
    from pipeline.execute import Executor
    from pipeline.ingest import described, left_behind
    from pipeline.ingest import ingest as read
    from pipeline.reproduce import rules_of

    from .cluster import ray_session
    from .recipe import check_places, ingest_rules

    executor, models = Executor(kind="auto"), _scorers(scorers)
    dataset, urls = place(dataset), [_url(source) for source in sources]
    check_places(executor, dataset, *sources)
    there = manifest.latest(dataset)
    if side is None and there is None:
        side = NEW_SIDE
    sides = [] if side is None else [f"max_side={side}"]
    chosen = ingest_rules([*sides, *rules], rules_of(there) if there else None)
    if there and (lost := left_behind(there, urls, chosen)):
        new, old = described(chosen), there.rules
        differ = [f"{k} {old[k]} -> {new[k]}" for k in old if old[k] != new.get(k, old[k])]
        raise ValueError(
            f"{dataset}: other rules ({', '.join(differ)}) store all pictures anew, and version "
            f"{there.version} has some from {', '.join(lost)}; name these sources too, or leave "
            "the rules as they are"
        )
    with ray_session(executor.chosen == "ray"), meter("ingest") as progress:
        result = read(
            urls,
            dataset,
            chosen,
            executor,
            lambda stage, done, total: progress(done, total, stage),
            models,
        )
    counts = ", ".join(f"{what} {count}" for what, count in sorted(result.counts.items()))
    return {
        "dataset": dataset,
        "version": result.manifest.version,
        "digest": result.manifest.digest,
        "counts": dict(result.counts),
        "new": result.new,
        "reused": ["data"] if result.reused else [],
        "text": f"{dataset} version {result.manifest.version}: {counts}; {result.new} new",
    }


def reproduce(dataset: str, version: int | None, into: str) -> dict[str, Any]:
    from pipeline.execute import Executor
    from pipeline.reproduce import reproduce as make_again

    from .cluster import ray_session
    from .recipe import check_places

    executor, into = Executor(kind="auto"), place(into)
    wanted = _version(dataset, version)
    check_places(executor, into)
    with ray_session(executor.chosen == "ray"), meter("reproduce") as progress:
        made = make_again(
            wanted, into, executor, lambda stage, done, total: progress(done, total, stage)
        )
    copies.note(settings(), wanted, copies.DATASET, made.dataset)
    left = f"what is left of {wanted.dataset}" if wanted.redacted else wanted.dataset
    return {
        "dataset": made.dataset,
        "version": made.version,
        "digest": made.digest,
        "counts": dict(made.counts),
        "text": f"{made.dataset} version {made.version}: digest {made.digest}, the same shards as "
        f"{left} version {wanted.version}",
    }


def explain(dataset: str, what: str) -> dict[str, Any]:
    from pipeline import outcomes

    found = outcomes.explain(place(dataset), what)
    lines = []
    for it in found:
        reason = f": {it['reason']}" if it["reason"] else ""
        lines.append(_one_line(it["id"]))
        lines.append(f"  {it['outcome']}{reason}, since version {it['version']}")
        told = {"detail": it["detail"], "key": it["key"], "split": it["split"]}
        told |= {"shard": it["shard"], "flags": ", ".join(it["flags"])}
        lines += [f"  {name:<7} {_one_line(value)}" for name, value in told.items() if value]
        lines += [
            f"  encoder {by['encoder']} ({by['fingerprint']}) rejected it: {by['reason']}; what "
            "learns from that encoder never sees it"
            for by in it["encoders"]
        ]
    return {"rows": found, "text": "\n".join(lines)}


def show(dataset: str, version: int | None, out: str) -> dict[str, Any]:
    from evaluation import dataset_page
    from pipeline.reasons import refusals

    found = _version(dataset, version)
    dataset_page.write(out, found)
    copies.note(settings(), found, copies.PAGE, out)
    refused = {f"{it.encoder} {it.fingerprint}": len(it.keys) for it in refusals(found)}
    return {
        "dataset": found.dataset,
        "version": found.version,
        "digest": found.digest,
        "counts": dict(found.counts),
        "encoders_rejected": refused,
        "page": out,
        "text": "\n".join(
            [f"{found.dataset} version {found.version}: {found.samples()} pictures; {out}"]
            + [f"  encoder {name} rejected {count} of them" for name, count in refused.items()]
        ),
    }


def remove(dataset: str, keys: list[str], files: list[str], reason: str) -> dict[str, Any]:
    from pipeline import versions

    listed = [key for file in files for key in storage.read_bytes(_url(file)).decode().split()]
    removed = versions.remove(place(dataset), [*keys, *listed], reason)
    here = settings()
    models = _learnt_from(here, set(removed.held))
    count = len({key for held in removed.held.values() for key in held})
    lines = [
        f"{removed.manifest.dataset} version {removed.manifest.version}: {count} pictures purged "
        f"from {len(removed.held)} versions and blocked"
    ]
    if removed.absent:
        lines.append(f"keys that were in no version, blocked too: {len(removed.absent)}")
    lines += [f"  {model} saw them ({', '.join(stages)})" for model, stages in models.items()]
    if models:
        lines.append("`darkroom run RECIPE --fresh` trains without what these models have learnt")
    elsewhere = copies.still_there(here, removed.held)
    if elsewhere:
        lines.append("made of those versions, and out of reach here:")
        lines += [f"  {kind} {where}" for kind, where in elsewhere]
    if removed.alike:
        lines.append("still stored, and of the same look: " + ", ".join(removed.alike))
    if not storage.is_local(removed.manifest.dataset):
        lines.append("other machines: delete the folder `cache` of their DARKROOM_HOME")
    return {
        "version": removed.manifest.version,
        "removed": {digest: list(held) for digest, held in removed.held.items()},
        "absent": list(removed.absent),
        "alike": list(removed.alike),
        "elsewhere": [where for _, where in elsewhere],
        "models": models,
        "text": "\n".join(lines),
    }


def compact(dataset: str) -> dict[str, Any]:
    from pipeline import manifest, versions

    before = manifest.latest(place(dataset))
    after = versions.compact(place(dataset))
    shards = len(before.shards) if before else 0
    return {
        "version": after.version,
        "digest": after.digest,
        "shards": len(after.shards),
        "text": f"{after.dataset} version {after.version}: {shards} shards are {len(after.shards)}"
        if after != before
        else f"{after.dataset} version {after.version}: nothing to merge",
    }


def gc(dataset: str, keep: int, dry_run: bool) -> dict[str, Any]:
    from pipeline import versions

    garbage = versions.gc(place(dataset), keep, dry_run)
    did = "would free" if dry_run else "freed"
    expired = ", ".join(map(str, garbage.expired))
    lines = [f"{did} {garbage.bytes / 1e6:.1f} MB in {len(garbage.files)} files"]
    lines += [f"expired: versions {expired}"] if expired else []
    return {
        "files": list(garbage.files),
        "bytes": garbage.bytes,
        "expired": list(garbage.expired),
        "text": "\n".join(lines),
    }


def _one_line(text: str) -> str:
    """What strangers wrote, unable to look like lines of our own."""
    return text.replace("\n", "\u240a")


def _scorers(given: str) -> Scorers:
    """As `data.scorers` of a recipe has them."""
    from . import recipe as recipes

    return recipes.scorers(recipes.load("pictures", [f"data.scorers={given}"]))


def place(name: str) -> str:
    """A name in this home, or a path or URL."""
    return name if "/" in name else settings().dataset(name)


def _version(dataset: str, number: int | None) -> Manifest:
    """The newest where there is no number."""
    from pipeline import manifest

    url = storage.absolute(place(dataset))
    found = manifest.latest(url) if number is None else manifest.read(url, number)
    if found is None:
        raise ValueError(f"{url}: no data set there")
    return found


def _learnt_from(here: Settings, digests: set[str]) -> dict[str, list[str]]:
    """Registered model -> its stages that learnt from these data versions, or began with the
    weights of one that had.
    """
    found: dict[str, list[str]] = {}
    for note in sorted(Path(here.versions).rglob("*.json")):
        model = note.relative_to(here.versions).with_suffix("").as_posix()
        stages = storage.read_json(str(note))
        guilty = [
            name
            for name, where in stages.items()
            if any(it["data_digest"] in digests for it in results.ancestry(here.stage_noted(where)))
        ]
        if guilty:
            found[model] = guilty
    return found


def _url(source: str) -> str:
    return source if "://" in source else str(Path(source).absolute())
