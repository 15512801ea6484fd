"""What growth asks of torch.compile.

A graph is made for each combination of what the slots do (nothing, incubate, blend, act in full) and of their blueprints, when
it is met for the first time: a ramp makes none, and neither does a seed of a kind that was there before. torch keeps
``torch._dynamo.config.recompile_limit`` of them, 8 by default, and runs what comes after uncompiled: raise it where more than
two slots grow, or compile anew (``torch.compiler.reset``) now and then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

_P = ParamSpec("_P")
_R = TypeVar("_R")


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return ``function`` as one that compiled code calls uncompiled; torch's own decorator loses the signature."""
    return cast("Callable[_P, _R]", torch.compiler.disable(function))
