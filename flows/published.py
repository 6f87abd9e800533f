"""Published systems at full width, by name in `presets`: nobody has trained them here. The figures
of cost in a docstring are what `plan` says. A docstring names its sources and what is other than
there; what it calls not published is a choice of ours, or as everywhere here.
"""

from __future__ import annotations

from typing import Any

from evaluation.config import EvaluationConfig
from evaluation.gate import GatePolicy
from pipeline.ingest import IngestRules

from .recipe import DataRecipe, EncodeRecipe, Recipe, StageRecipe


def latent_unet_256() -> Recipe:
    """Stable Diffusion 1's U-Net at 256 px, taught flows: its VAE, CLIP's text; set data.sources.
    By `plan`, on 8 H100s: 868 M parameters, 523 GFLOP an image, 58 GB a worker, 186 device-hours.
    Batch, rate, warm-up and images are SD 1.1's (its model card). Not trained here.
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
            images=237_000 * batch, batch=batch, warmup_images=10_000 * batch, weight_decay=0.01,
            micro_batch=128,  # a worker's 256 rows at once take 97 GB
        ),
    )  # fmt: skip


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
    `plan`, on 8 H100s: 839 M parameters, 3,907 GFLOP an image, 68 GB a worker, 73 device-hours. The
    100,000 updates are a choice, not a finding. Not trained here.
    """
    return _at_scale(
        "latent-dit-512",
        side=512,
        network={"kind": "dit"},
        listens=None,
        shift=1.88,
        # A worker's 32 rows at once take 117 GB.
        training=_published(images=100_000 * 256, batch=256, micro_batch=16),
        max_aspect=2.0,
        warm_start="latent-dit-256",
    )


def sd_512() -> Recipe:
    """Stable Diffusion 1 at 512 px as published (Rombach et al. 2022; CompVis/stable-diffusion, its
    model card and config): noise is predicted, 1000 scaled-linear betas, 50 DDIM steps at guidance
    7.5; set data.sources. The 194,000 and 515,000 updates of versions 1.1 and 1.2 at this side in
    one. Other than there: it begins from nothing, not from 256 px, and a tenth of the captions is
    dropped throughout, which 1.3 alone has; heads 64 wide, not 8 of them; a VAE tuned since;
    OpenCLIP's L/14, whose words and pooled vector are heard too; the steps are from states 1, 21,
    ..., 981, as DDIM was published, not one later, as CompVis's, 2 to 982. Not trained here.
    By `plan` on 64 H100s: base 868 M parameters, 2,560 device-hours.
    """
    batch = 2048
    recipe = _at_scale(
        "sd-512",
        side=512,
        network=latent_unet_256().stage("base").config["network"],
        listens=["clip"],
        diffusion={**_DDPM, "path": "ddpm_scaled_linear"},
        training=_published(
            images=709_000 * batch, batch=batch, warmup_images=10_000 * batch, weight_decay=0.01
        ),
        guidance_scales=(3.0, 5.0, 7.5),
    )
    # The config's uniform DDIM grid begins short of pure noise.
    sampler = {"kind": "ddim", "steps": 50, "grid": "leading", "guidance": 7.5}
    return recipe.model_copy(update={"sampler": sampler})


def glide_64_256() -> Recipe:
    """GLIDE (Nichol et al. 2022, section 4 and appendix B.2; openai/glide-text2im): ADM's U-Net,
    512 channels, at 64 px, batches of 2048 for 2.5 million updates, then one of 384 to 256 px, 512
    for 1.6 million; noise and its variance are learnt, cosine betas for the base, linear ones for
    sr1; 250 ancestral steps, then 27 of DDIM without guidance. Other than there: T5's text, not a
    transformer's of its own, which is attended to apart from the picture; a fifth of the captions
    is dropped throughout, not in a fine-tuning; strided convolutions between levels; the 27 steps
    are even, not 10, 10, 3, 2 and 2 a fifth of the times, and begin with the whole noise, not .997
    of it. Rate, warm-up and damage to what sr1 enlarges (none here) are not published. Not trained
    here.
    By `plan` on 64 H100s: base 2,241 M parameters, 20,457 device-hours; sr1 1,244 M parameters,
    9,733 device-hours.
    """
    return _pixels_at_scale(
        "glide-64-256",
        text="google/flan-t5-xl",
        sampler=_LEARNED,
        base=_adm(
            512, batch=2048, updates=2_500_000, dropout=0.1, learned_variance=True,
            context_width=2048, caption_dropout=0.2,
        ),
        # Dropout is that of the public code, whose network is told of no damage.
        sr1=_adm(
            384, low=64, side=256, batch=512, updates=1_600_000, mult=(1, 1, 2, 2, 4, 4),
            blocks=2, attention=(0, 0, 0, 1, 1, 1), dropout=0.1, learned_variance=True,
            augment="none", path="ddpm_linear", caption_dropout=0.0,
        ),
    )  # fmt: skip


