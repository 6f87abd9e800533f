"""What was made of versions of data sets and lies outside them: pages, and versions made again.

Each is noted in the home when it is written, so that a take-down can say where pictures still are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.manifest import blocked, fingerprint

from .settings import Settings

if TYPE_CHECKING:
    from pipeline.manifest import Manifest

PAGE, DATASET = "page", "data set"


def note(here: Settings, version: Manifest, kind: str, place: str) -> None:
    """A page or a data set with pictures of a version was written there, over what there was."""
    place = storage.absolute(place)
    said = {"digest": version.digest, "dataset": version.dataset, "kind": kind, "place": place}
    storage.publish_json(str(here.copies / f"{fingerprint(place)}.json"), said)


def still_there(here: Settings, held: Mapping[str, Collection[str]]) -> list[tuple[str, str]]:
    """(kind, place) of what was made of versions that held pictures, by their digests, and may show
    them still.
    """
    found: list[tuple[str, str]] = []
    for name in storage.list_names(str(here.copies)):
        said = storage.read_json(str(here.copies / name))
        kind, place = said["kind"], said["place"]
        keys = held.get(said["digest"], ())
        if kind == DATASET:
            keys = set(keys) - blocked(place).keys()  # taken down there too
        if keys and storage.exists(place):
            found.append((kind, place))
    return sorted(found)
