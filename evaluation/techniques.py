"""What a model does beside drawing from a caption: what each of its stages draws, variations and
mixtures of pictures by their embeddings (unCLIP), pictures between two noises, holes filled, small
copies enlarged, pictures edited. But for what a base is trained to enlarge, and a copy of it to
edit, the sampling alone is conditioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import metrics
from .editing import Edits, edits
from .given import Given, bicubic
from .page import image
from .sample import Pictures

if TYPE_CHECKING:
    from pipeline.load import Loader
    from training.generator import Generator
    from training.request import Known

TURN = 0.5
"""Of a right angle: as far as unCLIP turns an embedding (sec. 3.3)."""
SHARES = 7
DRAWS = 4
FACTOR = 4


@dataclass(frozen=True)
class Technique:
    """A table of pictures, one row each."""

    title: str
    lead: str
    columns: Sequence[str]
    rows: Sequence[Pictures]
    labels: Sequence[str]
    error: float | None = None
    """Root mean square grey levels by which the drawn pictures miss what was known of them."""


def described(it: Technique) -> dict[str, Any]:
    """As the templates take it."""
    return {
        "title": it.title,
        "lead": it.lead,
        "columns": it.columns,
        "error": it.error,
        "rows": [
            {"text": text, "images": [image(picture) for picture in row]}
            for text, row in zip(it.labels, it.rows, strict=True)
        ],
    }


def techniques(
    generator: Generator,
    prompts: Sequence[str],
    pictures: Pictures,
    seed: int,
    given: Given | None = None,
    heldout: Loader | None = None,
) -> list[Technique]:
    """All that the generator can do: `prompts`, and what is `given` beside them, for what is drawn,
    real `pictures` for the rest, but for an edit those of a loader that have what it changes;
    without `heldout` none is shown. Only what draws its last pictures as pixels, in one stage, from
    nothing that shows what they are, can be held to some of them.
    """
    if not hasattr(generator, "codec"):  # a painter of another make
        return []
    given = given or Given()
    found = stages_apart(generator, prompts, seed, given)
    if given.low is not None:
        found.append(enlargements(generator, prompts, seed, given))
    if given.map is not None:
        found.append(from_maps(generator, prompts, seed, given))
    if given.real is None and hears_embeddings(generator):
        found += [
            variations(generator, pictures, seed),
            mixtures(generator, pictures, seed),
            text_differences(generator, prompts, seed),
        ]
    if generator.codec is not None:
        found.append(reconstructions(generator, pictures))
    if generator.base is None:
        found += [between_latents(generator, pictures), between_noises(generator, seed)]
    if generator.codec is None:
        found.append(interpolation(generator, prompts, seed, given))
        if not generator.enlarging and given.real is None:
            found.append(inpainting(generator, pictures, seed))
            found.append(super_resolution(generator, pictures, seed))
    if heldout is not None and (edited := edits(generator, heldout)):
        found.append(editing(edited))
    return found


def hears_embeddings(generator: Generator) -> bool:
    """Whether its base is told the embedding of a picture, and it can embed pictures."""
    base = generator.base
    return base is not None and generator.clip is not None and base.config.hears_embedding


def stages_apart(
    generator: Generator, prompts: Sequence[str], seed: int, given: Given
) -> list[Technique]:
    """One prompt a row: what each stage drew. Nothing for a model of one stage."""
    if not generator.enlarging:
        return []
    drawn = generator.stages(list(prompts), seed=seed, **given.options())
    side = generator.resolution
    columns = [f"{name}, {it.shape[1]} px" for name, it in drawn.items()]
    shown = [enlarged(it, side // it.shape[1]) for it in drawn.values()]
    lead = "One prompt a row. Each stage is told what the one before it drew."
    rows = list(np.stack(shown, axis=1))
    return [Technique("From stage to stage", lead, columns, rows, prompts)]


def reconstructions(generator: Generator, pictures: Pictures) -> Technique:
    """Pictures through the autoencoder alone."""
    again = generator.decode(generator.encode(pictures))
    return Technique(
        "Through the autoencoder",
        f"A real held-out picture, and what is left of it: "
        f"{metrics.psnr(again, pictures).mean():.1f} dB.",
        ["The picture", "Decoded"],
        list(np.stack([pictures, again], axis=1)),
        [""] * len(pictures),
    )


def between_latents(generator: Generator, pictures: Pictures) -> Technique:
    """From the latent of one real picture to that of another on a straight line."""
    import torch

    z, rows = generator.encode(pictures), []
    for k in range(0, len(pictures) - 1, 2):
        way = [z[k] + (z[k + 1] - z[k]) * share / (SHARES - 1) for share in range(SHARES)]
        drawn = generator.decode(torch.stack(way))
        rows.append(np.concatenate([pictures[k : k + 1], drawn, pictures[k + 1 : k + 2]]))
    return Technique(
        "Between the latents of two pictures",
        "From what the autoencoder makes of one real picture to what it makes of another. Where "
        "its latents fill the prior, what lies between is pictures too.",
        ["The one", *(f"{share / (SHARES - 1):.2f}" for share in range(SHARES)), "The other"],
        rows,
        [""] * len(rows),
    )


def between_noises(generator: Generator, seed: int, rows: int = 4) -> Technique:
    """From one draw of the prior to another on the sphere."""
    shares = [k / (SHARES - 1) for k in range(SHARES)]
    drawn = [generator.between("", (seed + 2 * k, seed + 2 * k + 1), shares) for k in range(rows)]
    return Technique(
        "Between two draws of the prior",
        "The latent goes from one seed's to another's on the sphere.",
        [f"{share:.2f}" for share in shares],
        drawn,
        [""] * rows,
    )


def enlargements(
    generator: Generator, prompts: Sequence[str], seed: int, given: Given
) -> Technique:
    """What a base that enlarges makes of the small pictures that it is given."""
    low, real = given.low, given.real
    assert low is not None
    assert real is not None
    count, side = len(low), generator.resolution
    drawn = [
        generator(list(prompts), seed=seed + k * count, **given.options()) for k in range(DRAWS)
    ]
    plain = bicubic(low, side)
    near, without = (metrics.psnr(it, real).mean() for it in (drawn[0], plain))
    return Technique(
        "Enlarged",
        f"It was trained for this: {low.shape[1]} px are given, {side} are drawn, each time from "
        f"other noise. PSNR to the real pictures: {near:.1f} dB, enlarged bicubically "
        f"{without:.1f}.",
        ["Given", "Bicubic", *(f"Drawn {k + 1}" for k in range(DRAWS)), "The picture"],
        list(np.stack([enlarged(low, side // low.shape[1]), plain, *drawn, real], axis=1)),
        prompts,
    )


def from_maps(generator: Generator, prompts: Sequence[str], seed: int, given: Given) -> Technique:
    """What a base that is told label maps makes of those that it is given."""
    shown, real = given.shown, given.real
    assert shown is not None
    assert given.map is not None
    assert real is not None
    count = len(given.map)
    drawn = [
        generator(list(prompts), seed=seed + k * count, **given.options()) for k in range(DRAWS)
    ]
    kept = (generator.mapped(drawn[0]) == given.map).mean()
    return Technique(
        "By a label map",
        "The map says which class each pixel is to have, in the colours of the classes; each time "
        f"other noise. Of the first draws' pixels {100 * kept:.1f} % have the class asked for.",
        ["The map", *(f"Drawn {k + 1}" for k in range(DRAWS)), "The picture"],
        list(np.stack([shown, *drawn, real], axis=1)),
        prompts,
    )


def variations(generator: Generator, pictures: Pictures, seed: int) -> Technique:
    """Pictures told the embedding of a real one alone (Ramesh et al. 2022, section 3.1)."""
    z = generator.embed(pictures)
    blank = [""] * len(pictures)
    drawn = [generator(blank, seed=seed + k * len(pictures), embeddings=z) for k in range(DRAWS)]
    return Technique(
        "Variations",
        "Of a real held-out picture only its CLIP embedding is told: what CLIP saw is kept, the "
        "rest differs.",
        ["The picture", *(f"Drawn {k + 1}" for k in range(DRAWS))],
        list(np.stack([pictures, *drawn], axis=1)),
        [""] * len(pictures),
    )


def mixtures(generator: Generator, pictures: Pictures, seed: int) -> Technique:
    """Pictures with the embeddings between those of two, on the sphere (sec. 3.2)."""
    import torch

    from training.diffusion.samplers import slerp

    shares = [k / (SHARES - 1) for k in range(SHARES)]
    z, rows = generator.embed(pictures), []
    for k in range(0, len(pictures) - 1, 2):
        between = torch.cat([slerp(z[k : k + 1], z[k + 1 : k + 2], share) for share in shares])
        drawn = generator([""] * SHARES, seed=[seed + k] * SHARES, embeddings=between)
        rows.append(np.concatenate([pictures[k : k + 1], drawn, pictures[k + 1 : k + 2]]))
    return Technique(
        "Between two pictures",
        "From the CLIP embedding of one real picture to that of another on the sphere, the noise "
        "being the same.",
        ["The one", *(f"{share:.2f}" for share in shares), "The other"],
        rows,
        [""] * len(rows),
    )


def text_differences(generator: Generator, prompts: Sequence[str], seed: int) -> Technique:
    """A picture's embedding turned towards the difference of two captions (sec. 3.3)."""
    import torch
    from torch.nn.functional import normalize

    from training.diffusion.samplers import slerp

    shares = [TURN * k / (SHARES - 1) for k in range(SHARES)]
    rows, labels = [], []
    for k, (before, after) in enumerate(zip(prompts, [*prompts[1:], prompts[0]], strict=True)):
        drawn = generator([before], seed=[seed + k])
        z, texts = generator.embed(drawn), generator.embed_texts([before, after])
        way = normalize(texts[1:] - texts[:1], dim=1)
        turned = torch.cat([slerp(z, way, share) for share in shares])
        told = {"seed": [seed + k] * SHARES, "sampler": "ddim"}
        rows.append(generator([""] * SHARES, embeddings=turned, **told))
        labels.append(f"{before} → {after}")
    return Technique(
        "Along the difference of two captions",
        "The CLIP embedding of a picture of the first caption is turned towards what the second "
        "says and the first does not.",
        [f"{share:.2f}" for share in shares],
        rows,
        labels,
    )


