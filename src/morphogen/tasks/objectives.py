"""What a task optimises and reports: a loss for training, and a value for each sample whose mean is the metric.

``morphogen.telemetry.metrics`` puts metrics into words, by their names.

Legend: N samples, T tokens of a sample, V classes or symbols of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy


class Objective(Protocol):
    """What :class:`morphogen.tasks.Task` asks of an objective. Values of samples are larger for better outputs."""

    @property
    def metric_name(self) -> str:
        """What people call the metric."""
        ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar that training minimises."""
        ...

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return one value for each sample, shape (N,); larger is better. The metric is its mean."""
        ...


@dataclasses.dataclass(frozen=True)
class Classification:
    """One class for each sample: cross-entropy to train, accuracy to report.

    Example:
        >>> import torch
        >>> Classification().per_sample(torch.eye(3), torch.tensor([0, 2, 2]))
        tensor([1., 0., 1.])
    """

    @property
    def metric_name(self) -> str:
        """Accuracy, in [0, 1]."""
        return "accuracy"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats of logits (N, V) and classes (N,)."""
        return cross_entropy(outputs, targets)

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return 1.0 for each sample whose largest logit is the target's, else 0.0, shape (N,)."""
        return (outputs.argmax(dim=1) == targets).float()


@dataclasses.dataclass(frozen=True)
class LanguageModelling:
    """The next token at each position: cross-entropy over tokens to train, perplexity to report.

    A sample's value is its log-likelihood per token, minus the mean cross-entropy in nats over its tokens that are not
    padding. Growth needs a value that moves with every small improvement, and a difference of 0.01 means 1 % of perplexity.

    Attributes:
        ignore_index: Target that marks padding: it counts neither in the loss nor in the metric.

    Example:
        >>> import torch
        >>> objective = LanguageModelling(ignore_index=-1)
        >>> logits_NTV = torch.zeros(1, 2, 4)
        >>> objective.per_sample(logits_NTV, torch.tensor([[3, -1]]))
        tensor([-1.3863])
    """

    ignore_index: int = -100

    @property
    def metric_name(self) -> str:
        """Perplexity: exp of minus the metric."""
        return "perplexity"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats per token of logits (N, T, V) and tokens (N, T), without padding.

        It is NaN where everything is padding.
        """
        return cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=self.ignore_index)

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-likelihood per token of each sample, in nats, shape (N,); NaN for one that is all padding."""
        losses_NT = cross_entropy(outputs.transpose(1, 2), targets, ignore_index=self.ignore_index, reduction="none")
        return -losses_NT.sum(1) / (targets != self.ignore_index).sum(1)
