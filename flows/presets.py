"""Recipes by name. `darkroom recipes` shows what a docstring says; a figure in it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evaluation.config import EvaluationConfig, Setting
from evaluation.gate import Bound, GatePolicy
from pipeline.ingest import IngestRules
from pipeline.shapes import BACKGROUNDS, COLOURS, SHAPES

from . import published
from .recipe import DataRecipe, Recipe, StageRecipe


def shapes() -> Recipe:
    """Drawn, captioned scenes at 32 px: on two CPU cores 97 % right after 11 minutes."""
    return Recipe(
        name="shapes",
        data=DataRecipe(scenes=24_000, side=32, ingest=_SCENES),
        autoencoder=StageRecipe(
            config={"network": {"channels": 32, "channel_mult": [1, 3], "latent_channels": 4}},
            training=_training(images=46_000, batch=32, learning_rate=3e-3),
        ),
        clip=StageRecipe(training=_training(images=38_000, batch=128, learning_rate=1e-3)),
        t5=StageRecipe(training=_training(images=14_000, batch=32, learning_rate=3e-3)),
        base=StageRecipe(
            config={"network": _unet(channels=64, blocks=1)},
            training=_training(images=100_000, batch=64, learning_rate=2e-3),
            warm_images=30_000,
        ),
        evaluation=EvaluationConfig(kind="shapes", guidance_scales=(2.0, 3.0, 4.5)),
        gate=GatePolicy.model_validate(
            {"absolute": {"correct": 0.9}, "non_inferior": {"correct": 0.02}}
        ),
    )


def shapes_ddpm() -> Recipe:
    """DDPM (Ho et al. 2020) with iDDPM's cosine betas, 16 px, drawn by 64 ancestral steps."""
    return _in_pixels(
        "shapes-ddpm",
        # v, as so short a training hardly learns to tell noise from noise: eps is divided by a,
        # and its loss weighs the ground's colour, which is decided there, with a^2/s^2.
        {"path": "ddpm_cosine", "prediction": "v", "times": "discrete"},
        {"kind": "ddim", "eta": 1.0, "steps": 64, "threshold": "static"},
        images=130_000,
    )


def shapes_ncsn() -> Recipe:
    """NCSN (Song & Ermon 2019): the score at every noise, 16 px, by annealed Langevin dynamics."""
    return _in_pixels(
        "shapes-ncsn",
        _EXPLODING,
        {"kind": "annealed", "steps": 24, "corrections": 8, "step_size": 0.4},
        images=200_000,
        prompts=64,
    )


def shapes_sde() -> Recipe:
    """Score-SDE (Song et al. 2021): the VE process, 16 px, by predictor and corrector."""
    return _in_pixels(
        "shapes-sde",
        _EXPLODING,
        {"kind": "euler_maruyama", "steps": 60, "corrections": 1},
        images=200_000,
        prompts=64,
    )


def shapes_edm() -> Recipe:
    """EDM (Karras et al. 2022): preconditioned, log-normal noise, 16 px, by Heun's method."""
    return _in_pixels(
        "shapes-edm",
        {
            "path": "edm",
            "prediction": "edm",
            "sigma_data": 0.65,
            "times": "lognormal",
            "times_mean": 0.0,
            "times_std": 1.2,
        },
        {"kind": "heun", "steps": 14, "grid": "karras"},
        images=150_000,
    )


def shapes_flow() -> Recipe:
    """Flow matching (Lipman et al. 2023): straight paths, logit-normal times, 16 px, by Euler."""
    return _in_pixels("shapes-flow", {"path": "flow"}, {"kind": "ddim", "steps": 24})


def shapes_classifier() -> Recipe:
    """shapes-ddpm, and what can guide it beside itself: a noise-aware classifier (Dhariwal & Nichol
    2021) and a noise-aware CLIP (GLIDE, Nichol et al. 2022). A quarter of its captions is dropped
    in training: they guide a network without captions too.
    """
    ddpm = shapes_ddpm()
    judge = {
        "network": {"in_channels": 3, "channels": 48, "blocks": 1, "patch": 2},
        "diffusion": ddpm.stage("base").config["diffusion"],
    }
    return ddpm.model_copy(
        update={
            "name": "shapes-classifier",
            "base": ddpm.stage("base").model_copy(
                update={"config": {**ddpm.stage("base").config, "caption_dropout": 0.25}}
            ),
            "classifier": StageRecipe(
                config=judge, training=_training(images=240_000, batch=64, learning_rate=1e-3)
            ),
            "noisy_clip": StageRecipe(
                config=judge, training=_training(images=150_000, batch=128, learning_rate=1e-3)
            ),
        }
    )