def imagen_64_256_1024() -> Recipe:
    """Imagen (Saharia et al. 2022, section 4.1, appendices A, D and F): T5-XXL, a U-Net of 512
    channels at 64 px, Efficient U-Nets of 128 to 256 and to 1024 px, in batches of 2048 for 2.5
    million updates at 1e-4; noise is predicted at continuous times, cosine, linear for sr2; dynamic
    thresholds at 99.5 %, guidance 8 of sr1. Other than there: AdamW, not Adafactor, for the base;
    FLAN's T5, whose mean is told, not what attention pools; text is attended to apart from the
    picture; sr2 sees whole pictures, not crops, and attends to itself besides; strided convolutions
    in the base; 468 M parameters twice, not 600 and 400 M. Numbers of steps, averaging and sr2's
    guidance are not published. Not trained here.
    By `plan` on 64 H100s: base 2,179 M parameters, 20,317 device-hours; sr1 468 M parameters, 6,700
    device-hours; sr2 468 M parameters, 106,428 device-hours.
    """
    common = {"batch": 2048, "updates": 2_500_000, "times": "uniform", "label": "noise"}
    # 8 heads at 1024 channels.
    efficient = {"kind": "efficient_unet", "head_width": 128, "recompute": True}
    enlarging = {"network": efficient, "strongest": 1.0, **common}
    dynamic = {"threshold": "dynamic", "threshold_quantile": 0.995}
    # The listed decay is a cosine's, whose end_value is misprinted; for sr2 none is listed.
    return _pixels_at_scale(
        "imagen-64-256-1024",
        text="google/flan-t5-xxl",
        sampler={"kind": "ddim", "steps": 100, **dynamic},
        guidance_scales=(1.35, 3.0, 6.0),
        base=_adm(512, schedule="cosine", **common),
        sr1=_adm(
            128, low=64, side=256, schedule="cosine", sampler={**dynamic, "guidance": 8.0},
            **enlarging,
        ),
        # A worker's 32 rows at once take 179 GB.
        sr2=_adm(
            128, low=256, side=1024, path="ddpm_linear", sampler=dynamic, micro_batch=8,
            **enlarging,
        ),
    )  # fmt: skip


def unclip_64_256_1024() -> Recipe:
    """unCLIP (Ramesh et al. 2022, section 2, appendix C and table 3): a prior of width 2048 and
    depth 24, GLIDE's decoder at 64 px, which loses the embedding in a tenth and the caption in
    half, then 320 channels to 256 px (blur) and 192 to 1024 px, without text; cosine betas, linear
    for sr2; 64, 250, 27 and 15 steps. Other than there: OpenCLIP's H/14 and T5's text; DDIM for the
    prior, not Analytic-DPM, no causal mask, vectors of length 32, not 17.2; the decoder as GLIDE's
    here; sr1 and sr2 see whole pictures, not quarters, attend once in the middle, and are told the
    blur, drawn up to .6 with 5 taps, not 3; sr2's is a blur too, where BSR also resizes, adds noise
    and compresses, in random order. Warm-up, the prior's guidance, and that sr1 and sr2 predict
    noise are not published. Not trained here. By `plan` on 64 H100s: prior 1,337 M parameters, 935
    device-hours; base 2,255 M parameters, 6,555 device-hours; sr1 686 M parameters, 19,439
    device-hours; sr2 256 M parameters, 22,834 device-hours.
    """
    blurred = {"listens": [], "augment": "blur", "strongest": 0.6}
    return _pixels_at_scale(
        "unclip-64-256-1024",
        text="google/flan-t5-xl",
        sampler=_LEARNED,
        guidance_scales=(1.25, 3.0, 6.0),
        prior=StageRecipe(
            config={
                "data": "embedding",
                "listens": ["clip"],
                "network": {"kind": "prior", "width": 2048, "depth": 24, "head_width": 64},
                "diffusion": {**_DDPM, "prediction": "x0"},
            },
            training={
                **_published(images=600_000 * 4096, batch=4096),
                "learning_rate": 1.1e-4,
                "optimizer": {"kind": "adamw", "beta2": 0.96, "eps": 1e-6, "weight_decay": 0.06},
            },
            sampler={"kind": "ddim", "steps": 64, "grid": "trailing", "candidates": 2},
        ),
        base=_adm(
            512, batch=2048, updates=800_000, rate=1.2e-4, dropout=0.1, learned_variance=True,
            context_width=2048, listens=["t5", "clip_image"], caption_dropout=0.0,
            context_dropout={"t5": 0.5, "clip_image": 0.1},
        ),
        sr1=_adm(
            320, low=64, side=256, batch=1024, updates=1_000_000, rate=1.2e-4, dropout=0.1,
            attention=(0,) * 4, **blurred,
        ),
        # A worker's 8 rows at once take 100 GB.
        sr2=_adm(
            192, low=256, side=1024, batch=512, updates=1_000_000, mult=(1, 1, 2, 2, 4, 4),
            blocks=2, attention=(0,) * 6, path="ddpm_linear", sampler={"steps": 15}, micro_batch=4,
            **blurred,
        ),
    )  # fmt: skip


