"""What only a CUDA device can show: no step waits for it between checks, and a rewind waits for side streams."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from morphogen.governor import Governor, GovernorConfig
from morphogen.state import TrainingState

pytestmark = pytest.mark.gpu


@pytest.fixture
def strict() -> Iterator[None]:
    """Make every wait of the host for the device an error."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)).cuda()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def test_nothing_waits_for_the_device_between_two_checks(request: pytest.FixtureRequest) -> None:
    model, optimizer = build()
    governor = Governor(TrainingState(model, optimizer), GovernorConfig(check_every=16))
    inputs, labels = torch.randn(32, 16, device="cuda"), torch.randint(4, (32,), device="cuda")
    for step in range(32):
        if step == 17:  # everything was compiled, loaded and looked at once, and the first check is over
            request.getfixturevalue("strict")
        if step == 31:
            torch.cuda.set_sync_debug_mode("default")
        logits = model(inputs)
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        assert governor.observe(loss, logits=logits, labels=labels).proceed
        optimizer.step()


def test_a_rewind_waits_for_side_streams() -> None:
    """A copy of the weights that is under way on another stream ends up whole, before or after the rewind, never mixed."""
    model, optimizer = build()
    governor = Governor(TrainingState(model, optimizer))
    inputs = torch.randn(32, 16, device="cuda")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        torch.cuda._sleep(50_000_000)
        for parameter in model.parameters():
            parameter.fill_(7.0)  # would land on top of the restored weights
    loss = model(inputs).sum()
    loss.backward()
    assert governor.observe(loss * torch.nan).rollback is not None
    torch.cuda.synchronize()
    for parameter, expected in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, expected)
