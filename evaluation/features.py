"""Features of pictures and captions from a frozen network, and the name under which they may be
compared.

Unless a pretrained one is named, that network is the line's own CLIP: good for comparing models of
the line, blind to what it never learned to see. Features of different extractors, weights or
resizes are never compared: `tuple_id` goes with every value made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from pipeline.load import Loader
from training.measuring import fixed_rows

from .sample import Pictures

Features = Float[ndarray, "n width"]


class Extractor(Protocol):
    """What the scorecard asks of features: rows of length 1, one per picture or caption."""

    @property
    def tuple_id(self) -> Mapping[str, str]: ...
    def images(self, pictures: Pictures) -> Features: ...
    def texts(self, captions: Sequence[str]) -> Features: ...


class ClipFeatures:
    """The two towers of a CLIP: a trained stage (its own directory, or its folder in a generator),
    or a pretrained one (a folder or hub id).
    """

    def __init__(
        self, where: str | Path, *, device: str | torch.device | None = None, batch: int = 256
    ):
        from training.encoders.clip import open_judge
        from training.encoders.shapes import clip_shape
        from training.encoders.sources import open_source

        source = open_source(where, "clip")
        if source.family != "clip":
            raise ValueError(
                f"{where}: a stage of kind {source.family!r}; features come from kind 'clip'"
            )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._batch, self.side = batch, clip_shape(source)[0]
        self._towers = open_judge(source, self.device)
        self.tuple_id = {
            "extractor": f"CLIP {source.where}" if source.pretrained else "the line's own CLIP",
            "weights": source.weights_sha256(),
            "resize": f"bicubic, antialiased, to {self.side}",
        }

    def images(self, pictures: Pictures) -> Features:
        """Normalised features of uint8 pictures [n, H, W, 3] of any square size."""
        parts = [
            self._images(pictures[i : i + self._batch])
            for i in range(0, len(pictures), self._batch)
        ]
        return np.concatenate(parts)

    def texts(self, captions: Sequence[str]) -> Features:
        """Normalised features of captions."""
        chunks = (list(captions[i : i + self._batch]) for i in range(0, len(captions), self._batch))
        return np.concatenate([self._towers.texts(chunk).cpu().numpy() for chunk in chunks])

    def _images(self, pictures: Pictures) -> Features:
        x = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).to(self.device)
        return self._towers.images(x).cpu().numpy()


def pictures_of(loader: Loader, count: int, batch: int = 256) -> Pictures:
    """`count` pictures spread evenly over the samples of a loader that holds `pixels`; fewer when
    it has fewer.
    """
    rows = fixed_rows(loader.samples, count)
    parts = [loader.rows(rows[i : i + batch])["pixels"] for i in range(0, len(rows), batch)]
    return np.ascontiguousarray(np.concatenate(parts).transpose(0, 2, 3, 1))
