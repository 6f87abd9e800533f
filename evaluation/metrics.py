"""A number about a model is an estimate: it is unbiased where it can be, and comes with blocks that
say how far it may be off.

Everything here is a pure function of arrays, in float64; no network is imported. Features are
[pictures, width], row i of a generated set belongs to prompt i, so that two models scored on the
same prompts and seeds can be subtracted row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

Features = Float[ndarray, "pictures width"]
Values = Float[ndarray, " values"]


@dataclass(frozen=True)
class Interval:
    """A mean and where the truth lies with this confidence, from `blocks` independent values."""

    mean: float
    low: float
    high: float
    blocks: int
    confidence: float = 0.95


@cache
def student_t(degrees: int, confidence: float) -> float:
    """Half-width factor of a two-sided Student-t interval: P(|T| <= factor) = confidence.

    With T = sqrt(v) tan(angle) the density becomes cos(angle)^(v-1), smooth on [0, pi/2]: one
    cumulative sum inverts it.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"Student-t needs degrees >= 1 and 0 < confidence < 1, got {degrees} and {confidence}"
        )
    angle = np.linspace(0, np.pi / 2, 200_001)
    density = np.cos(angle) ** (degrees - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(degrees) * np.tan(np.interp(confidence * mass[-1], mass, angle)))


def interval(values: Sequence[float] | Values, confidence: float = 0.95) -> Interval:
    """Student-t interval of the mean of independent values; ValueError with fewer than two, or
    where one is not finite.
    """
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < 2 or not np.isfinite(x).all():
        raise ValueError(
            f"an interval needs at least 2 finite values in one row, "
            f"got shape {x.shape}: {x.tolist()[:8]}"
        )
    half = student_t(len(x) - 1, confidence) * float(x.std(ddof=1)) / len(x) ** 0.5
    mean = float(x.mean())
    return Interval(mean, mean - half, mean + half, len(x), confidence)


def proportion(successes: Sequence[float] | Values, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a share of independent 0/1 values; right even where all are 1."""
    x = np.asarray(successes, np.float64)
    if not len(x) or not np.isin(x, (0, 1)).all():
        raise ValueError(f"a share needs values that are 0 or 1, got {x.tolist()[:8]}")
    n, share = len(x), float(x.mean())
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    centre, scale = (share + z2 / (2 * n)) / (1 + z2 / n), 1 / (1 + z2 / n)
    half = scale * (z2 * (share * (1 - share) / n + z2 / (4 * n * n))) ** 0.5
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n, confidence)


def block_means(values: Sequence[float] | Values, blocks: int) -> Values:
    """Means of `blocks` disjoint runs of neighbouring values (sizes differ by at most one)."""
    x = np.asarray(values, np.float64)
    if not 2 <= blocks <= len(x):
        raise ValueError(
            f"{len(x)} values cannot be dealt to {blocks} blocks: 2 to {len(x)} are possible"
        )
    return np.array([part.mean() for part in np.array_split(x, blocks)])


def mean_interval(
    values: Sequence[float] | Values, blocks: int = 16, confidence: float = 0.95
) -> Interval:
    """The mean of all values, with the interval of the means of disjoint blocks (of single values
    where these are few).
    """
    x = np.asarray(values, np.float64)
    found = interval(block_means(x, blocks) if len(x) >= 2 * blocks else x, confidence)
    mean, half = float(x.mean()), (found.high - found.low) / 2
    return Interval(mean, mean - half, mean + half, found.blocks, confidence)


def paired_difference(
    a: Sequence[float] | Values,
    b: Sequence[float] | Values,
    blocks: int | None = 16,
    confidence: float = 0.95,
) -> Interval:
    """a minus b on the same prompts and seeds, Student-t over disjoint blocks; `blocks=None`: each
    value is a block already.

    Blocks rather than single prompts: their means are near normal even where each value is 0 or 1.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(
            f"paired values must belong to the same prompts: got {a.shape} and {b.shape}"
        )
    difference = a - b
    return interval(
        difference if blocks is None else block_means(difference, min(blocks, len(difference))),
        confidence,
    )


def kid(x: Features, y: Features, *, block: int = 64) -> Values:
    """Kernel Inception distances (Bińkowski et al. 2018, eq. 4) of disjoint blocks: the unbiased
    squared MMD of each.

    The kernel is (x.y / width + 1)^3. Block k compares rows k*block..(k+1)*block of both sets; a
    remainder is left out. The mean is unbiased at any sample count and may be negative where the
    sets agree; `interval(kid(x, y))` says how sure it is.
    """
    count = min(len(x), len(y)) // block
    if block < 2 or count < 1:
        raise ValueError(
            f"KID in blocks of {block} needs that many pictures on both sides, "
            f"got {len(x)} and {len(y)}"
        )
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"features of one extractor have one width, got {x.shape[1]} and {y.shape[1]}"
        )

    def parts(z: Features) -> ndarray:
        return np.asarray(z[: count * block], np.float64).reshape(count, block, -1)

    def kernel(p: ndarray, q: ndarray) -> ndarray:
        return (p @ q.swapaxes(1, 2) / p.shape[-1] + 1) ** 3

    def off_diagonal(k: ndarray) -> Values:
        return (k.sum((1, 2)) - np.trace(k, axis1=1, axis2=2)) / (block * (block - 1))

    p, q = parts(x), parts(y)
    return off_diagonal(kernel(p, p)) + off_diagonal(kernel(q, q)) - 2 * kernel(p, q).mean((1, 2))


