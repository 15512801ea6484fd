"""Which versions a job ran with."""

from __future__ import annotations

import platform

import numpy as np
import torch

from morphogen.version import __version__


def versions() -> dict[str, str]:
    """Return the versions that results depend on most."""
    return {
        "morphogen": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
