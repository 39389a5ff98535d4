"""Distillation of one expert from several: it learns to put out what they do, on what they see.

The down projection in closed form, as ridge regression; then a few steps of gradient descent on all weights. Pure
functions of tensors; which experts teach, and on which text, is the caller's business.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 0.01
BATCH_TOKENS = 512
RATE = 5e-3
"""Of the largest step of Adam, in units of a matrix's root mean square weight times 20: it falls to zero."""

Weights = Mapping[str, Tensor]
Forward = Callable[[Tensor, Weights], Tensor]


@dataclass(frozen=True, slots=True)
class Lessons:
    """What the pupil sees and should put out: `x` (T, H), `y` (T, H) and the `gate` (T,) of each use."""

    x: Tensor
    y: Tensor
    gate: Tensor

    def error(self, y: Tensor) -> float:
        """Squared error of outputs `y` (T, H) over the squared outputs wanted, both weighted by squared gates."""
        weight = self.gate[:, None] ** 2
        return float((weight * (y - self.y) ** 2).sum() / (weight * self.y**2).sum().clamp(min=1e-30))


def refit_down(hidden: Tensor, lessons: Lessons) -> Tensor:
    """The matrix (H, I) that maps `hidden` (T, I) to the wanted outputs with the least squared error."""
    weight = lessons.gate[:, None].double() ** 2
    h = hidden.double()
    gram = h.t() @ (weight * h)
    damping = RIDGE * gram.diagonal().mean().clamp(min=1e-12)
    solved = torch.linalg.solve(gram + damping * torch.eye(len(gram)), h.t() @ (weight * lessons.y.double()))
    fitted: Tensor = solved.t().float().contiguous()
    return fitted


def train(weights: Weights, forward: Forward, lessons: Lessons, num_steps: int, seed: int = 0) -> dict[str, Tensor]:
    """`weights` after `num_steps` of Adam (Kingma and Ba, 2015) on random batches; the same for the same seed."""
    pupil = {name: tensor.float().clone().requires_grad_() for name, tensor in weights.items()}
    scales = [20 * float(tensor.detach().square().mean().sqrt()) for tensor in pupil.values()]
    groups = [{"params": [tensor], "lr": RATE * scale} for tensor, scale in zip(pupil.values(), scales, strict=True)]
    optimizer = torch.optim.Adam(groups)
    generator = torch.Generator().manual_seed(seed)
    energy = (lessons.gate[:, None] ** 2 * lessons.y**2).sum() / len(lessons.x)
    for step in range(num_steps):
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = RATE * scale * (1 - step / num_steps)
        rows = torch.randint(len(lessons.x), (min(BATCH_TOKENS, len(lessons.x)),), generator=generator)
        with torch.enable_grad():
            missed = forward(lessons.x[rows], pupil) - lessons.y[rows]
            loss = (lessons.gate[rows, None] ** 2 * missed**2).sum() / len(rows) / energy.clamp(min=1e-30)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        optimizer.step()
    return {name: tensor.detach() for name, tensor in pupil.items()}
