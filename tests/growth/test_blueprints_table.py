"""The table of blueprints for the documentation says what the registry holds."""

from __future__ import annotations

import re

import pytest
from torch import Tensor, nn

from morphogen.growth import blueprints
from morphogen.growth.blueprints import blueprint, registry
from morphogen.growth.layouts import LAYOUTS


def cells() -> dict[str, list[str]]:
    """Name -> the other cells of its row."""
    lines = blueprints.table().splitlines()
    assert lines[0].startswith("| blueprint |") and set(lines[1]) == {"|", "-"}
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]
    assert all(len(row) == 5 for row in rows)
    return {row[0].strip("`"): row[1:] for row in rows}


def test_every_blueprint_has_a_row_also_those_built_from_the_host() -> None:
    found = cells()
    assert set(found) == set(registry._ROWS) >= {*blueprints.names(), "widen"}
    assert list(found) == sorted(found)
    for name, (layouts, _, _, summary) in found.items():
        row = blueprints.get(name)
        assert layouts == ", ".join(row.layouts)
        assert summary == row.summary


def test_sizes_are_those_of_what_is_built_and_options_have_their_defaults() -> None:
    found = cells()
    for name in blueprints.names():
        row = blueprints.get(name)
        sizes = {sum(p.numel() for p in row.build(64, layout).parameters()) for layout in row.layouts}
        assert {int(size.replace(",", "")) for size in re.findall(r"\d[\d,]*(?= \(|$)", found[name][2])} == sizes
        assert re.findall(r"`(\w+)=", found[name][1]) == list(row.options)
    assert found["depthwise"][2] == "4,416 (NCL), 4,800 (NCHW)"
    assert found["norm"][1] == "`statistics='running'`" and found["depthwise"][1] == "none"


def test_a_blueprint_of_ones_own_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ROWS", dict(registry._ROWS))

    @blueprint("mine", layouts=LAYOUTS)
    class Mine(nn.Module):
        """s(h) = |0|."""

        def __init__(self, width: int, layout: str, size: int = 3) -> None:
            super().__init__()

        def forward(self, h: Tensor) -> Tensor:
            return h * 0.0

        @staticmethod
        def parameter_count(width: int, layout: str, size: int = 3) -> int:
            return 0

    assert cells()["mine"] == ["NC, NCL, NLC, NCHW", "`size=3`", "0", r"s(h) = \|0\|."]
