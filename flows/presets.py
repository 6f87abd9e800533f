"""Recipes by name. `darkroom recipes` shows what a docstring says; a figure in it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evaluation.config import EvaluationConfig
from evaluation.gate import GatePolicy
from pipeline.ingest import IngestRules
from pipeline.shapes import BACKGROUNDS, COLOURS, SHAPES

from .recipe import DataRecipe, EncodeRecipe, Recipe, StageRecipe


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
    """
    diffusion = {"path": "cosine", "prediction": "v", "times": "uniform"}
    return _cascade(
        "shapes-cdm",
        sides=(16, 32, 64),
        base=_pixel_base(16, diffusion),
        sr1=_enlarging(16, 32, patch=2),
        sr2=_enlarging(32, 64, patch=4, augment="blur", strongest=1.0),
    )


def shapes_imagen() -> Recipe:
    """Imagen (Saharia et al. 2022): T5 alone is heard; a base of 16 px, an Efficient U-Net from 16
    to 64 px, v-prediction, noise on what is enlarged, dynamic thresholding.
    """
    diffusion = {"path": "cosine", "prediction": "v", "times": "uniform"}
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
    return recipe.model_copy(update={"sampler": {**recipe.sampler, **dynamic}})


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
    judged = {"perceptual": {"weight": 0.5}, "adversarial": {"weight": 0.5}}
    autoencoder = {"config": {**like.autoencoder.config, **judged}}
    return like.model_copy(
        update={
            "name": "shapes-ldm",
            "data": like.data.model_copy(update={"dataset": "shapes"}),
            "autoencoder": like.autoencoder.model_copy(update=autoencoder),
        }
    )


def shapes_vae() -> Recipe:
    """VAE (Kingma & Welling 2014) as a generator: each scene is 32 numbers that are held to
    N(0, 1), and pictures are drawn from there. It hears no caption, so that nothing but luck shows
    what was asked; `legible` says in how many pictures a scene can be told at all.
    """
    like = shapes()
    network = {
        "patch": 4,
        "channels": 64,
        "channel_mult": [1, 2, 4, 4],
        "latent_channels": 32,
    }
    return like.model_copy(
        update={
            "name": "shapes-vae",
            "data": like.data.model_copy(update={"dataset": "shapes"}),
            "autoencoder": StageRecipe(
                config={"network": network, "kl": 5e-3},
                training=_training(images=150_000, batch=64, learning_rate=1e-3),
            ),
            "base": None,
            "gate": GatePolicy.model_validate(
                {"absolute": {"legible": 0.5}, "non_inferior": {"legible": 0.02}}
            ),
        }
    )


