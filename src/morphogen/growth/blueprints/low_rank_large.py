"""Large low rank: the low-rank map with a wider middle."""

from __future__ import annotations

from morphogen.growth.blueprints.low_rank import LowRank
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("low_rank_large", layouts=("NC", "NCL", "NLC", "NCHW"))
class LowRankLarge(LowRank):
    """s(h) = up(down(h)) over channels, rank 32 unless told, up = 0 at birth (LoRA, arXiv 2106.09685)."""

    def __init__(self, width: int, layout: Layout, rank: int = 32) -> None:
        """Build as a low-rank map."""
        super().__init__(width, layout, rank)

    @staticmethod
    def parameter_count(width: int, layout: Layout, rank: int = 32) -> int:
        """Return 2 C rank."""
        return LowRank.parameter_count(width, layout, rank)
