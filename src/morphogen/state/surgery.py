"""Optimizer surgery: no module but these (``surgery*.py``) touches ``optimizer.state`` and ``optimizer.param_groups``.

Works for every ``torch.optim`` optimizer: foreach, fused, capturable, tensor learning rates, Muon. Facts it rests on
(torch 2.13): ``load_state_dict`` keeps the tensors it is given, so the snapshot and the optimizer would share memory; a
key left in ``optimizer.state`` after its parameter left the groups breaks ``state_dict()``; moments zeroed with
``step`` kept make Adam's next update up to six times too large. So state is copied in place, dropped with its
parameter, and moments and ``step`` go together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS, Muon, Optimizer, RMSprop

from morphogen.errors import StateMismatch
from morphogen.state import fitting, layout
from morphogen.state.fitting import FIRST_MOMENTS
from morphogen.state.layout import Owned, Placement
from morphogen.state.records import GroupRecord, OptimizerRecord
from morphogen.state.schedules import GroupMove, plan_scaling, plan_schedule

SECOND_MOMENTS = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "row_var", "col_var", "variance"})
"""State keys that average or sum squared gradients, or their largest."""


def parameters_of(optimizer: Optimizer) -> list[Parameter]:
    """Return the optimizer's parameters, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def read(optimizer: Optimizer, names: Mapping[int, str]) -> OptimizerRecord:
    """Return the contents of ``optimizer`` by name, *aliasing* its tensors.

    Args:
        optimizer: The optimizer to read.
        names: ``id(parameter)`` -> name, for each parameter of the optimizer.

    Raises:
        StateMismatch: A parameter of the optimizer has no name.
    """
    orphans = [tuple(parameter.shape) for parameter in parameters_of(optimizer) if id(parameter) not in names]
    if orphans:
        raise StateMismatch(
            f"an optimizer holds a parameter of shape {orphans[0]} that is in no model of this run (replaced by "
            "`load_state_dict(assign=True)`, or never part of it). Call verify() to see which, and build the optimizer "
            "from the live parameters."
        )
    groups = tuple(
        GroupRecord(
            tuple(names[id(parameter)] for parameter in group["params"]),
            {key: value for key, value in group.items() if key not in ("params", "param_names")},
        )
        for group in optimizer.param_groups
    )
    state = {
        names[id(parameter)]: values
        for parameter in parameters_of(optimizer)
        if (values := optimizer.state.get(parameter)) is not None
    }
    return OptimizerRecord(type(optimizer).__name__, groups, state)


def misshapen(optimizer: Optimizer, names: Mapping[int, str]) -> list[str]:
    """Return one line for each moment that has not the shape of its parameter; ``names`` as in :func:`read`."""
    return [
        line
        for parameter in parameters_of(optimizer)
        for line in fitting.misshapen(type(optimizer), names[id(parameter)], optimizer.state.get(parameter, {}), parameter)
    ]


def write(
    optimizer: Optimizer,
    record: OptimizerRecord,
    parameters: Mapping[str, Parameter],
    schedulers: Sequence[object] = (),
) -> list[tuple[Tensor, Tensor]]:
    """Make ``optimizer`` hold exactly ``record``: groups, options, membership and state; nothing stays aliased.

    Args:
        optimizer: Changed in place; a group dict stays its owner's, or keeps its position where there are no owners.
        record: What to write; must have no :func:`fitting.misfits`.
        parameters: Name -> parameter, for every name in ``record``.
        schedulers: Their per-group lists get as many entries as there are groups; the caller loads their values.

    Returns:
        Pairs (live tensor, recorded tensor) of equal shape that the caller still has to copy, all in one batch.

    Raises:
        StateMismatch: A scheduler cannot follow; nothing was changed.
    """
    old_groups = optimizer.param_groups[:]
    positions = layout.matching_groups([saved.options.get("owner") for saved in record.groups], old_groups)
    moves = [GroupMove(0 if old_groups and position is None else position) for position in positions]
    commits = [plan_schedule(scheduler, moves, len(old_groups)) for scheduler in schedulers]
    named, given = any("param_names" in group for group in old_groups), layout.names_in(old_groups)
    groups: list[dict[str, Any]] = []
    for position, saved in zip(positions, record.groups, strict=True):
        live: dict[str, Any] = {"params": []} if position is None else old_groups[position]
        _write_group(live, saved, [parameters[name] for name in saved.names], optimizer.defaults)
        if named:
            live["param_names"] = [given.get(id(parameters[name]), name) for name in saved.names]
        groups.append(live)
    optimizer.param_groups[:] = groups
    for commit in commits:
        commit()
    return write_state(optimizer, record.state, parameters)


