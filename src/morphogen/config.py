"""The base of every config: frozen, keyword-only, strict about names, checked at construction."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

_QUOTED = re.compile(r"'([^']*)'")


class Config(BaseModel):
    """A frozen record of knobs. A bad value or an unknown name is a ``ValueError`` that says what to write instead.

    Changing a knob means making a new config: ``config.model_copy(update=...)`` skips the checks, so use
    :meth:`replace`.

    Example:
        >>> class Ramp(Config):
        ...     ticks: int = 5
        >>> Ramp(ticks=3).replace(ticks=8)
        Ramp(ticks=8)
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            """Check ``values``; ValueError lists each bad field in this project's words."""
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ValueError(_explain(type(self), error)) from None

        def __setattr__(self, name: str, value: Any) -> None:
            """Refuse: what ran must be what was written."""
            raise AttributeError(f"`{name}` of a {type(self).__name__} cannot be set. Use replace({name}={value!r}).")

    def replace(self, **changes: Any) -> Self:
        """Return a config of the same kind with ``changes`` applied and everything checked again; what is unset stays so."""
        given = {name: value for name, value in self.__dict__.items() if name in self.model_fields_set}
        return type(self)(**{**given, **changes})


def _explain(config: type[BaseModel], error: ValidationError) -> str:
    """One sentence for each wrong field: which, what it must be, what it was."""
    problems = error.errors(include_url=False)
    parents = {problem["loc"][:depth] for problem in problems for depth in range(1, len(problem["loc"]))}
    return " ".join(_sentence(config, problem) for problem in problems if problem["loc"] not in parents)


def _sentence(config: type[BaseModel], problem: ErrorDetails) -> str:
    field, kind = ".".join(str(part) for part in problem["loc"]), problem["type"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(field, config.model_fields, n=1)
        hint = f"Did you mean `{near[0]}`?" if near else f"Known names: {', '.join(config.model_fields)}."
        return f"`{field}` is not a setting of {config.__name__}. {hint}"
    if kind == "missing":
        return f"`{field}` must be given, it has no default. Pass it to {config.__name__}."
    if kind == "value_error":
        return str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"]
    rule = problem["msg"].partition(" should ")[2] or problem["msg"]
    near = difflib.get_close_matches(str(problem["input"]), _QUOTED.findall(rule), n=1) if kind == "literal_error" else []
    hint = f"Did you mean {near[0]!r}?" if near else f"Change it in {config.__name__}."
    return f"`{field}` must {rule}, got {problem['input']!r}. {hint}"
