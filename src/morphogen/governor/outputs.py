"""What the outputs of a model tell: whether they still depend on the inputs, and how many classes are predicted at all.

Legend: R rows (samples, or tokens), C outputs a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MIN_ROWS = 8
_MAX_ROWS = 256
_MAX_VALUES = 1 << 18


def output_signals(logits: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Return numbers about the outputs of one batch, on their device, nothing read.

    ==================  ================================================================================================
    output_spread       root of the mean over outputs of their variance across rows: 0 for outputs that are constant
    prediction_entropy  entropy in nats of the mean of softmax(row): 0 if all rows are given to one class (C >= 2 only)
    label_entropy       entropy in nats of the labels of the same rows (where labels are given and are class numbers)
    ==================  ================================================================================================

    Args:
        logits: Outputs, (..., C), or (R,) for one output a row. At most 256 rows are looked at, evenly spaced; with fewer
            than 8 nothing is said: two samples may well be alike.
        labels: Class number of each row, in [0, C), of the shape of ``logits`` without its last dimension; others, such as
            the -100 that marks padding, are left out.

    Raises:
        ValueError: ``labels`` do not fit ``logits``.
    """
    with torch.no_grad():
        logits_RC = logits.detach().reshape(-1, logits.shape[-1] if logits.ndim > 1 else 1)
        if logits_RC.shape[0] < _MIN_ROWS or logits_RC.numel() == 0:
            return {}
        rows = min(_MAX_ROWS, max(_MIN_ROWS, _MAX_VALUES // logits_RC.shape[1]))
        step = -(-logits_RC.shape[0] // rows)
        sample_RC = logits_RC[::step].float()
        # Not `var(dim=0)`, which is six times slower: columns lie far apart in memory.
        signals = {"output_spread": (sample_RC - sample_RC.mean(dim=0)).square_().mean().sqrt()}
        if sample_RC.shape[1] >= 2:
            signals["prediction_entropy"] = _entropy(sample_RC.softmax(dim=1).mean(dim=0))
            if labels is not None and not labels.is_floating_point():
                signals["label_entropy"] = _label_entropy(labels, logits_RC.shape[0], logits_RC.shape[1], step)
        return signals


def _label_entropy(labels: Tensor, num_rows: int, num_classes: int, step: int) -> Tensor:
    if labels.numel() != num_rows:
        raise ValueError(
            f"`labels` must hold one class number for each of the {num_rows} rows of `logits`, got shape "
            f"{tuple(labels.shape)}. Pass the labels of the same batch."
        )
    labels_R = labels.detach().reshape(-1)[::step].long()
    known_R = (labels_R >= 0) & (labels_R < num_classes)
    counts = torch.zeros(num_classes + 1, device=labels.device).scatter_add_(
        0, torch.where(known_R, labels_R, num_classes), torch.ones(len(labels_R), device=labels.device)
    )[:num_classes]
    return _entropy(counts / counts.sum().clamp_min(1.0))


def _entropy(p_C: Tensor) -> Tensor:
    return torch.special.entr(p_C).sum()