def shapes_glide() -> Recipe:
    """GLIDE (Nichol et al. 2022): a base of 16 px that hears the text, a stage that enlarges to 32
    and hears it too, and a noise-aware CLIP, to hold its guidance against classifier-free guidance.
    Straight paths: with the cosine's v .699 of 512 were right.
    """
    diffusion = {"path": "flow"}
    return _cascade(
        "shapes-glide",
        sides=(16, 32),
        base=_pixel_base(16, diffusion, caption_dropout=0.2),
        sr1=_enlarging(16, 32, patch=2),
        noisy_clip=StageRecipe(
            config={
                "network": {"in_channels": 3, "channels": 48, "blocks": 1, "patch": 2},
                "diffusion": diffusion,
                "side": 16,
            },
            training=_training(images=150_000, batch=128, learning_rate=1e-3),
        ),
    )


def shapes_cdm() -> Recipe:
    """CDM (Ho et al. 2022): scenes of 16 px, enlarged to 32 and to 64; what is enlarged is damaged
    in training, by noise for the first and by a blur for the second, and they are told how much.
    Other than there they denoise what the small picture lacks, not the whole.
    """
    diffusion = {"path": "cosine", "prediction": "v", "times": "uniform"}
    return _cascade(
        "shapes-cdm",
        sides=(16, 32, 64),
        base=_pixel_base(16, diffusion),
        sr1=_enlarging(16, 32, patch=2),
        sr2=_enlarging(32, 64, patch=4, augment="blur", strongest=1.0),
        options={"sr1.level": (0.0, 0.05, 0.15), "sr2.level": (0.0, 0.25, 0.5)},
    )


def shapes_imagen() -> Recipe:
    """Imagen (Saharia et al. 2022): T5 alone is heard, which reads pieces of words as the published
    one does; a base of 16 px that predicts v, an Efficient U-Net from 16 to 64 px, noise on what is
    enlarged, dynamic thresholding. Other than there that one denoises what the small picture lacks,
    by EDM's prediction.
    """
    diffusion = {"path": "flow", "prediction": "v"}
    dynamic = {"threshold": "dynamic", "threshold_quantile": 0.95}
    efficient = {
        "kind": "efficient_unet",
        "channels": 32,
        "channel_mult": [1, 2, 3],
        "blocks": [1, 1, 2],
        "attention": [0, 0, 1],
        "head_width": 32,
        "context_width": 128,
    }
    recipe = _cascade(
        "shapes-imagen",
        sides=(16, 64),
        base=_pixel_base(16, diffusion, listens=["t5"], standardized=["t5"]),
        sr1=_enlarging(
            16, 64, network=efficient, listens=["t5"], standardized=["t5"], sampler=dynamic
        ),
    )
    t5 = recipe.stage("t5").model_copy(
        # Over bytes its states say too little of a caption: .018 were right, for a shape is spelt.
        update={"config": {"vocabulary": 8192, "max_pieces": 32}}
    )
    return recipe.model_copy(update={"t5": t5, "sampler": {**recipe.sampler, **dynamic}})


def shapes_unclip() -> Recipe:
    """unCLIP (Ramesh et al. 2022): a prior draws the CLIP embedding of the picture that is to come,
    a decoder of 16 px is told it and the caption, a stage enlarges to 32.
    """
    diffusion = {"path": "cosine", "prediction": "v", "times": "uniform"}
    base = _pixel_base(
        16, {"path": "flow"}, listens=["clip", "t5", "clip_image"], context_dropout=0.1
    )
    return _cascade(
        "shapes-unclip",
        sides=(16, 32),
        base=base,
        sr1=_enlarging(16, 32, patch=2, listens=[]),
        prior=StageRecipe(
            config={
                "data": "embedding",
                "listens": ["clip"],
                "network": {"kind": "prior", "width": 192, "depth": 4, "head_width": 32},
                "diffusion": {**diffusion, "prediction": "x0"},
            },
            training=_training(images=200_000, batch=128, learning_rate=1e-3),
            sampler={"kind": "dpmpp2m", "steps": 12, "guidance": 1.5, "candidates": 2},
            warm_images=50_000,
        ),
    )