def _write_group(group: dict[str, Any], saved: GroupRecord, members: list[Parameter], defaults: Mapping[str, Any]) -> None:
    """Rewrite one live group in place, so that references to it and to its tensor learning rate stay good."""
    group["params"][:] = members
    options = {**defaults, **saved.options}
    for key in [key for key in group if key not in options and key not in ("params", "param_names")]:
        del group[key]
    for key, value in options.items():
        live = group.get(key)
        if isinstance(live, Tensor) and isinstance(value, Tensor):
            live.copy_(value)
        else:
            group[key] = value.clone() if isinstance(value, Tensor) else value


def write_state(
    optimizer: Optimizer, state: Mapping[str, Mapping[str, Any]], parameters: Mapping[str, Parameter]
) -> list[tuple[Tensor, Tensor]]:
    """Replace all per-parameter state by ``state``; groups and options stay. Returns copies as :func:`write` does."""
    wanted = {id(parameters[name]): values for name, values in state.items()}
    for parameter in [parameter for parameter in optimizer.state if id(parameter) not in wanted]:
        del optimizer.state[parameter]
    copies: list[tuple[Tensor, Tensor]] = []
    for group in optimizer.param_groups:
        on_device = bool(group.get("capturable") or group.get("fused"))
        for parameter in group["params"]:
            if id(parameter) in wanted:
                copies += _write_values(optimizer.state[parameter], wanted[id(parameter)], parameter, on_device)
    return copies


def _write_values(
    live: dict[str, Any], saved: Mapping[str, Any], parameter: Parameter, step_on_device: bool
) -> list[tuple[Tensor, Tensor]]:
    if live.keys() != saved.keys():
        for key in live.keys() - saved.keys():
            del live[key]
    copies: list[tuple[Tensor, Tensor]] = []
    for key, value in saved.items():
        old = live.get(key)
        if not isinstance(value, Tensor):
            live[key] = copy.deepcopy(value)
        elif isinstance(old, Tensor) and old is not value and old.shape == value.shape and old.dtype == value.dtype:
            copies.append((old, value))
        elif value.shape == parameter.shape and value.ndim:  # in the parameter's memory layout: fused kernels rely on it
            live[key] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
            copies.append((live[key], value))
        else:
            device = value.device if key == "step" and not step_on_device else parameter.device
            live[key] = value.detach().to(device, copy=True)
    return copies


def reset_moments(optimizer: Optimizer, parameters: Iterable[Parameter] | None = None) -> None:
    """Forget moments and step, of ``parameters`` or of all; groups, learning rates and schedule are untouched.

    The next update is that of a new optimizer: with Adam at most one learning rate long, but ten times as large as usual
    for RMSprop, which has no bias correction; see :func:`soften_first_step`.
    """
    if parameters is None:
        optimizer.state.clear()
        return
    for parameter in parameters:
        if parameter in optimizer.state:
            del optimizer.state[parameter]


def zero_momentum(optimizer: Optimizer, parameters: Iterable[Parameter] | None = None) -> None:
    """Zero the first moments in place, of ``parameters`` or of all, and keep second moments and ``step``.

    The next steps start without direction.

    Raises:
        StateMismatch: A second moment is not finite, so the zeroed run would be poisoned at once; nothing was changed.
    """
    chosen = list(optimizer.state) if parameters is None else [p for p in parameters if p in optimizer.state]
    for parameter in chosen:
        for key, value in optimizer.state[parameter].items():
            if key not in FIRST_MOMENTS and isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                raise StateMismatch(
                    f"second moment `{key}` of a parameter of shape {tuple(parameter.shape)} must be finite to zero the "
                    'momentum alone. Use "reset" or "restore".'
                )
    with torch.no_grad():
        for parameter in chosen:
            state = optimizer.state[parameter]
            for moment in (state[key] for key in FIRST_MOMENTS if isinstance(state.get(key), Tensor)):
                moment.zero_()


