"""Heads of a discrete action: which depends on which, and where each one's table of logits lies. Pure, numpy alone.

Each head has a table of logits, one row for each combination of the choices it is ``given``. The policy's last layer
gives all tables flat, one after the other, in C order; masks have exactly the same layout.

A head's *context* is what its distribution or its relevance hangs on: the heads it is given, then those that decide
whether it is relevant. A head is fully described by one row for each combination of the choices in its context.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from morphogen.config import Config

MAX_TABLE_ENTRIES = 65_536
MAX_ANCESTORS = 25  # letters of an equation; only heads with a single choice could reach it


class HeadConfig(Config):
    """One choice of a discrete action, and what it hangs on. Choices are counted from zero, whatever the space's start.

    Attributes:
        name: Name of the head in masks and messages.
        given: Earlier heads whose choices this head's distribution and mask depend on.
        relevant_when: Earlier head -> its choices for which this head matters; all must hold. A head decided by an
            irrelevant head is irrelevant itself. An irrelevant head takes its first valid choice, with log-probability 0.
        initial_logits: One for each choice, with which an untrained policy starts, whatever the heads before; None for all
            alike. Exploration is cheaper where what is rarely right is rarely tried; training is free to leave this.

    Example:
        >>> HeadConfig(name="slot", given=("op",), relevant_when={"op": (1, 2)}).given
        ('op',)
    """

    name: str = Field(min_length=1)
    given: tuple[str, ...] = ()
    relevant_when: dict[str, tuple[int, ...]] = {}
    initial_logits: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Head:
    """Where one head lies, and what it hangs on; other heads are named by position.

    Attributes:
        name: Its name.
        size: Number of choices.
        given: Heads that select the row of logits.
        context: ``given``, then the heads that decide relevance and are not among them.
        ancestors: Every head that the context hangs on, directly or not, in order.
        shape: Shape of its table of logits: sizes of ``given``, then ``size``.
        context_shape: Sizes of ``context``.
        first_output: Column of its table's first entry among the policy's outputs.
        columns: Column of the outputs for each row of the context and each choice, ``[rows, size]``.
        relevant: Whether the head matters in each row of the context, ``[rows]``; None if it always does.
        initial_logits: Of an untrained policy, ``[size]``.
        chances: Equation (as of einsum) from the tables of ``ancestors``, each of shape ``[*context, size, B]``, to the
            chance of each row of this head's context, ``[*context_shape, B]``.
    """

    name: str
    size: int
    given: tuple[int, ...]
    context: tuple[int, ...]
    ancestors: tuple[int, ...]
    shape: tuple[int, ...]
    context_shape: tuple[int, ...]
    first_output: int
    columns: NDArray[np.int64]
    relevant: NDArray[np.bool_] | None
    initial_logits: NDArray[np.float64]
    chances: str

    @property
    def row_strides(self) -> tuple[int, ...]:
        """How many rows of the context one step of each head in the context skips."""
        return tuple(math.prod(self.context_shape[place + 1 :]) for place in range(len(self.context)))

    @property
    def output_strides(self) -> tuple[int, ...]:
        """How many of the policy's outputs one step of each head in ``given`` skips."""
        return tuple(math.prod(self.shape[place + 1 :]) for place in range(len(self.given)))

    @property
    def outputs(self) -> slice:
        """The columns of its table among the policy's outputs."""
        return slice(self.first_output, self.first_output + math.prod(self.shape))

    @property
    def is_shared(self) -> bool:
        """Whether several rows of the context share one row of logits."""
        return self.context != self.given


def lay_out(sizes: Sequence[int], configs: Sequence[HeadConfig]) -> tuple[Head, ...]:
    """Return the heads of a space whose choices have ``sizes``, one config each and in the same order.

    Raises:
        ValueError: The configs do not fit the sizes or each other, or a table would have more than 65,536 entries.
    """
    names = [config.name for config in configs]
    if len(configs) != len(sizes):
        raise ValueError(
            f"`heads` must have one entry for each of the {len(sizes)} choices of the action space, in order, got "
            f"{len(configs)}: {', '.join(names) or 'none'}. Add or remove a HeadConfig."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"`heads` must have different names, got {', '.join(names)}. Rename the repeated one.")
    heads: list[Head] = []
    conditions: list[dict[int, frozenset[int]]] = []
    for place, config in enumerate(configs):
        _check_links(config, names[:place], dict(zip(names, sizes, strict=True)))
        conditions.append(_all_conditions(config, names, conditions))
        heads.append(_lay_out_head(config, [*heads], names, list(sizes), conditions[place]))
    return tuple(heads)