def shapes_ldm() -> Recipe:
    """LDM (Rombach et al. 2022): `shapes` with the published autoencoder's losses, a perceptual one
    through the recipe's own CLIP and a discriminator of patches.
    """
    like = shapes()
    # At a weight of .5, a rate of 3e-3 and from 20,000 on the discriminator won: 28.8 dB fell to
    # 13, of which 24 were found again, and .527 of 512 scenes were right.
    adversarial = {"weight": 0.1, "start_images": 30_000}
    judged = {"perceptual": {"weight": 0.5}, "adversarial": adversarial}
    autoencoder = {
        "config": {**like.autoencoder.config, **judged},
        "training": {**like.autoencoder.training, "learning_rate": 1.5e-3},
    }
    return like.model_copy(
        update={
            "name": "shapes-ldm",
            "data": like.data.model_copy(update={"dataset": "shapes"}),
            "autoencoder": like.autoencoder.model_copy(update=autoencoder),
        }
    )


def shapes_ldm_vq() -> Recipe:
    """shapes-ldm with a codebook of 512 vectors in the place of the divergence (VQ-reg., Rombach et
    al. 2022, section 3.1); for `compare` with it, which pairs what both autoencoders leave.
    """
    like = shapes_ldm()
    before = like.autoencoder.config
    network = {**before["network"], "codebook": {"codes": 512, "revive_images": 6_000}}
    config = {**before, "network": network}
    return like.model_copy(
        update={
            "name": "shapes-ldm-vq",
            "autoencoder": like.autoencoder.model_copy(update={"config": config}),
        }
    )


def shapes_vae() -> Recipe:
    """VAE (Kingma & Welling 2014) as a generator: each scene is 10 numbers that are held to
    N(0, 1), and pictures are drawn from there. It hears no caption, so that nothing but luck shows
    what was asked; `legible` says in how many pictures a scene can be told at all.
    """
    like = shapes()
    network = {
        "patch": 4,
        "channels": 64,
        "channel_mult": [1, 2],
        "latent_channels": 10,
        "dense": 32,
    }
    # Gaussians alone: the loss is the bound on the likelihood, its deviation that of the errors.
    loss = {"l1": 0.0, "l2": 1.0, "edges": 0.0, "kl": 4e-3, "kl_warm_images": 72_000}
    return like.model_copy(
        update={
            "name": "shapes-vae",
            "data": like.data.model_copy(update={"dataset": "shapes"}),
            "autoencoder": StageRecipe(
                config={"network": network, **loss},
                training=_training(images=120_000, batch=64, learning_rate=2e-3),
            ),
            "base": None,
            # It hears nothing that guidance could lead to.
            "evaluation": EvaluationConfig(kind="shapes", guidance_scales=(1.0,)),
            "gate": GatePolicy.model_validate(
                {"absolute": {"legible": 0.2}, "non_inferior": {"legible": 0.02}}
            ),
        }
    )


def shapes_autoencoder() -> Recipe:
    """shapes-vae without its divergence: it reconstructs better, and what N(0, I) draws is nothing;
    for `compare`, not for service."""
    like = shapes_vae()
    config = {**like.autoencoder.config, "kl": 0.0, "kl_warm_images": 0}
    return like.model_copy(
        update={
            "name": "shapes-autoencoder",
            "autoencoder": like.autoencoder.model_copy(update={"config": config}),
            "gate": GatePolicy.model_validate(
                {"absolute": {}, "non_inferior": {"kid": {"margin": 1.0, "samples": 8}}}
            ),
        }
    )


