"""The folder's surface, and what it runs on."""

import subprocess
import sys

import pytest
import torch

import training.diffusion as diffusion

NAMES = """
PREDICTIONS Cond Denoiser DiffusionConfig Model Path Prediction SamplerConfig classifier
classifier_free cosine ddim dpmpp2m dynamic_threshold edm euler_maruyama flow heun langevin
log_likelihood loss normal sample shift subvp table uniform unipc ve vp
"""


def test_the_public_names_are_these():
    assert diffusion.__all__ == NAMES.split()
    for name in diffusion.__all__:
        assert hasattr(diffusion, name)


def test_torch_and_jaxtyping_are_all_it_imports():
    """In a process of its own: what the folder adds to what torch and jaxtyping load is itself."""
    script = (
        "import sys, torch, jaxtyping; before = set(sys.modules); import training.diffusion; "
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) - set(sys.stdlib_module_names) == {"training"}


@pytest.mark.gpu
def test_a_gpu_draws_and_samples_as_the_cpu_does():
    pictures = []
    for device in ("cpu", "cuda"):
        position = torch.arange(8, device=device)
        eps = diffusion.normal(0, "x", position, (4, 8, 8))
        model = diffusion.DiffusionConfig().build_model(lambda x, label, cond: x.tanh())
        pictures.append(diffusion.SamplerConfig().sample(model, eps).cpu())
        assert eps.device.type == device
    torch.testing.assert_close(*pictures, rtol=1e-4, atol=1e-4)
