"""Muon for the matrices of the layers, Adam for embedding and norms.

Muon (Jordan et al. 2024) turns the momentum of a matrix into its nearest orthogonal matrix by
Newton-Schulz steps before it is applied, so that all directions are learnt at one pace.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

_STEPS = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
          (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012))  # fmt: skip


def orthogonal(matrices: Tensor) -> Tensor:
    """Return about the nearest orthogonal matrices of [n, rows, columns], in bfloat16 products."""
    x: Tensor = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for a, b, c in _STEPS:
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    found: Tensor = x.mT if tall else x
    return found


class Optimiser:
    """One step for all parameters of a model; the state is a flat dictionary of tensors."""

    def __init__(
        self,
        model: nn.Module,
        *,
        matrix_rate: float = 0.02,
        other_rate: float = 3e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        decay: float = 0.01,
    ) -> None:
        self._rates = (matrix_rate, other_rate)
        self._momentum, self._betas, self._decay = momentum, betas, decay
        self._groups: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
        self._parameters = dict(model.named_parameters())
        self._others = []
        self.state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.ndim == 2 and "embed" not in name:
                self._groups[tuple(parameter.shape)].append(name)
                self.state[f"m.{name}"] = torch.zeros_like(parameter)
            else:
                self._others.append(name)
                self.state[f"m.{name}"] = torch.zeros_like(parameter)
                self.state[f"v.{name}"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, number: int, scale: float) -> None:
        """Apply gradients; `number` counts steps from 1, `scale` is the schedule's share."""
        matrix_rate, other_rate = (rate * scale for rate in self._rates)
        for shape, names in self._groups.items():
            parameters: list[Tensor] = [self._parameters[name] for name in names]
            gradients = [p.grad for p in parameters if p.grad is not None]
            assert len(gradients) == len(parameters)
            moments = [self.state[f"m.{name}"] for name in names]
            torch._foreach_lerp_(moments, gradients, 1 - self._momentum)
            ahead = torch._foreach_lerp(gradients, moments, self._momentum)
            updates = orthogonal(torch.stack(ahead)).to(parameters[0].dtype)
            factor = matrix_rate * max(1.0, shape[0] / shape[1]) ** 0.5
            torch._foreach_mul_(parameters, 1 - matrix_rate * self._decay)
            torch._foreach_add_(parameters, list(updates.unbind(0)), alpha=-factor)
        first, second = self._betas
        for name in self._others:
            parameter = self._parameters[name]
            assert parameter.grad is not None
            moment, square = self.state[f"m.{name}"], self.state[f"v.{name}"]
            moment.lerp_(parameter.grad, 1 - first)
            square.lerp_(parameter.grad.square(), 1 - second)
            mean = moment / (1 - first**number)
            root = (square / (1 - second**number)).sqrt().add_(1e-10)
            parameter.addcdiv_(mean, root, value=-other_rate)
        for parameter in self._parameters.values():
            parameter.grad = None