def shapes_ldm_class() -> Recipe:
    """shapes-ldm told classes, not captions: 48 of them, a colour and a shape each, by which alone
    it is judged. Shares its autoencoder and CLIP.
    """
    answers = {"colour": list(COLOURS), "shape": list(SHAPES)}
    attributes = [{"name": name, "answers": them} for name, them in answers.items()]
    return _conditioned("shapes-ldm-class", shapes_ldm(), listens=[], attributes=attributes)


def shapes_ldm_low() -> Recipe:
    """shapes-ldm told a picture of the latents' side, 8 px, beside the caption, as LDM enlarges
    (Rombach et al. 2022, section 4.4). Shares its autoencoder, CLIP and T5.
    """
    recipe = _conditioned("shapes-ldm-low", shapes_ldm(), low={"side": 8, "augment": "none"})
    return _held_to(recipe, psnr_gain=0.0)  # above what bicubic enlargement has


def shapes_ldm_map() -> Recipe:
    """shapes-ldm told which colour each pixel has, beside the caption: semantic synthesis (Rombach
    et al. 2022, section 4.3.2). Shares its autoencoder, CLIP and T5.
    """
    palette = [[name, list(colour)] for name, colour in {**COLOURS, **BACKGROUNDS}.items()]
    recipe = _conditioned("shapes-ldm-map", shapes_ldm(), map={"palette": palette})
    return _held_to(recipe, map_agreement=0.9)  # .98 can be reached, .17 is chance


def shapes_sr3() -> Recipe:
    """SR3 (Saharia et al. 2021): super-resolution alone, scenes of 16 px enlarged to 32 without a
    word. The oracle reads a bicubic enlargement rightly too; the gate wants a better PSNR than it.
    """
    base = _enlarging(16, 32, patch=2, images=60_000, augment="none", listens=[])
    recipe = _cascade("shapes-sr3", sides=(32,), base=base.model_copy(update={"sampler": None}))
    return _held_to(recipe, psnr_gain=0.0).model_copy(
        update={
            "sampler": base.sampler,
            # Without words there is nothing that guidance could lead to.
            "evaluation": EvaluationConfig(
                kind="shapes", guidance_scales=(1.0,), options={"steps": (2, 4, 8, 16)}
            ),
        }
    )


def shapes_two() -> Recipe:
    """Two objects and how they lie, in latents at 32 px: a tenth of the pairs of objects is held
    out as a whole, in every relation and on every ground, and asked for in half of the prompts.
    """
    one = shapes()
    return one.model_copy(
        update={
            "name": "shapes-two",
            "data": DataRecipe(scenes=24_000, side=32, objects=2, ingest=_SCENES),
            "clip": StageRecipe(training=_training(images=60_000, batch=128, learning_rate=1e-3)),
            "t5": StageRecipe(training=_training(images=20_000, batch=32, learning_rate=3e-3)),
            "base": StageRecipe(
                config={"network": _unet(channels=64, blocks=1)},
                training=_training(images=190_000, batch=64, learning_rate=2e-3),
                warm_images=60_000,
            ),
            "gate": GatePolicy.model_validate(
                {
                    "absolute": {"correct": 0.85, "correct_unseen": 0.6},
                    "non_inferior": {"correct": 0.02},
                }
            ),
        }
    )


def shapes_diffusionclip() -> Recipe:
    """DiffusionCLIP (Kim et al. 2022): a copy of shapes-flow's base is taught to draw blue what was
    red, by a noise-aware CLIP, and held to the outlines of what it edits. The gate asks of 64
    held-out scenes that the colour has changed in 0.8 of them and nothing else in 0.9.
    """
    flow = shapes_flow()
    return flow.model_copy(
        update={
            "name": "shapes-diffusionclip",
            "noisy_clip": StageRecipe(
                config={
                    "network": {"in_channels": 3, "channels": 48, "blocks": 1, "patch": 2},
                    "diffusion": flow.stage("base").config["diffusion"],
                },
                training=_training(images=90_000, batch=128, learning_rate=1e-3),
            ),
            "edit": StageRecipe(
                config={
                    "direction": 2.0,
                    "reconstruction": 0.4,
                    "structure": 2.0,
                    "inversion_steps": 14,
                    "judged_noise": 0.15,
                },
                # An eighth of the scenes is red: 16 of a batch.
                training=_training(images=51_200, batch=128, learning_rate=3e-4),
            ),
            "gate": flow.gate.model_copy(
                update={
                    "absolute": {
                        **flow.gate.absolute,
                        "edit_changed": Bound(at_least=0.8, samples=64),
                        "edit_kept": Bound(at_least=0.9, samples=64),
                    },
                }
            ),
        }
    )


