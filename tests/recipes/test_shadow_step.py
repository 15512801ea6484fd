"""The training step of a run whose seeds incubate in shadow passes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from morphogen.growth import GrowthConfig, Stage
from morphogen.recipes.arm import ArmRun
from morphogen.recipes.config import GrowConfig
from morphogen.telemetry.events import discard


def test_the_step_runs_shadow_passes_and_counts_them(small_config: Callable[..., GrowConfig]) -> None:
    """The host does not notice which incubator is at work; the seed does learn, and blends in the end."""
    straight, shadow, alone = (
        ArmRun(small_config(growth=GrowthConfig(incubator=incubator)), arm, 0, discard)
        for incubator, arm in (("straight_through", "grown"), ("shadow", "grown"), ("shadow", "static"))
    )
    runs = (straight, shadow, alone)
    while Stage.TRAINING not in shadow.model.stages().values():
        for run in runs:
            run.run_tick()
    before = {name: tensor.clone() for name, tensor in shadow.model.slots.state_dict().items()}
    spent = [run.progress.flops for run in runs]
    for run in runs:
        run.run_tick()
    hosts = [run.model.host.state_dict() for run in runs]
    assert all(torch.equal(tensor, other[name]) for other in hosts[1:] for name, tensor in hosts[0].items())
    after = shadow.model.slots.state_dict()
    assert before and not any(torch.equal(after[name], tensor) for name, tensor in before.items())
    costs = [run.progress.flops - start for run, start in zip(runs, spent, strict=True)]
    assert costs[1] > costs[0] > costs[2], "the tail runs once more, and the seed as often"
    while Stage.BLENDING not in shadow.model.stages().values():
        assert not shadow.done
        shadow.run_tick()
