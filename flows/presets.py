"""Recipes by name. `darkroom recipes` shows what a docstring says; a figure in it was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from evaluation.config import EvaluationConfig
from evaluation.gate import GatePolicy
from pipeline.ingest import IngestRules

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
        "diffusion": ddpm.base.config["diffusion"],
    }
    return ddpm.model_copy(
        update={
            "name": "shapes-classifier",
            "base": ddpm.base.model_copy(
                update={"config": {**ddpm.base.config, "caption_dropout": 0.25}}
            ),
            "classifier": StageRecipe(
                config=judge, training=_training(images=240_000, batch=64, learning_rate=1e-3)
            ),
            "noisy_clip": StageRecipe(
                config=judge, training=_training(images=150_000, batch=128, learning_rate=1e-3)
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
                    "diffusion": flow.base.config["diffusion"],
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


def _at_scale(
    name: str,
    *,
    side: int,
    network: dict[str, Any],
    listens: list[str] | None,
    shift: float,
    training: dict[str, Any],
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
            config={"network": network, "diffusion": {"shift": shift}, "listens": listens},
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
    "shapes-two": shapes_two,
    "shapes-diffusionclip": shapes_diffusionclip,
    "pictures": pictures,
    "latent-unet-256": latent_unet_256,
    "latent-dit-256": latent_dit_256,
    "latent-dit-512": latent_dit_512,
}