def emoji_imagen() -> Recipe:
    """shapes-imagen for your own captioned pictures at 64 px: set data.sources and a name; T5 reads
    the captions, 16 px are drawn and enlarged to 64. The threshold is static: what a dynamic one
    divides by where something exceeds the range dims white grounds, too.
    """
    recipe = _of_pictures("emoji-imagen", shapes_imagen(), images=300_000)
    static = {"threshold": "static"}
    enlarging = recipe.stage("sr1")
    sr1 = enlarging.model_copy(update={"sampler": {**(enlarging.sampler or {}), **static}})
    return recipe.model_copy(update={"sampler": {**recipe.sampler, **static}, "sr1": sr1})


def emoji_unclip() -> Recipe:
    """shapes-unclip for your own captioned pictures at 64 px: set data.sources and a name; a prior
    draws CLIP embeddings, 16 px are drawn and enlarged to 64.
    """
    like = shapes_unclip()
    efficient = shapes_imagen().sr1
    assert efficient is not None
    silent = efficient.model_copy(update={"config": {**efficient.config, "listens": []}})
    return _of_pictures("emoji-unclip", like.model_copy(update={"sr1": silent}), images=300_000)


def _conditioned(name: str, like: Recipe, **told: Any) -> Recipe:
    """A recipe whose base is told something else, or more."""
    base = like.stage("base")
    base = base.model_copy(update={"config": {**base.config, **told}})
    return like.model_copy(update={"name": name, "base": base})


def _held_to(recipe: Recipe, **least: float) -> Recipe:
    """With more that the gate asks for."""
    gate = recipe.gate.model_copy(update={"absolute": {**recipe.gate.absolute, **least}})
    return recipe.model_copy(update={"gate": gate})


def _of_pictures(name: str, like: Recipe, *, images: int) -> Recipe:
    """A recipe of scenes for the data of `pictures`, its base wider and trained for longer."""
    own = pictures()
    network = {**like.stage("base").config["network"], "channels": 96}
    base = like.stage("base").model_copy(
        update={
            "config": {**like.stage("base").config, "network": network},
            "training": _training(images=images, batch=64, learning_rate=1.5e-3),
        }
    )
    taken = ("data", "clip", "evaluation")
    # Of 100 captions, by luck .01; of pictures with a style, in styles not seen of that name.
    gate = own.gate.model_copy(update={"absolute": {"retrieval_heldout": 0.2}})
    t5 = own.stage("t5").model_copy(update={"config": like.stage("t5").config})
    return like.model_copy(
        update={"name": name, "base": base, "t5": t5, "gate": gate}
        | {key: getattr(own, key) for key in taken}
    )


def _cascade(
    name: str,
    *,
    sides: tuple[int, ...],
    base: StageRecipe,
    options: Mapping[str, tuple[Setting, ...]] | None = None,
    **stages: StageRecipe,
) -> Recipe:
    """Scenes drawn in pixels, small ones first; `options` are swept. Recipes of one last side share
    data, CLIP and T5, those of 32 px with `shapes` too.
    """
    side, like = sides[-1], shapes()
    return Recipe(
        name=name,
        data=like.data.model_copy(
            update={"side": side, "dataset": "shapes" if side == 32 else f"shapes-{side}"}
        ),
        clip=like.clip,
        t5=like.t5,
        base=base,
        sampler={"kind": "dpmpp2m", "steps": 16, "threshold": "static"},
        evaluation=EvaluationConfig(
            kind="shapes", guidance_scales=(2.0, 3.0, 4.5), options=dict(options or {})
        ),
        gate=GatePolicy.model_validate(
            {"absolute": {"correct": 0.85}, "non_inferior": {"correct": 0.02}}
        ),
    ).model_copy(update=stages)