def shapes_autoencoder() -> Recipe:
    """shapes-vae without its divergence: it reconstructs better, and what N(0, I) draws is nothing;
    for `compare`, not for service."""
    like = shapes_vae()
    config = {**like.autoencoder.config, "kl": 0.0}
    return like.model_copy(
        update={
            "name": "shapes-autoencoder",
            "autoencoder": like.autoencoder.model_copy(update={"config": config}),
            "gate": GatePolicy.model_validate({"absolute": {}, "non_inferior": {"kid": 1.0}}),
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
    return _conditioned("shapes-ldm-low", shapes_ldm(), low={"side": 8, "augment": "none"})


def shapes_ldm_map() -> Recipe:
    """shapes-ldm told which colour each pixel has, beside the caption: semantic synthesis (Rombach
    et al. 2022, section 4.3.2). Shares its autoencoder, CLIP and T5.
    """
    palette = [[name, list(colour)] for name, colour in {**COLOURS, **BACKGROUNDS}.items()]
    return _conditioned("shapes-ldm-map", shapes_ldm(), map={"palette": palette})


def shapes_sr3() -> Recipe:
    """SR3 (Saharia et al. 2021): super-resolution alone, scenes of 16 px enlarged to 32 without a
    word. The oracle reads a bicubic enlargement rightly too; the gate wants a better PSNR than it.
    """
    base = _enlarging(16, 32, patch=2, images=60_000, augment="none", listens=[])
    recipe = _cascade("shapes-sr3", sides=(32,), base=base.model_copy(update={"sampler": None}))
    return recipe.model_copy(
        update={
            "sampler": base.sampler,
            # Without words there is nothing that guidance could lead to.
            "evaluation": EvaluationConfig(kind="shapes", guidance_scales=(1.0,)),
            "gate": recipe.gate.model_copy(
                update={"absolute": {**recipe.gate.absolute, "psnr_gain": 0.0}}
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
    red, by a noise-aware CLIP. The gate asks of 64 held-out scenes that the colour has changed in
    0.8 of them and nothing else in 0.9; that is not reached yet.
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
                training=_training(images=150_000, batch=128, learning_rate=1e-3),
            ),
            "edit": StageRecipe(
                training=_training(images=24_000, batch=64, learning_rate=2e-4),
            ),
            "gate": flow.gate.model_copy(
                update={
                    "absolute": {**flow.gate.absolute, "edit_changed": 0.8, "edit_kept": 0.9},
                    "min_samples": 64,
                }
            ),
        }
    )


def emoji_imagen() -> Recipe:
    """shapes-imagen for your own captioned pictures at 64 px: set data.sources and a name; T5 reads
    the captions, 16 px are drawn and enlarged to 64.
    """
    return _of_pictures("emoji-imagen", shapes_imagen(), images=300_000)


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
    taken = ("data", "clip", "t5", "evaluation", "gate")
    return like.model_copy(
        update={"name": name, "base": base} | {key: getattr(own, key) for key in taken}
    )


def _cascade(
    name: str, *, sides: tuple[int, ...], base: StageRecipe, **stages: StageRecipe
) -> Recipe:
    """Scenes drawn in pixels, small ones first. Recipes of one last side share data, CLIP and T5,
    those of 32 px with `shapes` too.
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
        evaluation=EvaluationConfig(kind="shapes", guidance_scales=(2.0, 3.0, 4.5)),
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


def latent_unet_256() -> Recipe:
    """Stable Diffusion 1's U-Net at 256 px, taught flows: its VAE, CLIP's text; set data.sources.
    By `plan`, on 8 H100s: 868 M parameters, 523 GFLOP an image, 186 device-hours; 97 GB a worker do
    not fit. Batch, rate, warm-up and images are SD 1.1's (its model card). Not trained here.
    """
    batch = 2048
    return _at_scale(
        "latent-unet-256",
        side=256,
        network={
            # As published but for its heads, which are SD 2's; 64 wide is what GPUs are good at.
            "kind": "unet",
            "channels": 320,
            "channel_mult": [1, 2, 4, 4],
            "attention": [1, 1, 1, 0],
            "head_width": 64,
            "feedforward": 4,
            "context_width": 768,
        },
        listens=["clip"],
        shift=1.65,
        training=_published(
            images=237_000 * batch, batch=batch, warmup_images=10_000 * batch, weight_decay=0.01
        ),
    )


def latent_dit_256() -> Recipe:
    """DiT-XL/2 at 256 px, taught flows, that reads T5's and CLIP's text; set data.sources. By
    `plan`, on 8 H100s: 839 M parameters, 895 GFLOP an image, 44 GB a worker, 74 device-hours.
    Batch, rate and the 400,000 updates are Peebles & Xie's (2023, section 4). Not trained here.
    """
    return _at_scale(
        "latent-dit-256",
        side=256,
        network={"kind": "dit"},
        listens=None,
        shift=1.65,
        training=_published(images=400_000 * 256, batch=256),
    )


def latent_dit_512() -> Recipe:
    """latent-dit-256, its weights the first ones, at 512 px in buckets of aspect ratio up to 2. By
    `plan`, on 8 H100s: 839 M parameters, 3,907 GFLOP an image, 73 device-hours; 117 GB a worker do
    not fit. The 100,000 updates are a choice, not a finding. Not trained here.
    """
    return _at_scale(
        "latent-dit-512",
        side=512,
        network={"kind": "dit"},
        listens=None,
        shift=1.88,
        training=_published(images=100_000 * 256, batch=256),
        max_aspect=2.0,
        warm_start="latent-dit-256",
    )


def sd_512() -> Recipe:
    """Stable Diffusion 1 at 512 px as published (Rombach et al. 2022; its model cards): noise is
    predicted, 1000 scaled-linear betas, a tenth of the captions dropped; set data.sources. The
    194,000 and 515,000 updates of versions 1.1 and 1.2 at this side in one. Not trained here.
    By `plan` on 64 H100s: base 868 M parameters, 2,560 device-hours.
    """
    batch = 2048
    recipe = _at_scale(
        "sd-512",
        side=512,
        network=latent_unet_256().stage("base").config["network"],
        listens=["clip"],
        diffusion={"path": "ddpm_scaled_linear", "prediction": "eps", "times": "discrete"},
        training=_published(
            images=709_000 * batch, batch=batch, warmup_images=10_000 * batch, weight_decay=0.01
        ),
    )
    return recipe.model_copy(update={"sampler": {"kind": "ddim", "steps": 50, "guidance": 7.5}})


def glide_64_256() -> Recipe:
    """GLIDE (Nichol et al. 2022, section 4): ADM's U-Net, 512 channels, at 64 px, batches of 2048
    for 2.5 million updates, then one of 384 channels to 256 px, 512 for 1.6 million; a fifth of the
    captions dropped. It reads T5's text instead of a transformer of its own. Not trained here.
    By `plan` on 64 H100s: base 2,513 M parameters, 22,734 device-hours; sr1 1,417 M parameters,
    9,958 device-hours.
    """
    return _pixels_at_scale(
        "glide-64-256",
        text="google/flan-t5-xl",
        base=_adm(512, batch=2048, updates=2_500_000, caption_dropout=0.2),
        sr1=_adm(
            384, low=64, side=256, batch=512, updates=1_600_000, mult=(1, 1, 2, 2, 4, 4),
            blocks=2, attention=(0, 0, 0, 1, 1, 1),
        ),
    )  # fmt: skip


def imagen_64_256_1024() -> Recipe:
    """Imagen (Saharia et al. 2022, appendix F): T5-XXL, a U-Net of 512 channels at 64 px, Efficient
    U-Nets of 128 to 256 and to 1024 px, all in batches of 2048 for 2.5 million updates at 1e-4.
    Its last one was trained on crops; here it sees whole pictures. Not trained here.
    By `plan` on 64 H100s: base 2,523 M parameters, 22,742 device-hours; sr1 468 M parameters, 6,700
    device-hours; sr2 468 M parameters, 106,418 device-hours, and does not fit in 32 rows.
    """
    efficient = {"kind": "efficient_unet", "recompute": True}
    common = {"batch": 2048, "updates": 2_500_000, "strongest": 1.0}
    recipe = _pixels_at_scale(
        "imagen-64-256-1024",
        text="google/flan-t5-xxl",
        base=_adm(512, batch=2048, updates=2_500_000),
        sr1=_adm(128, low=64, side=256, network=efficient, **common),
        sr2=_adm(128, low=256, side=1024, network=efficient, **common),
    )
    dynamic = {"threshold": "dynamic", "threshold_quantile": 0.95}
    return recipe.model_copy(update={"sampler": {**recipe.sampler, **dynamic}})


def unclip_64_256_1024() -> Recipe:
    """unCLIP (Ramesh et al. 2022, table 3): a prior of width 2048 and depth 24, a decoder of 512
    channels at 64 px, then 320 to 256 px (noise) and 192 to 1024 px (a blur), without attention and
    without text. Each encoder is silent alone in a tenth, beside the tenth without all. Not trained
    here. By `plan` on 64 H100s: prior 1,337 M parameters, 935 device-hours; base 2,540 M
    parameters, 7,327 device-hours; sr1 696 M parameters, 19,496 device-hours; sr2 260 M parameters,
    22,843 device-hours, and does not fit in 8 rows.
    """
    return _pixels_at_scale(
        "unclip-64-256-1024",
        text="google/flan-t5-xl",
        prior=StageRecipe(
            config={
                "data": "embedding",
                "listens": ["clip"],
                "network": {"kind": "prior", "width": 2048, "depth": 24, "head_width": 64},
                "diffusion": {"path": "cosine", "prediction": "x0", "times": "uniform"},
            },
            training={
                **_published(images=600_000 * 4096, batch=4096),
                "learning_rate": 1.1e-4,
                "optimizer": {"kind": "adamw", "beta2": 0.96, "weight_decay": 0.06},
            },
            sampler={"kind": "ddim", "steps": 64, "candidates": 2},
        ),
        base=_adm(
            512, batch=2048, updates=800_000, rate=1.2e-4,
            listens=["clip", "t5", "clip_image"], context_dropout=0.1,
        ),
        sr1=_adm(
            320, low=64, side=256, batch=1024, updates=1_000_000, rate=1.2e-4,
            attention=(0, 0, 0, 0), listens=[],
        ),
        sr2=_adm(
            192, low=256, side=1024, batch=512, updates=1_000_000, mult=(1, 1, 2, 2, 4, 4),
            blocks=2, attention=(0,) * 6, listens=[], augment="blur", strongest=0.6,
        ),
    )  # fmt: skip


def _pixels_at_scale(name: str, *, text: str, base: StageRecipe, **stages: StageRecipe) -> Recipe:
    """Cascades in pixels, as published but for the text, which frozen encoders read."""
    side = max(stage.config.get("side", 0) for stage in stages.values())
    return Recipe(
        name=name,
        data=DataRecipe(side=side, ingest=IngestRules(min_side=side, heldout_share=0.01)),
        clip=StageRecipe(pretrained="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        t5=StageRecipe(pretrained=text),
        base=base,
        sampler={"kind": "ddim", "steps": 100, "threshold": "static"},
        evaluation=EvaluationConfig(kind="captions", guidance_scales=(1.5, 3.0, 6.0)),
        gate=GatePolicy.model_validate(
            {"absolute": {"retrieval": 0.05}, "non_inferior": {"retrieval": 0.05}}
        ),
    ).model_copy(update=stages)


def _adm(
    channels: int,
    *,
    batch: int,
    updates: int,
    side: int = 64,
    low: int = 0,
    rate: float = 1e-4,
    mult: tuple[int, ...] = (1, 2, 3, 4),
    blocks: int = 3,
    attention: tuple[int, ...] = (0, 1, 1, 1),
    network: dict[str, Any] | None = None,
    listens: list[str] | None = None,
    augment: str = "noise",
    strongest: float = 0.5,
    **more: Any,
) -> StageRecipe:
    """ADM's U-Net (Dhariwal & Nichol 2021) in pixels, its insides computed twice."""
    enlarged = {"side": low, "augment": augment, "strongest": strongest}
    return StageRecipe(
        config={
            "data": "pixels",
            "side": side,
            "low": enlarged if low else None,
            "network": network
            or {
                "kind": "unet",
                "channels": channels,
                "channel_mult": list(mult),
                "blocks": blocks,
                "attention": list(attention),
                "head_width": 64,
                "context_width": 1024,
                "recompute": True,
            },
            "listens": ["t5"] if listens is None else listens,
            "diffusion": {"path": "cosine", "prediction": "v", "times": "uniform"},
            **more,
        },
        training={
            **_published(images=updates * batch, batch=batch, warmup_images=10_000 * batch),
            "learning_rate": rate,
        },
        sampler={"kind": "ddim", "steps": 27, "threshold": "static"} if low else None,
    )


def _at_scale(
    name: str,
    *,
    side: int,
    network: dict[str, Any],
    listens: list[str] | None,
    training: dict[str, Any],
    shift: float = 1.0,
    diffusion: dict[str, Any] | None = None,
    max_aspect: float = 1.0,
    warm_start: str | None = None,
) -> Recipe:
    """Latents of a published VAE. Straight paths and logit-normal times as SD3 has them, and Flux's
    shift of them for so many tokens: exp of .5 at 256 to 1.15 at 4096, linear between.
    """
    return Recipe(
        name=name,
        data=DataRecipe(
            side=side,
            ingest=IngestRules(min_side=side, max_aspect=2.0, heldout_share=0.01),
            encode=EncodeRecipe(max_aspect=max_aspect, multiple=64, precision="bf16"),
        ),
        autoencoder=StageRecipe(pretrained="stabilityai/sd-vae-ft-mse"),
        clip=StageRecipe(pretrained="laion/CLIP-ViT-L-14-laion2B-s32B-b82K"),
        t5=StageRecipe(pretrained="google/flan-t5-xl"),
        base=StageRecipe(
            config={
                "network": network,
                "diffusion": diffusion or {"shift": shift},
                "listens": listens,
            },
            training=training,
            warm_images=training["images"] // 10,
            warm_start=warm_start,
        ),
        sampler={"kind": "dpmpp2m", "steps": 24},
        evaluation=EvaluationConfig(kind="captions", guidance_scales=(2.0, 4.0, 6.0)),
        gate=GatePolicy.model_validate(
            {"absolute": {"retrieval": 0.05}, "non_inferior": {"retrieval": 0.05}}
        ),
    )


def _published(
    *, images: int, batch: int, warmup_images: int = 0, weight_decay: float = 0.0
) -> dict[str, Any]:
    """What LDM and DiT share: AdamW(.9, .999) at 1e-4, constant; averages of .9999 an update."""
    return {
        "images": images,
        "batch": batch,
        "learning_rate": 1e-4,
        "warmup_images": warmup_images,
        "optimizer": {"kind": "adamw", "beta2": 0.999, "weight_decay": weight_decay},
        "ema_halflife_images": batch * 6931,
        "precision": "bf16",
        "compile": True,
        "checkpoint_images": 5_000 * batch,
        "log_images": 100 * batch,
    }


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
        "precision": "bf16",
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
    "latent-unet-256": latent_unet_256,
    "latent-dit-256": latent_dit_256,
    "latent-dit-512": latent_dit_512,
    "sd-512": sd_512,
    "glide-64-256": glide_64_256,
    "imagen-64-256-1024": imagen_64_256_1024,
    "unclip-64-256-1024": unclip_64_256_1024,
}