_DDPM = {"path": "ddpm_cosine", "prediction": "eps", "times": "discrete", "label": "time"}
"""iDDPM's table (Nichol & Dhariwal 2021), as ADM, GLIDE and unCLIP learn it."""
_LEARNED = {
    "kind": "ddim", "eta": 1.0, "steps": 250, "variance": "learned", "threshold": "static",
}  # fmt: skip
"""Every fourth state of 1000, as iDDPM draws; estimates clipped as in ADM's and GLIDE's code."""


def _pixels_at_scale(
    name: str,
    *,
    text: str,
    sampler: dict[str, Any],
    base: StageRecipe,
    guidance_scales: tuple[float, ...] = (1.5, 3.0, 6.0),
    **stages: StageRecipe,
) -> Recipe:
    """Cascades in pixels. The text is read by frozen encoders, gradients are scaled down to norm 1
    and captions are dropped in a tenth unless a preset says other things; the first scale of
    guidance is that of the published FID."""
    side = max(stage.config.get("side", 0) for stage in stages.values())
    return Recipe(
        name=name,
        data=DataRecipe(side=side, ingest=IngestRules(min_side=side, heldout_share=0.01)),
        clip=StageRecipe(pretrained="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
        t5=StageRecipe(pretrained=text),
        base=base,
        sampler=sampler,
        evaluation=EvaluationConfig(kind="captions", guidance_scales=guidance_scales),
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
    schedule: str = "constant",
    mult: tuple[int, ...] = (1, 2, 3, 4),
    blocks: int = 3,
    attention: tuple[int, ...] = (0, 1, 1, 1),
    dropout: float = 0.0,
    learned_variance: bool = False,
    context_width: int = 1024,
    network: dict[str, Any] | None = None,
    path: str = "ddpm_cosine",
    times: str = "discrete",
    label: str = "time",
    listens: list[str] | None = None,
    augment: str = "noise",
    strongest: float = 0.5,
    sampler: dict[str, Any] | None = None,
    micro_batch: int = 0,
    **more: Any,
) -> StageRecipe:
    """ADM's U-Net (Dhariwal & Nichol 2021) in pixels, its insides computed twice. `sampler` is what
    an enlarging stage does otherwise than by 27 DDIM steps."""
    enlarged = {"side": low, "augment": augment, "strongest": strongest}
    drawn = {"kind": "ddim", "steps": 27, "grid": "trailing", "threshold": "static"}
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
                "feedforward": 0,
                "dropout": dropout,
                "learned_variance": learned_variance,
                "context_width": context_width,
                "recompute": True,
            },
            "listens": ["t5"] if listens is None else listens,
            "diffusion": {**_DDPM, "path": path, "times": times, "label": label},
            **more,
        },
        training={
            **_published(
                images=updates * batch,
                batch=batch,
                warmup_images=10_000 * batch,
                micro_batch=micro_batch,
            ),
            "learning_rate": rate,
            "schedule": schedule,
        },
        sampler={**drawn, **(sampler or {})} if low else None,
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
    guidance_scales: tuple[float, ...] = (2.0, 4.0, 6.0),
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
        evaluation=EvaluationConfig(kind="captions", guidance_scales=guidance_scales),
        gate=GatePolicy.model_validate(
            {"absolute": {"retrieval": 0.05}, "non_inferior": {"retrieval": 0.05}}
        ),
    )


def _published(
    *,
    images: int,
    batch: int,
    warmup_images: int = 0,
    weight_decay: float = 0.0,
    micro_batch: int = 0,
) -> dict[str, Any]:
    """What LDM and DiT share: AdamW(.9, .999) at 1e-4, constant; averages of .9999 an update.

    It is watched for less than a hundredth of the time: at each checkpoint the averages are held
    against 1,024 pictures that are held out, and at most 20 times pictures are drawn, in fp32 both,
    and the others wait for who draws. None ends early: a published length is to be reached.
    """
    return {
        "images": images,
        "batch": batch,
        "micro_batch": micro_batch,
        "learning_rate": 1e-4,
        "warmup_images": warmup_images,
        "optimizer": {"kind": "adamw", "beta2": 0.999, "weight_decay": weight_decay},
        "ema_halflife_images": batch * 6931,
        "precision": "bf16",
        "compile": True,
        "checkpoint_images": 5_000 * batch,
        "keep_best": True,
        "heldout_pictures": 1024,
        "preview_images": max(20_000 * batch, images // 20),
        "log_images": 100 * batch,
    }
