"""A trained stage with averages of another length: chosen afterwards, at the cost of a few reads.

Training with `ema_sigma_rel` leaves snapshots of power-function averages in the stage directory,
checkpoints of them alone. They are added up to the average of any length, at any snapshot's images
(Karras et al. 2024, EDM2, section 3 and appendix C).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import storage

from . import checkpoint, results
from .ema import mixture

AVERAGED = "averaged.json"


@dataclass(frozen=True)
class Average:
    """Weights that were added up."""

    weights: dict[str, Tensor]
    """float32, by parameter name."""
    images_seen: int
    sigma_rel: float
    profile_error: float
    """How far the snapshots' profiles together are from the wanted one, as a share of its norm:
    from 0.05 and 0.1, at 16 times, it is 0.003 for 0.06 to 0.12, 0.02 for 0.2 and 0.04 for 0.03.
    """
    snapshots: int
    """How many there were, in time."""


def average(
    stage_dir: str | os.PathLike[str], sigma_rel: float, images_seen: int | None = None
) -> Average:
    """The average of length `sigma_rel` as it was at `images_seen`: by default, at the newest
    snapshot.

    ValueError when there is no snapshot, or none at those images; Damaged when one is not what was
    written.
    """
    directory = Path(stage_dir, results.AVERAGES)
    paths = {int(path.name): path for path in checkpoint.visible(directory)}
    at = max(paths, default=0) if images_seen is None else images_seen
    if at not in paths:
        known = ", ".join(map(str, paths)) or "none at all"
        raise ValueError(
            f"{directory}: no snapshot of averages at {at} images (there are: {known}); train with "
            "ema_sigma_rel=[0.05,0.1] and ema_snapshot_images, or choose one of these"
        )
    used = [path for images, path in paths.items() if images <= at]
    described = [json.loads((path / checkpoint.DESCRIPTION).read_bytes()) for path in used]
    pairs = [(one["images_seen"], s) for one in described for s in one["numbers"]["sigma_rel"]]
    factors, off = mixture(pairs, at, sigma_rel)

    total: dict[str, Tensor] = {}
    remaining = iter(factors.tolist())
    for path, one in zip(used, described, strict=True):
        found = checkpoint.load(path)
        for own in one["numbers"]["sigma_rel"]:
            factor = next(remaining)
            for name, tensor in found.part(f"{checkpoint.POWER}/{own:g}").items():
                if name not in total:
                    total[name] = torch.zeros(tensor.shape, dtype=torch.float64)
                total[name].add_(tensor, alpha=factor)
    weights = {name: tensor.float() for name, tensor in total.items()}
    return Average(weights, at, sigma_rel, off, len(used))


def export(
    stage_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    sigma_rel: float,
    images_seen: int | None = None,
) -> dict[str, Any]:
    """Write a finished stage's module with that `average`, for `stages.load`; return what
    averaged.json says.

    What the stage measured (a latent scale) stays as it is. A directory with an averaged.json is
    whole. ValueError when the stage is not finished.
    """
    done = results.committed(stage_dir)
    if done is None:
        raise ValueError(f"{stage_dir}: no finished stage ({results.STAGE} is missing)")
    found, target = average(stage_dir, sigma_rel, images_seen), Path(out)
    weights = load_file(Path(stage_dir, results.WEIGHTS))
    averaged = {n: t for n, t in found.weights.items() if n in weights}  # not what only trains
    assert averaged, "both name what is trained alike"
    target.mkdir(parents=True, exist_ok=True)
    (target / AVERAGED).unlink(missing_ok=True)
    hidden = target / f".{results.WEIGHTS}"
    save_file(weights | averaged, hidden)
    described = {
        "images_seen": found.images_seen,
        "of": done["fingerprint"],
        "profile_error": found.profile_error,
        "sigma_rel": found.sigma_rel,
        "snapshots": found.snapshots,
        "weights_sha256": storage.sha256(hidden),
    }
    storage.publish_file(hidden, str(target / results.WEIGHTS))
    shutil.copyfile(Path(stage_dir, results.CONFIG), target / results.CONFIG)
    storage.publish_json(str(target / AVERAGED), described)
    return described
