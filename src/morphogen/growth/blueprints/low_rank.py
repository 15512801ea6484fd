"""Low rank: a linear map over channels through a narrow middle."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("low_rank", layouts=("NC", "NCL", "NLC", "NCHW"))
class LowRank(nn.Module):
    """s(h) = up(down(h)) over channels, rank 8 unless told, up = 0 at birth (LoRA, arXiv 2106.09685)."""

    def __init__(self, width: int, layout: Layout, rank: int = 8) -> None:
        """Build both maps, without bias."""
        super().__init__()
        self.down = pointwise(layout, width, rank, bias=False)
        self.up = zeroed(pointwise(layout, rank, width, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.up(self.down(h))

    @staticmethod
    def parameter_count(width: int, layout: Layout, rank: int = 8) -> int:
        """Return 2 C rank."""
        return 2 * width * rank