def frechet(mean_x: ndarray, root_x: ndarray, mean_y: ndarray, root_y: ndarray) -> float:
    """Squared Wasserstein-2 distance of two Gaussians whose covariances are root^T root.

    tr (S T)^1/2 is the nuclear norm of root_x root_y^T: no matrix square root, no eigenvalue that
    rounding made negative.
    """
    cross = np.linalg.svd(root_x @ root_y.T, compute_uv=False).sum()
    return float(((mean_x - mean_y) ** 2).sum() + (root_x**2).sum() + (root_y**2).sum() - 2 * cross)


def fid(x: Features, y: Features) -> float:
    """Fréchet distance of Gaussians fitted to two sets (Heusel et al. 2017, eq. 6), in float64.

    Biased by the sample count (a true 0.76 reads 13 at 250 pictures): information only, never
    compared across counts.
    """

    def fit(z: Features) -> tuple[ndarray, ndarray]:
        z = np.asarray(z, np.float64)
        if len(z) < 2:
            raise ValueError(f"a covariance needs at least 2 pictures, got {len(z)}")
        mean = z.mean(0)
        return mean, np.linalg.qr(z - mean, mode="r") / (len(z) - 1) ** 0.5

    return max(0.0, frechet(*fit(x), *fit(y)))


def psnr(x: ndarray, y: ndarray) -> Values:
    """Peak signal-to-noise ratio of each picture against another, in decibels, of bytes [n, H, W,
    3]. An error below that of rounding to bytes, 1/12, counts as it: 58.9 dB at most.
    """
    if x.shape != y.shape:
        raise ValueError(f"each picture needs the one it is held to: got {x.shape} and {y.shape}")
    error = ((np.asarray(x, np.float64) - y) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / np.maximum(error, 1 / 12))


def _squared_distances(x: ndarray, y: ndarray) -> ndarray:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.maximum((x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T, 0)


def precision_recall(x: Features, y: Features, *, neighbours: int = 3) -> tuple[float, float]:
    """(precision, recall) of generated x against real y (Kynkäänniemi et al. 2019, eq. 1-2)."""
    inside, covered = manifolds(x, y, neighbours=neighbours)
    return float(inside.mean()), float(covered.mean())


def manifolds(
    x: Features, y: Features, *, neighbours: int = 3
) -> tuple[Bool[ndarray, " x"], Bool[ndarray, " y"]]:
    """(which of x lie inside the union of balls around y, each as wide as its k-th nearest
    neighbour, which of y inside that around x): their means are precision and recall."""
    if min(len(x), len(y)) <= neighbours:
        raise ValueError(
            f"{neighbours} neighbours need more pictures on both sides, got {len(x)} and {len(y)}"
        )
    # Column 0 of a sorted row is the picture itself. The slack keeps exact copies inside despite
    # rounding.
    radii_x, radii_y = (
        np.sort(_squared_distances(z, z), 1)[:, neighbours] * (1 + 1e-9) + 1e-12 for z in (x, y)
    )
    between = _squared_distances(x, y)
    inside, covered = between <= radii_y, between <= radii_x[:, None]
    return np.asarray(inside.any(1)), np.asarray(covered.any(0))


def _unit(x: Features) -> Features:
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def saturation(pictures: ndarray) -> Values:
    """Share of each picture's values that are at an end of their range: uint8 [n, ...] of 0 or
    255. Guidance drives them there (Saharia et al. 2022, section 2.3)."""
    return ((pictures == 0) | (pictures == 255)).reshape(len(pictures), -1).mean(1)


def clip_score(images: Features, texts: Features) -> Values:
    """100 max(cosine, 0) of each picture with its own caption (Hessel et al. 2021, with w = 100);
    their mean is the score.
    """
    if images.shape != texts.shape:
        raise ValueError(
            f"each picture needs its caption: got features {images.shape} and {texts.shape}"
        )
    return 100 * (_unit(images) * _unit(texts)).sum(1).clip(min=0)


def retrieval_at_1(
    images: Features, texts: Features, among: int = 100, groups: Sequence[str] | None = None
) -> Values:
    """1 where a picture is nearer to its own caption than to the next among-1 captions (cyclic),
    else 0; chance is 1/among.

    With `groups`, one per caption, a picture's distractors are the captions of its own group, and
    of others only where its own has too few. A distractor with the very same features (a repeated
    caption) does not count against the picture.
    """
    count = len(images)
    if images.shape != texts.shape or not 2 <= among <= count:
        raise ValueError(
            f"retrieval among {among} needs that many captions (2 at least) and one per picture, "
            f"got {images.shape} and {texts.shape}"
        )
    similarity = _unit(images) @ _unit(texts).T
    rows, of = np.arange(count), np.zeros(count) if groups is None else np.asarray(groups)
    others = np.empty((count, among - 1), np.int64)
    for group in np.unique(of):
        own, rest = rows[of == group], rows[of != group]
        for turn, row in enumerate(own):
            others[row] = np.concatenate([own[turn + 1 :], own[:turn], rest])[: among - 1]
    return (similarity[rows, rows] >= similarity[rows[:, None], others].max(1) - 1e-9).astype(
        np.float64
    )


def nearest(x: Features, to: Features, *, chunk: int = 4096) -> Values:
    """Cosine of each row of x with the nearest row of `to`."""
    x, best = _unit(x), np.full(len(x), -1.0)
    for start in range(0, len(to), chunk):
        best = np.maximum(best, (x @ _unit(to[start : start + chunk]).T).max(1))
    return best


def memorisation(generated: Features, train: Features, heldout: Features) -> Values:
    """How much nearer each generated picture lies to the training set than held-out pictures do on
    average (cosine).

    About 0 for a model that generalises, 1 minus the held-out cosine for one that copies.
    """
    if not len(train) or not len(heldout):
        raise ValueError(
            f"memorisation needs training and held-out pictures, "
            f"got {len(train)} and {len(heldout)}"
        )
    return nearest(generated, train) - nearest(heldout, train).mean()
