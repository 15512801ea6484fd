"""Snapshots on the device and on the host, of a run on either."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from morphogen.state import TrainingState

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("location", ["device", "host"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_run_goes_on_as_it_did(kit: Any, device: str, location: Any, fused: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    hidden = torch.zeros(8, device=device)
    state = TrainingState(model, optimizer, extras={"hidden": hidden}, snapshot_location=location)

    def contents() -> Any:
        moments = [{key: v.cpu() for key, v in values.items()} for values in optimizer.state.values()]
        return {name: t.cpu() for name, t in kit.tensors(model).items()}, moments, hidden.cpu()

    def train(steps: int) -> Any:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.rand(4, 8, device=device) + hidden).square().sum().backward()
            optimizer.step()
            hidden.add_(torch.rand(8, device=device))
        return contents()

    before = train(2)
    snapshot = state.capture()
    where = {tensor.device.type for section, _, tensor in snapshot.named_tensors() if section == "model"}
    assert where == {"cpu" if location == "host" else device}
    checksum, after = snapshot.checksum(), train(3)
    for _ in range(2):
        state.restore(snapshot)
        assert kit.same(contents(), before)
        assert kit.same(train(3), after)
        assert snapshot.checksum() == checksum
