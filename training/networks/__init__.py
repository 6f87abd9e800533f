"""Networks: each a frozen config and a module made of it. Torch alone, and nothing of diffusion.

Denoisers share one contract: network(x, label [B], cond) -> like x; Conditioning says what cond
may hold.
"""

from __future__ import annotations

from torch import nn

from .autoencoder import Autoencoder, AutoencoderConfig
from .classifier import Classifier, ClassifierConfig, HeadConfig
from .codebook import Codebook, CodebookConfig, perplexity
from .conditioning import Cond, Context, ContextConfig, Standard
from .discriminator import Discriminator, DiscriminatorConfig
from .dit import DiT, DiTConfig
from .efficient_unet import EfficientUNet, EfficientUNetConfig
from .layers import Tap
from .prior import Prior, PriorConfig
from .unet import UNet, UNetConfig

DenoiserConfig = UNetConfig | DiTConfig | EfficientUNetConfig
"""Of pictures and latents."""
NetworkConfig = (
    DenoiserConfig | PriorConfig | ClassifierConfig | AutoencoderConfig | DiscriminatorConfig
)

NETWORKS: dict[type, type[nn.Module]] = {
    UNetConfig: UNet,
    DiTConfig: DiT,
    EfficientUNetConfig: EfficientUNet,
    PriorConfig: Prior,
    ClassifierConfig: Classifier,
    AutoencoderConfig: Autoencoder,
    DiscriminatorConfig: Discriminator,
}

CONFIGS: dict[str, type] = {config.kind: config for config in NETWORKS}


def build(config: NetworkConfig) -> nn.Module:
    """The network of a config."""
    return NETWORKS[type(config)](config)


__all__ = [
    "CONFIGS",
    "NETWORKS",
    "Autoencoder",
    "AutoencoderConfig",
    "Classifier",
    "ClassifierConfig",
    "Codebook",
    "CodebookConfig",
    "Cond",
    "Context",
    "ContextConfig",
    "DenoiserConfig",
    "DiT",
    "DiTConfig",
    "Discriminator",
    "DiscriminatorConfig",
    "EfficientUNet",
    "EfficientUNetConfig",
    "HeadConfig",
    "NetworkConfig",
    "Prior",
    "PriorConfig",
    "Standard",
    "Tap",
    "UNet",
    "UNetConfig",
    "build",
    "perplexity",
]