def interpolation(
    generator: Generator, prompts: Sequence[str], seed: int, given: Given
) -> Technique:
    """One prompt a row, its noise from that of one seed to that of another on the sphere."""
    shares = [k / (SHARES - 1) for k in range(SHARES)]
    rows = [
        generator.between(text, (seed + 2 * k, seed + 2 * k + 1), shares, **_one(given, k))
        for k, text in enumerate(prompts)
    ]
    return Technique(
        "Between two noises",
        "One prompt a row. The noise goes from one seed's to another's on the sphere; DDIM draws "
        "without fresh noise.",
        [f"{share:.2f}" for share in shares],
        rows,
        prompts,
    )


def inpainting(generator: Generator, pictures: Pictures, seed: int) -> Technique:
    """The right half is drawn anew; no caption says what is there."""
    from training.request import Known

    side = generator.resolution
    mask = np.ones((len(pictures), side, side), bool)
    mask[:, :, side // 2 :] = False
    held = _held(generator, Known(pictures, mask), len(pictures), seed)
    shown = np.where(mask[..., None], pictures, 255)
    miss = held.astype(np.float64) - pictures
    return Technique(
        "Holes filled",
        "The left half of a real held-out picture is known; the right half is drawn, without a "
        "caption.",
        _columns("Known"),
        _rows(shown, held, pictures),
        [""] * len(pictures),
        float(np.sqrt((miss[:, mask] ** 2).mean())),
    )


def super_resolution(generator: Generator, pictures: Pictures, seed: int) -> Technique:
    """A copy of 1/FACTOR the side is known; no caption says what it shows."""
    from training.request import Known

    small = _shrunk(pictures)
    held = _held(generator, Known(small.astype(np.uint8), factor=FACTOR), len(pictures), seed)
    miss = _shrunk(held.reshape(-1, *pictures.shape[1:])) - np.tile(small, (DRAWS, 1, 1, 1))
    shown = small.astype(np.uint8).repeat(FACTOR, 1).repeat(FACTOR, 2)
    return Technique(
        "Small copies enlarged",
        f"Of a real held-out picture the means of {FACTOR} x {FACTOR} pixels are known; the rest "
        "is drawn, without a caption.",
        _columns("Known"),
        _rows(shown, held, pictures),
        [""] * len(pictures),
        float(np.sqrt((miss**2).mean())),
    )


def editing(found: Edits, count: int = 12) -> Technique:
    """Held-out scenes, the first ones; nobody picks."""
    shown = (found.before, found.inverted, found.after)
    return Technique(
        f"From {found.source} to {found.target}",
        "A real held-out picture; the same after the way to noise and back, which changes nothing "
        "else; and drawn from there by the copy that was trained for the edit. Of "
        f"{len(found.keys)} pictures {found.changed.sum()} show what was asked for, "
        f"{found.kept.sum()} all else that they did.",
        ("The picture", "There and back", "Edited"),
        list(np.stack([it[:count] for it in shown], 1)),
        [""] * min(count, len(found.keys)),
    )


def _one(given: Given, row: int) -> dict[str, Any]:
    """What is given beside one prompt, as Generator.between takes it."""
    label = {} if given.labels is None else {"label": given.labels[row]}
    label |= {} if given.low is None else {"low": given.low[row]}
    return label | ({} if given.map is None else {"map": given.map[row]})


def _held(generator: Generator, known: Known, count: int, seed: int) -> Pictures:
    """[DRAWS, count, H, W, 3]: each held to what is known, from different noise."""
    return np.stack(
        [
            generator([""] * count, seed=seed + draw * count, guidance=1.0, known=known)
            for draw in range(DRAWS)
        ]
    )


def _shrunk(pictures: Pictures) -> np.ndarray:
    count, height, width, channels = pictures.shape
    squares = pictures.reshape(
        count, height // FACTOR, FACTOR, width // FACTOR, FACTOR, channels
    ).astype(np.float64)
    return squares.mean((2, 4)).round()


def enlarged(pictures: Pictures, factor: int) -> Pictures:
    """Each pixel as a square of so many."""
    return pictures.repeat(factor, axis=1).repeat(factor, axis=2)


def _columns(known: str) -> list[str]:
    return [known, *(f"Drawn {k + 1}" for k in range(DRAWS)), "The picture"]


def _rows(known: Pictures, held: Pictures, pictures: Pictures) -> list[Pictures]:
    return [
        np.stack([known[k], *held[:, k], pictures[k]]).astype(np.uint8)
        for k in range(len(pictures))
    ]