def soften_first_step(optimizer: Optimizer) -> int:
    """Give parameters that have no moments yet, but a gradient, those that make the first step one learning rate long.

    Only RMSprop needs it: it corrects no bias, so its first step after a reset is 1 / sqrt(1 - alpha) learning rates long, ten
    at the defaults. Its running square is set to the square of the present gradient. Call it after ``backward``.

    Returns:
        How many parameters were given moments; 0 for all other optimizers.
    """
    if not isinstance(optimizer, RMSprop):
        return 0
    softened = 0
    with torch.no_grad():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None or parameter.grad.is_sparse or optimizer.state.get(parameter):
                    continue
                state = {"step": torch.zeros((), device=parameter.device if group["capturable"] else None)}
                state["square_avg"] = parameter.grad.square()
                if group["momentum"] > 0:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                if group["centered"]:
                    state["grad_avg"] = torch.zeros_like(parameter)
                optimizer.state[parameter] = state
                softened += 1
    return softened


def rescale_moments(optimizer: Optimizer, ratio: float | Mapping[Parameter, float]) -> None:
    """Multiply first moments by ``ratio`` = old learning rate / new learning rate, in place.

    The velocity ``learning rate * momentum`` then does not jump when the learning rate does. Second moments are
    estimates of the gradient's size, whatever the learning rate, and stay.

    Args:
        optimizer: The optimizer whose learning rate changes.
        ratio: One positive finite factor for all, or one for each parameter.

    Raises:
        ValueError: A ratio is not positive and finite.
    """
    factors = ratio if isinstance(ratio, Mapping) else {parameter: ratio for parameter in optimizer.state}
    for factor in factors.values():
        if not 0.0 < factor < float("inf"):
            raise ValueError(f"`ratio` must be positive and finite, got {factor}. Pass old over new learning rate.")
    with torch.no_grad():
        for parameter, factor in factors.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                if key in FIRST_MOMENTS and isinstance(value, Tensor):
                    value.mul_(factor)


def scale_moments(optimizer: Optimizer, *, first: float = 1.0, second: float = 1.0) -> int:
    """Multiply first and second moments in place and keep ``step``, to see what a run makes of it: a fault, not a repair.

    When a learning rate changes, :func:`rescale_moments` is meant.

    Args:
        optimizer: The optimizer whose moments change.
        first: Finite factor of the moments that average gradients.
        second: Finite factor >= 0 of those that average squared gradients.

    Returns:
        How many tensors were multiplied; 0 before the first step, or when the optimizer keeps no such moments.

    Raises:
        ValueError: A factor is out of range.
    """
    if not (abs(first) < float("inf") and 0.0 <= second < float("inf")):
        raise ValueError(f"`first` must be finite and `second` finite and >= 0, got {first} and {second}. Pass for example 0.")
    factors = dict.fromkeys(FIRST_MOMENTS, first) | dict.fromkeys(SECOND_MOMENTS, second)
    changed = 0
    with torch.no_grad():
        for state in optimizer.state.values():
            for key, value in state.items():
                factor = factors.get(key, 1.0)
                if factor != 1.0 and isinstance(value, Tensor):
                    value.mul_(factor)
                    changed += 1
    return changed


