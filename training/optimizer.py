"""An update is applied whole or not at all, and nothing on the way there waits for the device.

Clipping and skipping go into the step itself: fused kernels divide by `grad_scale` and do nothing
where `found_inf` is set (the protocol of torch.amp.GradScaler), so a GPU never stops to tell the
host that a gradient was finite.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .sharding import is_sharded, like, local, rows, whole
from .stage import over_workers, trainable


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW (Loshchilov & Hutter 2019). Vectors (biases, gains) are never decayed."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError(
                f"beta1 and beta2 must lie in [0, 1), got {self.beta1} and {self.beta2}"
            )
        if self.eps <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"eps must be > 0 and weight_decay >= 0, got {self.eps} and {self.weight_decay}"
            )


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for the weights of inner linear and convolution layers, AdamW for everything else: first
    and last layers, those that are told conditions, embeddings, vectors."""

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    weight_decay: float = 0.0
    newton_schulz_steps: int = 5
    adamw: AdamWConfig = field(default_factory=AdamWConfig)

    def __post_init__(self):
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError(
                f"momentum must lie in [0, 1) and weight_decay be >= 0, got {self.momentum} and "
                f"{self.weight_decay}"
            )
        if self.newton_schulz_steps < 1:
            raise ValueError(
                f"newton_schulz_steps must be at least 1, got {self.newton_schulz_steps}"
            )


OptimizerConfig = AdamWConfig | MuonConfig


class Optimizer:
    """The update rules of a module's trainable parameters, stepped as one; of a sharded module each
    worker updates its rows."""

    def __init__(self, config: OptimizerConfig, module: nn.Module):
        self.parameters = trainable(module)
        adamw = config if isinstance(config, AdamWConfig) else config.adamw
        inner = _inner_weights(module) if isinstance(config, MuonConfig) else set()
        rest = [p for p in self.parameters.values() if p not in inner]
        vectors = replace(adamw, weight_decay=0.0)
        self._rules: list[_Rule] = [
            _AdamW([p for p in rest if p.ndim >= 2], adamw),
            _AdamW([p for p in rest if p.ndim < 2], vectors),
        ]
        if isinstance(config, MuonConfig):
            self._rules.append(_Muon([p for p in self.parameters.values() if p in inner], config))

    @torch.no_grad()
    def step(self, learning_rate: float, norm: Tensor, max_norm: float, skip: Tensor) -> None:
        """One update with the gradients scaled down to `max_norm` (0: as they are), or none where
        `skip` is true.

        `norm` is the gradients' total norm; `norm` and `skip` are scalars on the parameters'
        device.
        """
        scale = (norm / max_norm).clamp(min=1) if max_norm else torch.ones_like(norm)
        for rule in self._rules:
            pairs = [(p, p.grad) for p in rule.parameters if p.grad is not None]
            if pairs:
                parameters, gradients = (list(column) for column in zip(*pairs, strict=True))
                rule.step(parameters, gradients, learning_rate, scale, skip.float())

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state as "parameter name:field", not copied; empty before the first step."""
        return {
            f"{name}:{key}": like(parameter, value)
            for name, parameter in self.parameters.items()
            for rule in self._rules
            for key, value in rule.state.get(parameter, {}).items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from saved `tensors()`."""
        owners = {p: rule for rule in self._rules for p in rule.parameters}
        for key, value in tensors.items():
            name, _, field_name = key.rpartition(":")
            parameter = self.parameters[name]
            if field_name not in owners[parameter].fields:
                raise ValueError(
                    f"the checkpoint has {field_name!r} for {name}, which is updated otherwise now "
                    f"(by {', '.join(owners[parameter].fields)}): finish the training with the "
                    "version that began it, or begin it anew"
                )
            state = owners[parameter].state.setdefault(parameter, {})
            own = value[rows(parameter)] if value.ndim else value
            state[field_name] = own.to(parameter.device, copy=True)


