"""The diffusion core: Path, Prediction, Denoiser and Guide; noise, loss and sample.

DDPM, DDIM, NCSN, score-SDE, EDM and flow matching are choices of these parts, and no more than
that. Torch and jaxtyping alone.
"""

from .config import DiffusionConfig, SamplerConfig
from .draws import normal, uniform
from .guidance import classifier, classifier_free, dynamic_threshold
from .likelihood import log_likelihood
from .objective import loss
from .path import Path, cosine, edm, flow, shift, subvp, table, ve, vp
from .prediction import PREDICTIONS, Cond, Denoiser, Model, Prediction
from .samplers import ddim, dpmpp2m, euler_maruyama, heun, langevin, sample, unipc

__all__ = [
    "PREDICTIONS",
    "Cond",
    "Denoiser",
    "DiffusionConfig",
    "Model",
    "Path",
    "Prediction",
    "SamplerConfig",
    "classifier",
    "classifier_free",
    "cosine",
    "ddim",
    "dpmpp2m",
    "dynamic_threshold",
    "edm",
    "euler_maruyama",
    "flow",
    "heun",
    "langevin",
    "log_likelihood",
    "loss",
    "normal",
    "sample",
    "shift",
    "subvp",
    "table",
    "uniform",
    "unipc",
    "ve",
    "vp",
]
