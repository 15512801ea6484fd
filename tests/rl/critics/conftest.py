from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from morphogen.rl.critics import Critic


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def fit() -> Callable[..., Tensor]:
    """Fit one row of outputs to targets [B] or, row by row, [B, S], by full batches; return the outputs [1, K] or [B, K]."""

    def fit_outputs(critic: Critic, targets: Tensor, steps: int = 400, lr: float = 0.05) -> Tensor:
        targets_BS = targets if targets.ndim == 2 else targets.unsqueeze(0)
        outputs = torch.nn.Parameter(critic.initial_bias().repeat(len(targets_BS), 1))
        optimizer = torch.optim.Adam([outputs], lr=lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        for _ in range(steps):
            optimizer.zero_grad()
            critic.loss(outputs, targets_BS).sum().backward()
            optimizer.step()
            schedule.step()
        return outputs.detach()

    return fit_outputs