def gradient_norm(parameters: dict[str, nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, over the workers where they are sharded; a scalar on
    their device, NaN or Inf where one of them is."""
    given = [p for p in parameters.values() if p.grad is not None]
    if not given:
        raise ValueError(
            "no parameter has a gradient: forward's loss depends on nothing that is trained"
        )

    def norm(parameters: list[nn.Parameter]) -> Tensor:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    if not (sharded := [p for p in given if is_sharded(p)]):
        return norm(given)
    squares = over_workers(norm(sharded).square())
    whole = [p for p in given if not is_sharded(p)]  # the same on each worker, and counted once
    return (squares + norm(whole).square() if whole else squares).sqrt()


class _Rule:
    """How some parameters are updated, and what is remembered of each."""

    fields: tuple[str, ...] = ()

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        learning_rate: float,
        scale: Tensor,
        skip: Tensor,
    ) -> None:
        """Update with gradients divided by `scale`; nothing changes where `skip` is 1."""
        raise TypeError(f"{type(self).__name__} defines no step")


class _AdamW(_Rule):
    """The fused kernel without torch.optim around it, whose first use takes 5 s of CPU time
    (it imports the compiler). The state has torch.optim's names and values."""

    fields = ("step", "exp_avg", "exp_avg_sq")

    def __init__(self, parameters: Sequence[Tensor], config: AdamWConfig):
        super().__init__(parameters)
        self.config = config

    def step(self, parameters, gradients, learning_rate, scale, skip):
        for p in parameters:
            if p not in self.state:
                own, step = local(p), torch.zeros((), device=p.device)
                fields = {"exp_avg": torch.zeros_like(own), "exp_avg_sq": torch.zeros_like(own)}
                self.state[p] = {"step": step, **fields}
        states = [self.state[p] for p in parameters]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1 - skip)
        torch._fused_adamw_(
            [local(p) for p in parameters],
            [local(g) for g in gradients],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            steps,
            lr=learning_rate,
            beta1=self.config.beta1,
            beta2=self.config.beta2,
            weight_decay=self.config.weight_decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=scale,
            found_inf=skip,
        )


class _Muon(_Rule):
    """Nesterov momentum whose update is replaced by the nearest orthogonal matrix (Jordan et al.
    2024).

    A kernel [out, in, ...] is the matrix [out, in * ...]. Scaled by 0.2 sqrt(larger side), the
    update has the size of AdamW's (Liu et al. 2025, eq. 4), so both take one learning rate. A
    sharded update is gathered for that, and each worker takes its rows of the result.
    """

    fields = ("momentum",)

    def __init__(self, parameters: Sequence[Tensor], config: MuonConfig):
        super().__init__(parameters)
        self.config = config

    def step(self, parameters, gradients, learning_rate, scale, skip):
        if bool(skip):  # the one look from the host that this rule costs on a GPU
            return
        momentum, same_shape = self.config.momentum, dict[tuple[int, int], list[Any]]()
        for p, gradient in zip(parameters, gradients, strict=True):
            shape = (p.shape[0], p.numel() // p.shape[0])
            same_shape.setdefault(shape, []).append((p, local(gradient) / scale))
        for shape, group in same_shape.items():
            updates = []
            for p, gradient in group:
                state = self.state.setdefault(p, {})
                average = state.setdefault("momentum", torch.zeros_like(local(p)))
                average.lerp_(gradient, 1 - momentum)
                update = like(p, gradient.lerp(average, momentum))
                updates.append(whole(update).reshape(shape))
            directions = orthogonal(torch.stack(updates), self.config.newton_schulz_steps)
            size = learning_rate * 0.2 * max(shape) ** 0.5
            for (p, _), direction in zip(group, directions, strict=True):
                own = local(p)
                own.mul_(1 - learning_rate * self.config.weight_decay)
                own.sub_(direction.reshape(p.shape)[rows(p)].to(p.dtype), alpha=size)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each matrix = U S V^T in [n, rows, columns]: singular values end up within
    about 0.7..1.2.

    The quintic Newton-Schulz iteration of Jordan et al. (2024), in bfloat16 on GPUs.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


def _inner_weights(module: nn.Module) -> set[Tensor]:
    """Weights of linear and convolution layers, but for embeddings and what a network calls its
    `outer` layers, whose rows are unlike directions and are better left to AdamW. Where nothing is
    said of that, what has fewer than 16 channels on a side is one of them."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    weights: set[Tensor] = {m.weight for m in module.modules() if isinstance(m, layers)}
    embedded = {
        m.weight for m in module.modules() if isinstance(m, nn.Embedding)
    }  # tied to an output layer
    outer = {w for m in module.modules() for it in getattr(m, "outer", ()) for w in it.parameters()}
    inner = weights - embedded - outer
    return {w for w in inner if w.requires_grad and min(w.shape[:2]) >= 16}
