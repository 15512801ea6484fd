"""Conv1d: a convolution along the sequence, then a map over channels."""

from __future__ import annotations

from torch import Tensor, nn

from morphogen.growth.blueprints.layers import AxesSwapped, input_norm, pointwise, zeroed
from morphogen.growth.blueprints.registry import blueprint
from morphogen.growth.layouts import Layout


@blueprint("conv1d", layouts=("NCL", "NLC"))
class Conv1d(nn.Module):
    """s(h) = W gelu(conv(normalise(h))) + b, odd kernel size 5 and hidden size C unless told, W = b = 0 at birth.

    With ``causal`` a position sees itself and the kernel_size - 1 before it: the padding is on the left alone, and each
    position is normalised by itself.
    """

    def __init__(self, width: int, layout: Layout, kernel_size: int = 5, expansion: int = 1, causal: bool = False) -> None:
        """Build norm, convolution, nonlinearity and zero layer; ValueError if the kernel size is even and looks both ways."""
        super().__init__()
        if kernel_size % 2 == 0 and not causal:
            raise ValueError(f"`kernel_size` must be odd, got {kernel_size}. An even kernel changes the length.")
        convolution: nn.Module = nn.Conv1d(width, expansion * width, kernel_size, padding=0 if causal else kernel_size // 2)
        if causal:
            convolution = nn.Sequential(nn.ZeroPad1d((kernel_size - 1, 0)), convolution)
        self.norm = AxesSwapped(input_norm("NLC", width)) if causal and layout == "NCL" else input_norm(layout, width)
        self.inner = AxesSwapped(convolution) if layout == "NLC" else convolution
        self.activation = nn.GELU()
        self.outer = zeroed(pointwise(layout, expansion * width, width))

    def forward(self, h: Tensor) -> Tensor:
        """Return s(h)."""
        return self.outer(self.activation(self.inner(self.norm(h))))

    @staticmethod
    def parameter_count(width: int, layout: Layout, kernel_size: int = 5, expansion: int = 1, causal: bool = False) -> int:
        """Return (k + 1) e C^2 + (e + 1) C."""
        return (kernel_size + 1) * expansion * width**2 + (expansion + 1) * width