def _pixel_base(side: int, diffusion: dict[str, Any], **more: Any) -> StageRecipe:
    """A base whose pictures are enlarged by other stages."""
    return StageRecipe(
        config={
            "data": "pixels",
            "side": side,
            "network": {**_unet(channels=64, blocks=1), "patch": 2},
            "diffusion": diffusion,
            **more,
        },
        training=_training(images=115_000, batch=64, learning_rate=2e-3),
        warm_images=30_000,
    )


def _enlarging(
    low: int,
    side: int,
    *,
    patch: int = 1,
    network: dict[str, Any] | None = None,
    images: int = 24_000,
    augment: str = "noise",
    strongest: float = 0.3,
    listens: list[str] | None = None,
    sampler: dict[str, Any] | None = None,
    **more: Any,
) -> StageRecipe:
    """A stage that enlarges from `low` to `side` pixels, damaged by up to `strongest`. It learns
    what the small picture lacks, a tenth of the data's deviation. As a v of the whole picture, of
    which the small one is a mere condition, 40,000 pictures took a base's .84 right to .54; like
    this 12,000 keep all of it.
    """
    return StageRecipe(
        config={
            "data": "pixels",
            "side": side,
            "low": {
                "side": low,
                "augment": augment,
                "strongest": strongest,
                "residual": True,
            },
            "network": network
            or {
                "kind": "unet",
                "channels": 48,
                "channel_mult": [1, 2],
                "blocks": 1,
                "attention": [0, 0],
                "head_width": 32,
                "patch": patch,
            },
            "listens": listens,
            "diffusion": {
                "path": "cosine",
                "prediction": "edm",
                "sigma_data": 0.15,
                "times": "lognormal",
                "times_mean": -2.0,
                "times_std": 1.5,
            },
            **more,
        },
        training=_training(images=images, batch=64, learning_rate=1.5e-3),
        # More steps only add noise that so small a network leaves.
        sampler={"kind": "dpmpp2m", "steps": 4, "threshold": "static", **(sampler or {})},
        warm_images=20_000,
    )


_SCENES = IngestRules(shard_samples=3000, near_duplicates="keep")
"""Scenes that differ in a small shape's colour are two scenes."""

_EXPLODING = {
    "path": "ve",
    "sigma_min": 0.02,
    "sigma_max": 20.0,
    # The score by way of the preconditioned network: with the noise (or the score) itself as its
    # output x0 = x - sigma F is wrong by sigma times F's error, and 5 to 9 % were right.
    "prediction": "edm",
    "sigma_data": 0.65,
    "times": "uniform",
}
"""Variance-exploding, its levels geometric: what NCSN and score-SDE share, weights included."""


