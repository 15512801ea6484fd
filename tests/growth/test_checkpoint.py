"""Structure travels: saved in every stage into a fresh model, rewound across every change, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from morphogen.errors import CheckpointError, StateMismatch
from morphogen.growth import GrowableModel, Sowing, Stage, with_fossils
from morphogen.testing import LENIENT, HostCase, lead_to

CASE = HostCase("NCHW")
SOWING: dict[str, Any] = {"operator": "gate", "alpha_target": 0.8, "blend_ticks": 6}


def at_stage(kit: Any, stage: Stage, optimizer: str = "adam", seed: int = 0) -> Any:
    """A run with a trained seed in ``stage`` and a second one that incubates."""
    run = kit.run(CASE, optimizer, seed=seed)
    run.steps(2)
    if stage is not Stage.DORMANT:
        run.sow("early", "mlp", **SOWING)
    run.sow("late", "low_rank", Stage.TRAINING, options={"rank": 3})
    run.steps(2)
    if stage is not Stage.DORMANT:
        lead_to(run.model, "early", stage, CASE.example())
    run.step()
    return run


def go_on(run: Any) -> list[Any]:
    """Everything that happens to a run in the next ticks: outputs, alphas, stages, and what is in it at the end."""
    trace: list[Any] = []
    for tick in range(9):
        trace.append(run.step())
        run.model.tick()
        if tick == 2 and run.model.stages()["early"] in (Stage.BLENDING, Stage.HOLDING):
            run.model.set_alpha_target("early", 0.3, over=4, curve="cosine")
        if tick == 6 and run.model.stages()["early"] is Stage.BLENDING:
            run.model.prune("early", over=2)
        if run.model.stages()["early"] is Stage.DORMANT:
            run.model.germinate("early", "conv3x3")
        trace.append((run.model.alphas(), run.model.stages(), run.model.clock))
    contents = run.contents()
    del contents["identity"], contents["hooks"]
    return [*trace, contents]


@pytest.mark.parametrize("stage", Stage, ids=lambda stage: stage.name)
def test_a_fresh_model_goes_on_as_the_saved_one(kit: Any, tmp_path: Path, stage: Stage) -> None:
    run = at_stage(kit, stage)
    run.state.save(tmp_path / "checkpoint")
    fresh = kit.run(CASE)
    fresh.state.load(tmp_path / "checkpoint")
    fresh.state.verify()
    assert fresh.model.topology() == run.model.topology()
    before = run.contents()
    run.model.zero_grad()
    assert set(kit.differences(before, fresh.contents())) <= {"identity", "gradients", "hooks"}
    with torch.no_grad():
        ours, theirs = (model.eval()(CASE.example(7)) for model in (run.model, fresh.model))
    assert kit.same(ours, theirs)
    for model in (run.model, fresh.model):
        model.train()
    assert kit.same(go_on(run), go_on(fresh))


def test_the_manifest_holds_the_structure_as_json(kit: Any, tmp_path: Path) -> None:
    run = at_stage(kit, Stage.BLENDING)
    assert json.loads(json.dumps(run.model.topology(), allow_nan=False)) == run.model.topology()


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.BLENDING, Stage.FOSSILIZED], ids=lambda stage: stage.name)
@pytest.mark.parametrize("other", ["dormant", "another seed", "the same seed later"])
def test_loading_over_an_occupied_slot(kit: Any, tmp_path: Path, stage: Stage, other: str) -> None:
    run = at_stage(kit, stage)
    run.state.save(tmp_path / "checkpoint")
    twin = kit.run(CASE)
    if other == "another seed":
        twin.sow("early", "conv3x3", Stage.HOLDING)
        twin.sow("late", "norm", Stage.FOSSILIZED)
    if other == "the same seed later":
        twin.sow("early", "mlp", Stage.FOSSILIZED, **SOWING)
    twin.steps(3)
    twin.state.load(tmp_path / "checkpoint")
    twin.state.verify()
    assert twin.members() == twin.owned()
    assert kit.same(go_on(run), go_on(twin))


CHANGES = {
    "germination": (Stage.DORMANT, lambda run: run.sow("early", "mlp", **SOWING)),
    "training": (Stage.GERMINATED, lambda run: run.model.advance("early")),
    "blending": (Stage.TRAINING, lambda run: run.model.advance("early")),
    "pruning": (Stage.HOLDING, lambda run: run.model.prune("early")),
    "the end of a prune ramp": (Stage.HOLDING, lambda run: (run.model.prune("early", over=2), run.steps(3))),
    "fossilisation": (Stage.HOLDING, lambda run: lead_to(run.model, "early", Stage.FOSSILIZED, CASE.example())),
    "excision": (Stage.FOSSILIZED, lambda run: run.model.excise("early")),
    "another germination": (
        Stage.HOLDING,
        lambda run: (lead_to(run.model, "early", Stage.DORMANT, CASE.example()), run.sow("early", "conv3x3")),
    ),
}


@pytest.mark.parametrize("freeze", [True, False], ids=["frozen fossils", "live fossils"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_rewind_across_a_change_of_structure(kit: Any, change: str, freeze: bool) -> None:
    stage, make = CHANGES[change]
    run, twin = at_stage(kit, stage), at_stage(kit, stage)
    for each in (run, twin):
        each.model.config = LENIENT.replace(freeze_fossils=freeze)
    kept = dict(run.model.named_parameters())
    before, snapshot = run.contents(), run.state.capture()
    for _ in range(2):
        make(run)
        run.steps(2)
        run.state.restore(snapshot)
        run.state.verify()
        after = run.contents()
        changed = set(kit.differences(before, after)) - {"gradients"}
        assert changed <= {"identity"}
        assert run.members() == run.owned()
        assert all(parameter.grad is None for parameter in run.model.parameters())
        lost = {name for name, parameter in run.model.named_parameters() if parameter is not kept[name]}
        gone = change in ("pruning", "the end of a prune ramp", "excision", "another germination")
        assert lost == ({name for name in kept if name.startswith("slots.early.")} if gone else set())
    assert kit.same(go_on(run), go_on(twin))


def test_a_rewind_to_a_frozen_fossil_freezes_it_again(kit: Any) -> None:
    run = kit.run(CASE, config=LENIENT.replace(freeze_fossils=True))
    run.sow("early", "mlp", Stage.FOSSILIZED)
    snapshot = run.state.capture()
    run.model.excise("early")
    run.state.restore(snapshot)
    run.state.verify()
    frozen = [parameter for _, parameter in run.model.owners()["early"]]
    assert frozen and not any(parameter.requires_grad for parameter in frozen)
    assert not {id(parameter) for parameter in frozen} & run.members()


@pytest.mark.parametrize("over", ["nothing", "the same seed holding"])
def test_adopting_a_frozen_fossil_freezes_it_here_too(kit: Any, over: str) -> None:
    config = LENIENT.replace(freeze_fossils=True)
    source, target = kit.run(CASE, config=config), kit.run(CASE, config=config)
    source.sow("early", "mlp", Stage.FOSSILIZED)
    if over == "the same seed holding":
        target.sow("early", "mlp", Stage.HOLDING)
    target.state.adopt(source.state.capture())
    target.state.verify()
    owned = target.model.owners()["early"]
    assert owned and not any(parameter.requires_grad for _, parameter in owned)
    assert not {id(parameter) for _, parameter in owned} & target.members()


def test_growth_built_in_from_the_start_is_drawn_from_the_models_streams_and_trains(kit: Any) -> None:
    """Also where fossils are frozen: nothing was trained yet that could be kept."""
    sowings = {"early": Sowing(blueprint="mlp", operator="gate"), "late": Sowing(blueprint="mlp")}
    config = LENIENT.replace(freeze_fossils=True)
    first, second, other = (kit.run(CASE, config=config, seed=seed) for seed in (0, 0, 1))
    for run in (first, second, other):
        run.model.plan_topology(with_fossils(run.model.topology(), sowings)).commit()
        run.state.verify()
        assert run.members() == run.owned() == {id(parameter) for parameter in run.model.parameters()}
    weights = [{n: t.clone() for n, t in run.model.slots.state_dict().items()} for run in (first, second, other)]
    assert kit.same(weights[0], weights[1])
    random = [name for name, tensor in weights[0].items() if bool(tensor.any()) and "seed" in name]
    assert random and not any(torch.equal(weights[0][name], weights[2][name]) for name in random)
    twins = [name for name in random if name.startswith("early") and name.replace("early", "late") in weights[0]]
    assert twins and not any(torch.equal(weights[0][n], weights[0][n.replace("early", "late")]) for n in twins)
    first.steps(3)
    assert all(not torch.equal(weights[0][name], first.model.slots.state_dict()[name]) for name in random)


def test_adopting_from_a_run_with_other_seeds(kit: Any) -> None:
    source, target = at_stage(kit, Stage.HOLDING), kit.run(CASE, seed=5)
    target.sow("late", "conv3x3", Stage.BLENDING)
    target.steps(2)
    target.state.adopt(source.state.capture(), optimizer="copy")
    target.state.verify()
    assert target.model.topology() == source.model.topology()
    assert target.members() == target.owned()
    with torch.no_grad():
        assert kit.same(*(model.eval()(CASE.example()) for model in (source.model, target.model)))


MISFITS = {
    "other slots": lambda: GrowableModel(CASE.build(), {"early": "norm"}, CASE.example()),
    "more slots": lambda: GrowableModel(CASE.build(), {**CASE.points, "more": "stem"}, CASE.example()),
    "another place": lambda: GrowableModel(CASE.build(), {"early": "stem", "late": "body"}, CASE.example()),
    "another width": lambda: HostCase("NCHW", 12).model(),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_structure_of_another_model_is_refused(kit: Any, tmp_path: Path, misfit: str) -> None:
    run = at_stage(kit, Stage.BLENDING)
    run.state.save(tmp_path / "checkpoint")
    model = MISFITS[misfit]()
    topology = model.topology()
    with pytest.raises(StateMismatch, match="the topology does not fit this model.*\n.*slot '(more|late|early)'"):
        model.plan_topology(run.model.topology())
    state = type(run.state)(model, torch.optim.Adam(model.parameters()), extras={"data": torch.Generator()})
    with pytest.raises(CheckpointError, match="does not fit this run: the topology does not fit"):
        state.load(tmp_path / "checkpoint")
    assert model.topology() == topology
    state.verify()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {**t, "format": 99}, "format 2, got 99"),
        (lambda t: [t], "format 2, got list"),
        (lambda t: None, "format 2, got NoneType"),
        (lambda t: edited(t, "blueprint", "conv9x9"), "`blueprint` must be one of"),
        (lambda t: edited(t, "options", {"depth": 3}), "`options` of 'mlp'"),
        (lambda t: edited(t, "stage", "SLEEPING"), "slot 'early'.*SLEEPING"),
        (lambda t: edited(t, "colour", "red"), "slot 'early'.*colour"),
    ],
)
def test_a_damaged_structure_is_refused(kit: Any, change: Any, match: str) -> None:
    run = at_stage(kit, Stage.BLENDING)
    before = run.contents()
    with pytest.raises((StateMismatch, ValueError), match=match):
        run.model.plan_topology(change(run.model.topology()))
    assert kit.differences(before, run.contents()) == []


def edited(topology: Any, field: str, value: object) -> Any:
    copy = json.loads(json.dumps(topology))
    copy["slots"]["early"]["state"][field] = value
    return copy


def test_planning_touches_nothing_until_commit(kit: Any) -> None:
    source, run = at_stage(kit, Stage.FOSSILIZED), at_stage(kit, Stage.DORMANT)
    before = run.contents()
    planned = run.model.plan_topology(source.model.topology())
    assert list(planned.named_tensors()) == [name for name in list_tensors(source.model)]
    assert kit.differences(before, run.contents()) == []
    planned.commit()
    assert run.model.topology() == source.model.topology()
    run.state.verify()


def list_tensors(model: GrowableModel) -> list[str]:
    names: list[str] = []
    for prefix, part in model.named_modules():
        names += [f"{prefix}.{key}" for key in (*part._parameters, *part._buffers) if getattr(part, key) is not None]
    return names


def test_options_survive_json_so_that_the_same_seed_is_known_again(kit: Any, tmp_path: Path) -> None:
    run = kit.run(CASE)
    run.model.germinate("early", Sowing(blueprint="mlp", options={"expansion": 3}))
    kept = {name: id(parameter) for name, parameter in run.model.named_parameters()}
    run.state.save(tmp_path / "checkpoint")
    run.state.load(tmp_path / "checkpoint")
    assert {name: id(parameter) for name, parameter in run.model.named_parameters()} == kept


def test_events_are_told_of_each_transition_once(kit: Any) -> None:
    run = kit.run(CASE)
    run.sow("early", "mlp", Stage.FOSSILIZED)
    run.model.excise("early")
    for _ in range(10):
        run.model.tick()
    seen = [(event.previous, event.stage) for event in run.events if type(event).__name__ == "StageChanged"]
    order = [*list(Stage), Stage.DORMANT]
    assert seen == list(zip(order, order[1:], strict=False))
    assert all(event.slot == "early" and event.blueprint in ("mlp", None) for event in run.events)
