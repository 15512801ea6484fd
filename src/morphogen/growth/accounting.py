"""Accounting: what the host and each seed cost, in parameters and in floating-point operations.

By ownership: a frozen fossil, or a seed that is being ramped down, still holds parameters and still computes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from morphogen.growth.model import HOST, GrowableModel
from morphogen.growth.operators import Seed
from morphogen.growth.probing import Example, example_call, untouched


def count_parameters(model: GrowableModel) -> dict[str, int]:
    """Return owner -> the parameters it holds, trainable or not: "host", then each slot; 0 for a slot without a seed.

    A parameter that the host uses in several places counts once. The sum is ``model.num_parameters()``.

    Example:
        >>> from torch import nn
        >>> model = GrowableModel(nn.Sequential(nn.Linear(4, 8)), points={"early": "0"}, example_input=torch.zeros(2, 4))
        >>> _ = model.germinate("early", "low_rank", options={"rank": 2})
        >>> count_parameters(model)["host"]
        40
    """
    owned = model.owners()
    return {owner: sum(p.numel() for _, p in owned.get(owner, ())) for owner in (HOST, *model.stages())}


def count_flops(model: GrowableModel, example: Example, *, backward: bool = False) -> dict[str, int]:
    """Return owner -> floating-point operations on ``example``: "host", then each slot.

    A multiplication with an addition is two. What counts is what :func:`flop_counter` sees: matrix products, convolutions,
    attention and recurrent layers, but no elementwise operation, normalisation, pooling or optimizer step.

    A slot has the operations of its seed, gate included, as it acts in its present stage: none when it is dormant, germinated
    or cooling down; those of an incubating seed in training alone; all of a blending, holding or fossilised one. The host has
    all others, which are those of the host without seeds; only where host layers are frozen, a backward pass through them
    that nobody but a seed needs is the host's as well. The sum is that of the whole model.

    Args:
        model: The model; left as it was: modes, buffers, gradients, global generators.
        example: A tensor, a tuple of arguments or a dict of keyword arguments, on the model's device.
        backward: False: one forward pass in eval mode, without gradients. True: one forward and backward pass in training
            mode, to every parameter that requires a gradient.

    Raises:
        TypeError: With ``backward``, there is no tensor in the output.

    Example:
        >>> from torch import nn
        >>> model = GrowableModel(nn.Sequential(nn.Linear(4, 8)), points={"early": "0"}, example_input=torch.zeros(2, 4))
        >>> count_flops(model, torch.zeros(2, 4)), count_flops(model, torch.zeros(2, 4), backward=True)
        ({'host': 128, 'early': 0}, {'host': 256, 'early': 0})
    """
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, example_call(example))
    calls: dict[str, tuple[Any, Any]] = {}
    seeds = {name: model.slot(name).seed for name in model.stages()}
    with _counting(model, backward):
        with contextlib.ExitStack() as stack, flop_counter() as whole:
            for name, seed in seeds.items():
                if seed is not None:
                    stack.callback(_kept_call(seed, name, calls))
            outputs = model(*args, **kwargs)
            if backward:
                _differentiate(outputs, [p for p in model.parameters() if p.requires_grad])
        flops = dict.fromkeys(seeds, 0)
        for name, (given, named) in calls.items():
            flops[name] = _seed_flops(seeds[name], given, named, backward)
    return {HOST: whole.get_total_flops() - sum(flops.values()), **flops}


def flop_counter() -> FlopCounterMode:
    """Return ``torch.utils.flop_counter.FlopCounterMode``, silent, which also sees attention and LSTM layers on the CPU.

    It sees matrix products, convolutions and attention, forward and backward. The fused inference path of
    ``nn.TransformerEncoderLayer`` and ``nn.MultiheadAttention`` (turned off in :func:`count_flops`) and recurrent layers of
    cuDNN count as nothing.
    """
    return FlopCounterMode(display=False, custom_mapping=_MORE)


def _lstm_flops(x: Any, w_input: Any, w_hidden: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    """Return the operations of one direction of one layer: shapes (L, N, C), (4H, C) and (4H, H)."""
    return 2 * x[0] * x[1] * (w_input[0] * w_input[1] + w_hidden[0] * w_hidden[1])


def _lstm_backward_flops(*given: Any, out_shape: Any = None, **named: Any) -> int:
    return 2 * _lstm_flops(*given)


def _attention_flops(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _attention_backward_flops(grad: Any, q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **named: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


_MORE: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    torch.ops.aten.mkldnn_rnn_layer: _lstm_flops,
    torch.ops.aten.mkldnn_rnn_layer_backward: _lstm_backward_flops,
}


@contextlib.contextmanager
def _counting(model: GrowableModel, backward: bool) -> Generator[None]:
    """Within the block the model trains or evaluates without a trace, uncompiled and without fused attention layers."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with untouched(model), torch.set_grad_enabled(backward), torch.compiler.set_stance("force_eager"):
            model.train(backward)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def _kept_call(seed: Seed, name: str, calls: dict[str, tuple[Any, Any]]) -> Any:
    """Note with what ``seed`` is called, apart from the graph; return what takes the hook off again."""

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        calls[name] = pytree.tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), (args, kwargs))

    return seed.register_forward_pre_hook(keep, with_kwargs=True).remove


def _seed_flops(seed: Seed | None, args: Any, kwargs: Any, backward: bool) -> int:
    assert seed is not None
    with flop_counter() as counter:
        # the counter's own hooks on module inputs refuse leaves, so the seed gets a view of each
        views, named_views = pytree.tree_map_only(Tensor, lambda t: t.view_as(t), (args, kwargs))
        outputs = seed(*views, **named_views)
        if backward:
            given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
            _differentiate(outputs, [*given, *(p for p in seed.parameters() if p.requires_grad)])
    return counter.get_total_flops()


def _differentiate(outputs: Any, inputs: list[Tensor]) -> None:
    """Run a backward pass that leaves no gradient anywhere."""
    found = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    if not found:
        raise TypeError(f"the output must hold a tensor to go back from, got {type(outputs).__name__}. Return a tensor.")
    found = [tensor for tensor in found if tensor.requires_grad]
    if found and inputs:
        torch.autograd.grad(found, inputs, [torch.ones_like(tensor) for tensor in found], allow_unused=True)
