"""The base of every config: frozen, keyword-only, strict about names and types, checked at construction."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError


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

    def replace(self, **changes: Any) -> Self:
        """Return a config of the same kind with ``changes`` applied and everything checked again."""
        return type(self)(**{**self.__dict__, **changes})


def _explain(config: type[BaseModel], error: ValidationError) -> str:
    """One sentence for each wrong field: which, what it must be, what it was."""
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(field, config.model_fields, n=1)
            hint = f"Did you mean `{near[0]}`?" if near else f"Known names: {', '.join(config.model_fields)}."
            lines.append(f"`{field}` is not a setting of {config.__name__}. {hint}")
        elif problem["type"] == "value_error":
            lines.append(str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"])
        else:
            rule = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            lines.append(f"`{field}` must be {rule}, got {problem['input']!r}. Change it in {config.__name__}.")
    return " ".join(lines)
