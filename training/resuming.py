"""What may change when a training goes on, and what is said of that which may not.

Asked without torch: a stage is identified by what may not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

MACHINE = ("workers", "min_workers", "threads", "fsdp", "micro_batch", "accelerator", "device")
"""By whom and how it is computed."""
WATCHED = (
    "checkpoint_images",
    "keep_last",
    "keep_best",
    "keep_images",
    "log_images",
    "preview_images",
    "stall_seconds",
    "max_skipped",
)
"""What is kept and shown of it, and when it is given up; what it ends with is the same."""
PLACES = ("output", "meta", "fingerprint")
"""Of a job: where it lies and what is told of it. Fingerprints are compared by themselves."""

_SHOWN = 60
"""Characters of a value."""


def learning(training: Mapping[str, Any]) -> dict[str, Any]:
    """A training config without what may differ between machines, or change when it goes on."""
    free = MACHINE + WATCHED
    if not training.get("patience_images"):  # which decides when it ends, and goes by these
        free += ("heldout_pictures", "heldout_images")
    return {key: value for key, value in training.items() if key not in free}


def differences(begun: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """`training.batch: begun with 64, asked 128` for each key of two jobs (JSON) that may not
    change and has."""
    return list(_differences(_deciding(begun), _deciding(asked)))


def _deciding(job: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in job.items() if key not in PLACES}
    # Moved as a whole they keep their names, in which fingerprints stand.
    kept |= {key: _name(kept[key]) for key in ("dataset", "parent") if kept.get(key)}
    kept["inputs"] = {stage: _name(place) for stage, place in kept.get("inputs", {}).items()}
    training = learning(kept.get("training", {}))
    training.pop("seed", None)  # the job's own counts
    return kept | {"training": training}


def _name(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _differences(
    begun: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    keys = sorted(begun.keys() | asked.keys())
    if begun.get("kind") != asked.get("kind"):
        keys = ["kind"]  # whose other keys are not to be compared
    for key in keys:
        one, other = begun.get(key), asked.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}: begun with {_shown(begun, key)}, asked {_shown(asked, key)}"


def _shown(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "nothing"
    text = json.dumps(values[key])
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