def copy_moments(
    target: Optimizer,
    source: Optimizer,
    *,
    target_parameters: Mapping[str, Parameter],
    source_parameters: Mapping[str, Parameter],
) -> None:
    """Give ``target`` clones of ``source``'s moments and steps, matched by parameter *name*; its groups and rates stay.

    Args:
        target: Optimizer that is changed.
        source: Optimizer that is read; of the same class.
        target_parameters: Name -> parameter of the target's model, for example ``dict(model.named_parameters())``.
        source_parameters: The same of the source's model.

    Raises:
        StateMismatch: Class, names, shapes or state layout differ; nothing was changed.
    """
    ours, theirs = (
        read(optimizer, {id(parameter): name for name, parameter in parameters.items()})
        for optimizer, parameters in ((target, target_parameters), (source, source_parameters))
    )
    problems = fitting.copy_misfits(type(target), ours, theirs, target_parameters)
    if problems:
        raise StateMismatch("moments cannot be copied.", tuple(problems))
    with torch.no_grad():
        for live, saved in write_state(target, theirs.state, target_parameters):
            live.copy_(saved)


def learning_rates(optimizer: Optimizer) -> dict[Parameter, float]:
    """Return the learning rate of each parameter as a float (a tensor rate is read, which waits for its device)."""
    return {parameter: float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}


def live_rates(optimizer: Optimizer) -> list[float | Tensor]:
    """Return the learning rate of each group; a tensor rate is *aliased*, and not read."""
    return [group["lr"] for group in optimizer.param_groups]


def set_learning_rate(optimizer: Optimizer, learning_rate: float, owner: str | None = None) -> None:
    """Set the learning rate of the groups of ``owner`` (all groups if None) in place, tensor rates included.

    Raises:
        ValueError: The rate is negative or not finite, or no group belongs to ``owner``.
    """
    if not 0.0 <= learning_rate < float("inf"):
        raise ValueError(f"`learning_rate` must be >= 0 and finite, got {learning_rate}. Pass a finite rate.")
    groups = [group for group in optimizer.param_groups if owner is None or group.get("owner") == owner]
    if not groups:
        owners = sorted({str(group.get("owner")) for group in optimizer.param_groups})
        raise ValueError(f"`owner` must be one of {owners}, got {owner!r}. Call sync_groups first.")
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(learning_rate)
        else:
            group["lr"] = learning_rate


def scale_learning_rates(optimizer: Optimizer, factor: float, schedulers: Sequence[object] = ()) -> None:
    """Multiply every group's learning rate, and the rates its schedules start from and aim at, by ``factor``."""
    if not 0.0 < factor < float("inf"):
        raise ValueError(f"`factor` must be positive and finite, got {factor}. Pass for example 0.5.")
    groups = optimizer.param_groups
    commits = [plan_scaling(scheduler, factor, len(groups)) for scheduler in schedulers]
    for group in groups:
        for key in ("lr", *layout.RATE_OPTIONS):
            value = group.get(key)
            if isinstance(value, Tensor):
                value.mul_(factor)
            elif value is not None:
                group[key] = value * factor
    for commit in commits:
        commit()


def remember(optimizer: Optimizer) -> Callable[[], None]:
    """Return a function that puts back the groups, their options and members, and which state each parameter has.

    It holds references to state, not copies: moments that were written in between are not put back.
    """
    groups = [(group, {**group, "params": list(group["params"])}) for group in optimizer.param_groups]
    rates = [(v, v.detach().clone()) for group, _ in groups for v in group.values() if isinstance(v, Tensor)]
    state = [(parameter, values, dict(values)) for parameter, values in optimizer.state.items()]

    def put_back() -> None:
        for group, before in groups:
            members = group["params"]
            group.clear()
            members[:] = before["params"]
            group.update({**before, "params": members})
        optimizer.param_groups[:] = [group for group, _ in groups]
        for live, before in rates:
            live.copy_(before)
        optimizer.state.clear()
        for parameter, values, before in state:
            values.clear()
            values.update(before)
            optimizer.state[parameter] = values

    return put_back


def group_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rate of each owner's first group; one without an owner is called ``group0``, ``group1``..."""
    rates: dict[str, float] = {}
    for index, group in enumerate(optimizer.param_groups):
        rates.setdefault(str(group.get("owner", f"group{index}")), float(group["lr"]))
    return rates


def group_members(optimizer: Optimizer) -> dict[str, list[Parameter]]:
    """Return the parameters of each owner, over all its groups; owners are named as in :func:`group_rates`."""
    members: dict[str, list[Parameter]] = {}
    for index, group in enumerate(optimizer.param_groups):
        members.setdefault(str(group.get("owner", f"group{index}")), []).extend(group["params"])
    return members


