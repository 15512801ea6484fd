"""The reward as Markdown, made of its own docstrings."""

from __future__ import annotations

import inspect
import re

from morphogen.config import Config
from morphogen.envs.rewards.config import PRESETS, RewardConfig
from morphogen.envs.rewards.presets import TERMS, TERMS_OF

OMITTED = (
    ("synergy of pairs, hindsight for fossils that others came to need", "needs every pair's ablation at every tick; what "
     "seeds do together is in the metric, and limits the credit of each"),
    ("occupancy of slots", "the rent of the seeds in them is the same price, and knows their size"),
    ("warnings for blending and for holding long", "rent runs meanwhile, and advancing is paid by the potential of stages"),
    ("ratio of a contribution to that of all seeds", "credit is the least of both: there is nothing to be gained by a ratio"),
    ("clawback for seeds unfinished at the end", "the potential is 0 at the end, which takes back exactly what was paid"),
    ("payment for pruning", "that a bad seed is gone shows in rent and metric; a payment for it is a reason to sow bad ones"),
    ("attribution every tick", "pays again and again for the same; ``escrow`` pays for changes, ``drip`` out of a pool"),
    ("penalties for actions that a gate refuses", "such actions are masked"),
)  # fmt: skip
"""Concepts known from other systems that no preset has, and why."""


def table() -> str:
    """Return every term as a row of a Markdown table: name, presets, what for, formula."""
    rows = ["| term | presets | what for | formula |", "|---|---|---|---|"]
    for term in TERMS.values():
        presets = ", ".join(preset for preset, names in TERMS_OF.items() if term.name in names)
        reason, formula = (" ".join(part.split()) for part in inspect.cleandoc(term.document).split("\n\n", maxsplit=1))
        rows.append(f"| `{term.name}` | {presets} | {reason} | {formula} |")
    return _without_markup("\n".join(rows) + "\n")


def describe() -> str:
    """Return presets, terms, constants and what was left out as Markdown tables, for the docs.

    Example:
        >>> print(describe().splitlines()[7])
        | `minimal` | `terminal`, `final_rent`, `hasty_prune`, `fault` |
    """
    presets = [f"| `{preset}` | {', '.join(f'`{name}`' for name in TERMS_OF[preset])} |" for preset in PRESETS]
    omitted = [f"| {concept} | {reason} |" for concept, reason in OMITTED]
    parts = (
        ["| preset | sum of |", "|---|---|", *presets],
        table().splitlines(),
        ["| setting | default | meaning |", "|---|---|---|", *_settings(RewardConfig)],
        ["| left out | because |", "|---|---|", *omitted],
    )
    return _without_markup("\n\n".join("\n".join(lines) for lines in parts) + "\n")


def _without_markup(text: str) -> str:
    return text.replace(":func:", "").replace("``", "`")


def _settings(config: type[Config], prefix: str = "") -> list[str]:
    meanings, rows = _meanings(config), list[str]()
    for name, field in config.model_fields.items():
        if isinstance(field.default, Config):
            rows += _settings(type(field.default), f"{prefix}{name}.")
        else:
            default = f"{field.default:.5g}" if isinstance(field.default, float) else str(field.default)
            rows.append(f"| `{prefix}{name}` | {default} | {meanings[name]} |")
    return rows


def _meanings(config: type[Config]) -> dict[str, str]:
    """Return what the ``Attributes:`` of a docstring say of each."""
    attributes = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^    (\w+): (.+(?:\n        .+)*)", attributes, flags=re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in found}
