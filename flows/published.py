"""Published systems at full width, by name in `presets`: nobody has trained them here. The figures
of cost in a docstring are what `plan` says.
"""

from __future__ import annotations

from typing import Any

from evaluation.config import EvaluationConfig
from evaluation.gate import GatePolicy
from pipeline.ingest import IngestRules

from .recipe import DataRecipe, EncodeRecipe, Recipe, StageRecipe


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