def sync_groups(
    optimizer: Optimizer,
    owners: Mapping[str, Owned],
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    schedulers: Sequence[object] = (),
) -> None:
    """Make the optimizer's membership what the owners own: exactly their trainable parameters, each once.

    Existing groups keep their options and the state of the parameters that stay; a group belongs to the owner named
    under its key ``"owner"``, else to the owner of its first owned parameter. State of parameters that leave is
    dropped, groups of owners that are gone are removed, and an owner without a group gets one: a copy of the options of
    the group its parameters were in, else of the first group, changed by ``options[owner]``. A newborn with its own
    ``lr`` keeps that ratio to the group it is modelled on for the rest of the schedule.

    Args:
        optimizer: Changed in place; group dicts that stay keep their identity.
        owners: Owner name -> its parameters, or (name, parameter) pairs. Frozen parameters are left out.
        options: Options for groups that are *made* in this call, by owner.
        schedulers: The schedulers stepping this optimizer; their per-group lists follow.

    Raises:
        ValueError: A parameter has two owners, or an option is not one of this optimizer's or no rate.
        TypeError: A parameter is no leaf, so that it has no gradient to step by.
        StateMismatch: The optimizer or a scheduler cannot follow, with the reason; nothing was changed.
    """
    owned = layout.ownership(owners)
    groups = optimizer.param_groups
    placements = layout.place(groups, owned, options or {})
    _refuse_unfit(optimizer, placements)
    moves = [layout.move_of(placement, groups) for placement in placements]
    commits = [plan_schedule(scheduler, moves, len(groups)) for scheduler in schedulers]
    _apply(optimizer, placements, owned.names | layout.names_in(groups))
    for commit in commits:
        commit()
    kept = set(parameters_of(optimizer))
    for parameter in [parameter for parameter in optimizer.state if parameter not in kept]:
        del optimizer.state[parameter]


def _refuse_unfit(optimizer: Optimizer, placements: Sequence[Placement]) -> None:
    for placement in placements:
        unknown = sorted(set(placement.options) - set(optimizer.defaults) - set(layout.RATE_OPTIONS))
        if unknown:
            raise ValueError(
                f"options of `{placement.owner}` must be options of {type(optimizer).__name__}, got {unknown}. "
                f"Known: {', '.join(optimizer.defaults)}."
            )
        rate = float(placement.options.get("lr", 0.0))
        if not 0.0 <= rate < float("inf"):
            raise ValueError(f"`lr` of `{placement.owner}` must be >= 0 and finite, got {rate}. Pass a finite rate.")
        flat = [parameter for parameter in placement.members if parameter.ndim != 2]
        if isinstance(optimizer, Muon) and flat:
            raise StateMismatch(
                f"Muon must own 2-D parameters only, got shape {tuple(flat[0].shape)} from `{placement.owner}`. "
                "Give it to a second optimizer, such as AdamW."
            )
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    if isinstance(optimizer, LBFGS) and [{id(p) for p in placement.members} for placement in placements] != [held]:
        raise StateMismatch(
            "LBFGS must keep its parameters in one group: its history is one flat vector over all of them, got a changed "
            "set. Use a first-order optimizer for a network that grows."
        )


def _apply(optimizer: Optimizer, placements: Sequence[Placement], names: Mapping[int, str]) -> None:
    """Rewrite the groups; everything was checked before, so this cannot stop half-way."""
    named = any("param_names" in group for group in optimizer.param_groups)
    newborn_options = [layout.newborn_options(placement, optimizer.param_groups) for placement in placements]
    groups: list[dict[str, Any]] = []
    for placement, options in zip(placements, newborn_options, strict=True):
        group = placement.group
        if group is None:
            group = {"params": [], **optimizer.defaults, **options}
        group["params"][:] = placement.members
        group["owner"] = placement.owner
        if named:
            group["param_names"] = [names[id(parameter)] for parameter in placement.members]
        groups.append(group)
    optimizer.param_groups[:] = groups