def _in_pixels(
    name: str,
    diffusion: dict[str, Any],
    sampler: dict[str, Any],
    *,
    images: int = 115_000,
    prompts: int = 512,
) -> Recipe:
    """Scenes of 16 px, denoised as they are. These recipes differ in their diffusion alone, and
    share data, CLIP and T5: with other `data` or another `seed`, set `data.dataset` too. Samplers
    of hundreds of calls are scored on fewer prompts.
    """
    return Recipe(
        name=name,
        data=DataRecipe(scenes=24_000, side=16, dataset="shapes-16", ingest=_SCENES),
        clip=StageRecipe(training=_training(images=40_000, batch=128, learning_rate=1e-3)),
        t5=StageRecipe(training=_training(images=16_000, batch=32, learning_rate=3e-3)),
        base=StageRecipe(
            config={
                "data": "pixels",
                "network": {**_unet(channels=64, blocks=1), "patch": 2},
                "diffusion": diffusion,
            },
            training=_training(images=images, batch=64, learning_rate=2e-3),
            warm_images=30_000,
        ),
        sampler=sampler,
        evaluation=EvaluationConfig(
            kind="shapes",
            prompts=prompts,
            sweep_prompts=min(96, prompts // 2),
            guidance_scales=(2.0, 3.0, 4.5),
        ),
        gate=GatePolicy.model_validate(
            {
                "absolute": {"correct": 0.6},
                "non_inferior": {"correct": 0.02},
                "min_samples": min(100, prompts),
            }
        ),
    )


def pictures() -> Recipe:
    """Your own captioned pictures at 64 px: set data.sources, e.g. '["photos"]', and a name. 7,266
    emoji took 36 minutes on two CPU cores; 83 % of held-out ones were found again among 100.
    """
    return Recipe(
        name="pictures",
        data=DataRecipe(side=64, ingest=IngestRules(shard_samples=1024, unseen_share=0.03)),
        autoencoder=StageRecipe(
            config={
                "network": {
                    "patch": 4,
                    "channels": 96,
                    "channel_mult": [1, 2],
                    "latent_channels": 16,
                },
            },
            training=_training(images=75_000, batch=32, learning_rate=2e-3),
        ),
        clip=StageRecipe(
            config={
                "embed": 128,
                "image": {"kind": "resnet", "side": 64, "width": 32},
                "text": {"width": 128, "layers": 3, "heads": 4},
                "shift": 4,
            },
            training=_training(images=90_000, batch=256, learning_rate=1e-3),
        ),
        t5=StageRecipe(training=_training(images=40_000, batch=64, learning_rate=3e-3)),
        base=StageRecipe(
            config={"network": _unet(channels=96, blocks=1)},
            training=_training(images=180_000, batch=64, learning_rate=1.5e-3),
            warm_images=60_000,
        ),
        evaluation=EvaluationConfig(kind="captions", guidance_scales=(2.0, 3.0, 5.0)),
        gate=GatePolicy.model_validate(
            {"absolute": {"retrieval": 0.05}, "non_inferior": {"retrieval": 0.05}}
        ),
    )


def _unet(*, channels: int, blocks: int) -> dict[str, Any]:
    """A latent U-Net that reads the text at half the latents' side, where a CPU can afford it."""
    return {
        "kind": "unet",
        "channels": channels,
        "channel_mult": [1, 2],
        "blocks": blocks,
        "attention": [0, 1],
    }


def _training(*, images: int, batch: int, learning_rate: float, **more: Any) -> dict[str, Any]:
    """A training whose warm-up, averaging and checkpoints are shares of its length."""
    return {
        "images": images,
        "batch": batch,
        "learning_rate": learning_rate,
        "warmup_images": images // 30,
        "schedule": "linear",
        "ema_halflife_images": images / 60,
        "precision": "auto",
        "checkpoint_images": images // 5,
        "log_images": max(batch, images // 60),
        **more,
    }


PRESETS: Mapping[str, Callable[[], Recipe]] = {
    "shapes": shapes,
    "shapes-ddpm": shapes_ddpm,
    "shapes-ncsn": shapes_ncsn,
    "shapes-sde": shapes_sde,
    "shapes-edm": shapes_edm,
    "shapes-flow": shapes_flow,
    "shapes-classifier": shapes_classifier,
    "shapes-glide": shapes_glide,
    "shapes-cdm": shapes_cdm,
    "shapes-imagen": shapes_imagen,
    "shapes-unclip": shapes_unclip,
    "shapes-ldm": shapes_ldm,
    "shapes-ldm-vq": shapes_ldm_vq,
    "shapes-vae": shapes_vae,
    "shapes-autoencoder": shapes_autoencoder,
    "shapes-ldm-class": shapes_ldm_class,
    "shapes-ldm-low": shapes_ldm_low,
    "shapes-ldm-map": shapes_ldm_map,
    "shapes-sr3": shapes_sr3,
    "shapes-two": shapes_two,
    "shapes-diffusionclip": shapes_diffusionclip,
    "pictures": pictures,
    "emoji-imagen": emoji_imagen,
    "emoji-unclip": emoji_unclip,
    "latent-unet-256": published.latent_unet_256,
    "latent-dit-256": published.latent_dit_256,
    "latent-dit-512": published.latent_dit_512,
    "sd-512": published.sd_512,
    "glide-64-256": published.glide_64_256,
    "imagen-64-256-1024": published.imagen_64_256_1024,
    "unclip-64-256-1024": published.unclip_64_256_1024,
}
