"""Discrete actions made of one or several choices, each of which may hang on those before it.

Shapes: B rows, A outputs of the policy's last layer (= M, the mask width), H heads, G heads they hang on (as many as H), S
choices of the widest head, R rows of all contexts, N environments.

Inside, choices are dimension 1: ``[B, S]`` for a single head, ``[H, S, B]`` for several (a softmax over a handful of choices is
several times as fast on a CPU when they are not the last dimension).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from morphogen.rl.actions.base import ActionDistribution, Evaluation, full_precision
from morphogen.rl.actions.conditional import FORBIDDEN, divergence, log_probs, only_first
from morphogen.rl.actions.heads import Head
from morphogen.rl.actions.masks import check_mask, flatten_mask


class FactoredDistribution(ActionDistribution):
    """The joint distribution of the choices of several heads, the product of one conditional distribution for each.

    log p(a) = sum over relevant heads h of log p_h(a_h | a_given(h)), where p_h is the softmax of the row of h's table
    of logits that the choices it is given select, over the choices that the mask allows. With ``exploration`` eps it is
    (1 - eps) softmax + eps uniform(allowed), in :meth:`sample`, :meth:`evaluate` and :meth:`kl` alike, so that every
    allowed choice keeps a gradient. A forbidden choice has probability exactly 0, gets a gradient of exactly 0 and is never
    sampled, whatever the outputs and the noise. Sampling takes the largest of logits + Gumbel noise (Maddison et al. 2014).

    Args:
        heads: As laid out by :func:`~morphogen.rl.actions.heads.lay_out`. A single head is stored as ``[B]``.
        exploration: eps, in [0, 1).
        start: Value of each head's first choice in the environment, ``[H]``.
        env_shape: Shape of one action in the environment.
        env_dtype: Its dtype.

    Example:
        >>> from gymnasium.spaces import MultiDiscrete
        >>> from morphogen.rl.actions import ActionConfig, HeadConfig, make
        >>> slot = HeadConfig(name="slot", given=("op",), relevant_when={"op": (1,)})
        >>> actions = make(MultiDiscrete([2, 3]), ActionConfig(heads=(HeadConfig(name="op"), slot)))
        >>> actions.num_outputs  # op: 2; slot: one row of 3 for each op
        8
        >>> outputs_BA = torch.zeros(4, 8)
        >>> noise = actions.noise((4,), torch.Generator().manual_seed(0))
        >>> drawn, log_prob_BH = actions.sample(outputs_BA, noise)
        >>> torch.equal(actions.evaluate(outputs_BA, drawn).log_prob_BH, log_prob_BH)
        True
    """

    _columns_HS1: Tensor
    _output_strides_HG1: Tensor
    _row_strides_HG1: Tensor
    _first_row_H1: Tensor
    _relevant_R: Tensor
    _is_choice_HS1: Tensor
    _expand: Tensor
    _noise_columns: Tensor
    _head_of_column: Tensor
    _filler: Tensor

    def __init__(
        self,
        heads: Sequence[Head],
        exploration: float,
        start: NDArray[np.int64],
        env_shape: tuple[int, ...],
        env_dtype: np.dtype[Any],
    ) -> None:
        """Build the index tables; there are no parameters."""
        super().__init__()
        self.heads = tuple(heads)
        self.num_heads = len(heads)
        self.num_outputs = self.mask_width = heads[-1].outputs.stop
        self.action_shape = () if env_shape == () else (len(heads),)
        self.action_dtype = torch.int64
        self.exploration = exploration
        self._start, self._env_shape, self._env_dtype = start, env_shape, env_dtype
        self._is_single = len(heads) == 1
        self._has_context = any(head.context for head in heads)
        self._has_irrelevant = any(head.relevant is not None for head in heads)
        self._noise_width = sum(head.size for head in heads)
        self._register_rows()
        self._register_race()

    def initial_outputs(self) -> Tensor:
        """Return the heads' initial logits in the layout of the outputs, ``[A]``."""
        tables = [np.broadcast_to(head.initial_logits, head.shape).ravel() for head in self.heads]
        return torch.from_numpy(np.concatenate(tables)).float()

    def _register_rows(self) -> None:
        """Tables to find the row of logits of each head; narrower heads are padded with their first choice to S."""
        width = max(head.size for head in self.heads)
        sizes_H = np.array([head.size for head in self.heads])
        choices_HS = np.arange(width) * (np.arange(width) < sizes_H[:, None])
        first_output_H = np.array([head.first_output for head in self.heads])
        output_strides_HG = np.zeros((self.num_heads, self.num_heads), np.int64)
        row_strides_HG = np.zeros_like(output_strides_HG)
        for place, head in enumerate(self.heads):
            output_strides_HG[place, head.given] = head.output_strides
            row_strides_HG[place, head.context] = head.row_strides
        relevant = [np.ones(len(head.columns), np.bool_) if head.relevant is None else head.relevant for head in self.heads]
        self._is_ragged = bool((sizes_H < width).any())
        self._width = width
        self._constant("_columns_HS1", (first_output_H[:, None] + choices_HS)[:, :, None])
        self._constant("_output_strides_HG1", output_strides_HG[:, :, None])
        self._constant("_row_strides_HG1", row_strides_HG[:, :, None])
        self._constant("_first_row_H1", np.cumsum([0, *(len(rows) for rows in relevant[:-1])])[:, None])
        self._constant("_relevant_R", np.concatenate(relevant))
        self._constant("_is_choice_HS1", (np.arange(width) < sizes_H[:, None])[:, :, None])

    def _register_race(self) -> None:
        """Tables for sampling, which works on all rows of all contexts, flat, one head after the other."""
        self._steps: list[tuple[slice, tuple[int, ...], tuple[int, ...]]] = []
        first, noise_columns, filler = 0, [], []
        for place, head in enumerate(self.heads):
            rows = len(head.columns)
            block = slice(first, first + rows * head.size)
            self._steps.append((block, head.context, tuple(stride * head.size for stride in head.row_strides)))
            self._constant(f"_choices_{place}", np.arange(first, first + head.size)[None])
            noise_columns.append(np.tile(np.arange(head.size) + sum(h.size for h in self.heads[:place]), rows))
            relevant = np.ones(rows, np.bool_) if head.relevant is None else head.relevant
            filler.append(np.where(relevant[:, None], 1, -np.arange(head.size)).ravel())
            first = block.stop
        owner = np.repeat(np.arange(self.num_heads), [block.stop - block.start for block, _, _ in self._steps])
        self._is_expanded = any(head.is_shared for head in self.heads)
        self._constant("_expand", np.concatenate([head.columns.ravel() for head in self.heads]))
        self._constant("_noise_columns", np.concatenate(noise_columns))
        self._constant("_head_of_column", self._noise_width + owner)
        self._constant("_filler", np.concatenate(filler))  # 1, or for irrelevant heads the order of preference: 0, -1, ...

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        """Keep ``value`` on the device of the module, out of its state_dict."""
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(value)), persistent=False)

    # ------------------------------------------------------------------------------------------------------- choosing
    def noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return Gumbel noise, one for each choice of each head, then (if exploring) a uniform number for each head."""
        gumbel = torch.empty(*shape, self._noise_width, device=generator.device).exponential_(generator=generator)
        gumbel = gumbel.clamp_min_(torch.finfo(torch.float32).tiny).log_().neg_()
        if not self.exploration:
            return gumbel
        uniform = torch.empty(*shape, self.num_heads, device=generator.device).uniform_(generator=generator)
        return torch.cat((gumbel, uniform), -1)

    def draw(self, outputs_BA: Tensor, noise: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Draw the heads in order, each from the row that the choices before it select; see the base class."""
        return self._choose(full_precision(outputs_BA), noise, mask_BM)

    def mode(self, outputs_BA: Tensor, mask_BM: Tensor | None = None) -> Tensor:
        """Return each head's most probable choice given those before it (greedy: not always the joint maximum)."""
        return self._choose(full_precision(outputs_BA), None, mask_BM)

    def _choose(self, outputs_BA: Tensor, noise: Tensor | None, mask_BM: Tensor | None) -> Tensor:
        """Return the winners of a race in the rows that the choices before them select."""
        scores = outputs_BA.index_select(1, self._expand) if self._is_expanded else outputs_BA
        if noise is not None:
            if self.exploration:
                explores = noise.index_select(1, self._head_of_column) < self.exploration
                scores = scores.masked_fill(explores, 0.0)
            scores = scores + (
                noise.index_select(1, self._noise_columns) if self._has_context else noise[:, : self._noise_width]
            )
        if self._has_irrelevant:
            scores = torch.where(self._filler > 0, scores, self._filler)
        if mask_BM is not None:
            mask_BM = mask_BM.index_select(1, self._expand) if self._is_expanded else mask_BM
            scores = scores.clamp_min(FORBIDDEN).masked_fill(~mask_BM, -torch.inf)
        if self._is_single:
            choice = scores.argmax(1)
            return choice if self.action_shape == () else choice[:, None]
        choices: list[Tensor] = []
        for place, (block, context, strides) in enumerate(self._steps):
            if not context:
                choices.append(scores[:, block].argmax(1, keepdim=True))
                continue
            columns = cast("Tensor", getattr(self, f"_choices_{place}"))
            for before, stride in zip(context, strides, strict=True):
                columns = torch.add(columns, choices[before], alpha=stride)
            choices.append(scores.gather(1, columns).argmax(1, keepdim=True))
        return torch.cat(choices, 1)

    # ------------------------------------------------------------------------------------------------------ evaluating
    def evaluate(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None = None) -> Evaluation:
        """Return log-probabilities and conditional entropies; a forbidden choice has a log-probability below -1e29."""
        index, logits, allowed = self._select(full_precision(outputs_BA), actions, mask_BM)
        log_q = log_probs(logits, allowed, self.exploration)
        log_prob_BH, relevant_BH = self._taken(log_q, index)
        terms = log_q.exp() * log_q
        if allowed is not None and self._has_irrelevant:
            terms = torch.where(allowed, terms, 0.0)  # an irrelevant head may have nothing allowed: entropy 0
        entropy_BH = terms.sum(1, keepdim=True) if self._is_single else terms.sum(1).t()
        return Evaluation(log_prob_BH, -entropy_BH, relevant_BH)

    def _select(self, outputs_BA: Tensor, actions: Tensor, mask_BM: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the index of each choice, and logits and what is allowed in the rows that the choices select.

        The index is ``[H, 1, B]`` and the others ``[H, S, B]``; ``[B, 1]`` and ``[B, S]`` for a single head.
        """
        if self._is_single:
            return actions.view(-1, 1), outputs_BA, mask_BM
        index_H1B = actions.t().contiguous()[:, None]
        if not self._has_context:
            allowed_HSB = self._without_padding(None if mask_BM is None else self._only_rows(mask_BM))
            return index_H1B, self._only_rows(outputs_BA), allowed_HSB
        start_H1B = (self._output_strides_HG1 * index_H1B.squeeze(1)).sum(1, keepdim=True)
        columns = (self._columns_HS1 + start_H1B).view(-1, len(outputs_BA))
        shape = (self.num_heads, self._width, -1)
        allowed_HSB = None if mask_BM is None else mask_BM.t().gather(0, columns).view(shape)
        return index_H1B, outputs_BA.t().gather(0, columns).view(shape), self._without_padding(allowed_HSB)

    def _only_rows(self, flat_BA: Tensor) -> Tensor:
        """Return the only row of each head, ``[H, S, B]`` (``[B, S]`` for a single head), for heads without context."""
        if self._is_single:
            return flat_BA
        flat_AB = flat_BA.t() if not self._is_ragged else flat_BA.t().index_select(0, self._columns_HS1.view(-1))
        return flat_AB.view(self.num_heads, self._width, -1)

    def _without_padding(self, allowed_HSB: Tensor | None) -> Tensor | None:
        if not self._is_ragged:
            return allowed_HSB
        return self._is_choice_HS1 if allowed_HSB is None else allowed_HSB & self._is_choice_HS1

    def _taken(self, log_q: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the log-probability of each head's choice, 0 where the head is irrelevant, and its relevance, ``[B, H]``."""
        log_prob = log_q.gather(1, index)
        if self._is_single:
            return log_prob, None
        log_prob_BH = log_prob.squeeze(1).t()
        if not self._has_irrelevant:
            return log_prob_BH, None
        row_HB = (self._row_strides_HG1 * index.squeeze(1)).sum(1) + self._first_row_H1
        relevant_BH = self._relevant_R.take(row_HB).t()
        return torch.where(relevant_BH, log_prob_BH, 0.0), relevant_BH

    # -------------------------------------------------------------------------------------------------------- comparing
    def kl(
        self,
        outputs_old_BA: Tensor,
        outputs_new_BA: Tensor,
        mask_BM: Tensor | None = None,
        snapshot_old: Tensor | None = None,
    ) -> Tensor:
        """Return the exact KL(old || new), ``[B]``: the sum over heads of the KL of each row, times its chance under old.

        Cost grows with the number of combinations of choices before a head, not with what was drawn. There is never a
        ``snapshot_old``.
        """
        if snapshot_old is not None:
            raise ValueError("`snapshot_old` must be None for discrete actions, got a tensor. Their outputs say everything.")
        old_BA, new_BA = full_precision(outputs_old_BA), full_precision(outputs_new_BA)
        if not self._has_context:
            allowed = self._without_padding(None if mask_BM is None else self._only_rows(mask_BM))
            old = log_probs(self._only_rows(old_BA), allowed, self.exploration)
            new = log_probs(self._only_rows(new_BA), allowed, self.exploration)
            return divergence(old, new) if self._is_single else divergence(old, new).sum(0)
        with torch.autocast(old_BA.device.type, enabled=False):  # einsum would multiply matrices in half precision
            return self._kl_of_tables(old_BA.t(), new_BA.t(), None if mask_BM is None else mask_BM.t())

    def _kl_of_tables(self, old_AB: Tensor, new_AB: Tensor, mask_MB: Tensor | None) -> Tensor:
        num_rows = old_AB.shape[1]
        total_B = old_AB.new_zeros(num_rows)
        tables: list[Tensor] = []  # of each head, [*context, size, B]: the chance of what it takes, relevant or not
        for place, head in enumerate(self.heads):
            allowed = None if mask_MB is None else self._table(mask_MB, place)
            old = log_probs(self._table(old_AB, place), allowed, self.exploration)
            new = log_probs(self._table(new_AB, place), allowed, self.exploration)
            terms, chances = divergence(old, new), old.exp()
            if head.context:
                tables_before = [tables[before] for before in head.ancestors]
                terms = terms * torch.einsum(head.chances, *tables_before).reshape(-1, num_rows)
            if head.relevant is not None:
                relevant = self._relevance(place)
                terms = terms * relevant
                chances = torch.where(relevant[:, None], chances, only_first(allowed, chances))
            total_B = total_B + terms.sum(0)
            tables.append(chances.reshape(*head.context_shape, head.size, num_rows))
        return total_B

    def _table(self, flat_AB: Tensor, place: int) -> Tensor:
        """Return all rows of the context of one head, ``[rows, size, B]``."""
        head, block = self.heads[place], self._steps[place][0]
        rows = flat_AB.index_select(0, self._expand[block]) if head.is_shared else flat_AB[head.outputs]
        return rows.reshape(-1, head.size, flat_AB.shape[1])

    def _relevance(self, place: int) -> Tensor:
        """Return whether one head matters in each row of its context, ``[rows, 1]``."""
        first = sum(len(head.columns) for head in self.heads[:place])
        return self._relevant_R[first : first + len(self.heads[place].columns), None]

    # -------------------------------------------------------------------------------------------- at the environment's
    def to_env(self, actions: Tensor) -> NDArray[Any]:
        """Return the choices counted from the space's start, in its shape and dtype."""
        values = actions.cpu().numpy() + self._start
        return values.reshape(len(values), *self._env_shape).astype(self._env_dtype, copy=False)

    def flatten_mask(self, value: object, num_envs: int) -> NDArray[np.bool_]:
        """Return a mask as ``[num_envs, M]``; see :func:`~morphogen.rl.actions.masks.flatten_mask`."""
        return flatten_mask(value, num_envs, self.heads)

    def check_mask(self, mask_NM: NDArray[np.bool_]) -> None:
        """Raise ValueError where a head is stuck; see :func:`~morphogen.rl.actions.masks.check_mask`."""
        check_mask(mask_NM, self.heads)