def _check_links(config: HeadConfig, earlier: Sequence[str], sizes: Mapping[str, int]) -> None:
    """Raise ValueError if ``config`` names something else than earlier heads and choices that they have."""
    for field, named in (("given", config.given), ("relevant_when", tuple(config.relevant_when))):
        unknown = [name for name in named if name not in earlier]
        if unknown or len(set(named)) < len(named):
            raise ValueError(
                f"`{field}` of head `{config.name}` must name heads before it, each once, got {', '.join(named)}. Heads "
                f"before it: {', '.join(earlier) or 'none'}; reorder the heads (and the space) if one comes later."
            )
    if config.initial_logits is not None and len(config.initial_logits) != sizes[config.name]:
        raise ValueError(
            f"`initial_logits` of head `{config.name}` must have one number for each of its {sizes[config.name]} choices, got "
            f"{len(config.initial_logits)}. Use 0 for a choice without preference."
        )
    for name, choices in config.relevant_when.items():
        if not 0 < len(set(choices)) < sizes[name] or not all(0 <= choice < sizes[name] for choice in choices):
            raise ValueError(
                f"`relevant_when` of head `{config.name}` must list some, not all, of the choices 0 to {sizes[name] - 1} "
                f"of `{name}`, got {choices}. Leave `{name}` out if it does not matter."
            )


def _all_conditions(
    config: HeadConfig, names: Sequence[str], earlier: Sequence[Mapping[int, frozenset[int]]]
) -> dict[int, frozenset[int]]:
    """Return the conditions of a head joined with those of the heads that decide about it."""
    joined: dict[int, frozenset[int]] = {}
    for name, choices in config.relevant_when.items():
        decider = names.index(name)
        for place, allowed in {decider: frozenset(choices), **earlier[decider]}.items():
            joined[place] = joined.get(place, allowed) & allowed
    if not all(joined.values()):
        raise ValueError(
            f"`relevant_when` of head `{config.name}` must be possible together with that of the heads it names, "
            f"got {config.relevant_when}. No choice makes the head matter."
        )
    return joined


def _lay_out_head(
    config: HeadConfig,
    earlier: Sequence[Head],
    names: Sequence[str],
    sizes: Sequence[int],
    conditions: Mapping[int, frozenset[int]],
) -> Head:
    given = tuple(names.index(name) for name in config.given)
    context = given + tuple(place for place in sorted(conditions) if place not in given)
    ancestors = tuple(sorted({*context}.union(*(earlier[place].ancestors for place in context))))
    size = sizes[len(earlier)]
    entries = size * math.prod(sizes[place] for place in ancestors)
    if entries > MAX_TABLE_ENTRIES or len(ancestors) > MAX_ANCESTORS:
        raise ValueError(
            f"head `{config.name}` must have at most {MAX_TABLE_ENTRIES:,} combinations with the at most {MAX_ANCESTORS} heads "
            f"it hangs on ({', '.join(names[place] for place in ancestors) or 'none'}), got {entries:,}. "
            "Let it be given fewer heads, or split its choices over several smaller heads."
        )
    context_shape = tuple(sizes[place] for place in context)
    shape = (*(sizes[place] for place in given), size)
    choices = np.indices(context_shape).reshape(len(context), math.prod(context_shape))  # of each row of the context
    first_output = earlier[-1].outputs.stop if earlier else 0
    row = np.zeros(choices.shape[1], np.int64)
    for place in range(len(given)):
        row = row * shape[place] + choices[place]
    relevant = np.ones(choices.shape[1], np.bool_)
    for place, allowed in conditions.items():
        relevant &= np.isin(choices[context.index(place)], tuple(allowed))
    return Head(
        name=config.name,
        size=size,
        given=given,
        context=context,
        ancestors=ancestors,
        shape=shape,
        context_shape=context_shape,
        first_output=first_output,
        columns=first_output + row[:, None] * size + np.arange(size),
        relevant=relevant if conditions else None,
        initial_logits=np.array(config.initial_logits or (0.0,) * size),
        chances=_chances(context, ancestors, earlier),
    )


def _chances(context: Sequence[int], ancestors: Sequence[int], earlier: Sequence[Head]) -> str:
    """Return the equation of :attr:`Head.chances`."""
    letter = dict(zip(ancestors, string.ascii_lowercase, strict=False))

    def spell(places: Sequence[int]) -> str:
        return "".join(letter[place] for place in places) + "Z"

    return ",".join(spell((*earlier[place].context, place)) for place in ancestors) + "->" + spell(context)
