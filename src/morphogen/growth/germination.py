"""A newborn seed: built beside the model, tried on the feature, and in place only if it fits."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from morphogen.errors import SlotError
from morphogen.growth import blueprints
from morphogen.growth.blueprints.registry import Surroundings
from morphogen.growth.lifecycle import SlotState
from morphogen.growth.operators import Seed
from morphogen.growth.probing import Example, probe, probe_call, try_out
from morphogen.growth.slots import SeedSlot
from morphogen.state import RandomStreams, draw_from


def built_seed(host: nn.Module, slot: SeedSlot, state: SlotState, streams: RandomStreams, example: Example) -> Seed:
    """Return the seed that ``state`` names, on the device and of the dtype of the feature; the host is as before.

    Raises:
        SlotError: The seed does not fit the feature, or the host's submodule; the message names the slot.
        ValueError: Blueprint, layout or an option is wrong.
    """
    row, site = blueprints.get(state.blueprint or ""), slot.site
    generator = streams.torch("germination", slot.name, state.germination)
    feature = site.turned(probe(host, {slot.name: site}, example)[slot.name])
    source = None
    if row.from_host:
        source, feature = probe_call(slot.name, host, site, example)
    with draw_from(generator):
        if source is None:
            body = row.build(site.width, site.layout, **state.options)
        else:
            place = Surroundings(host.get_submodule(site.path), source, feature, site.layout, generator)
            try:
                body = row.build_on(place, **state.options)
            except SlotError as error:
                raise SlotError(f"slot {slot.name!r} {error}") from None
        seed = Seed(body, state.operator, site.width, site.layout)
    seed.to(device=feature.device, dtype=feature.dtype)
    if feature.ndim == 4 and not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last):
        seed.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    try_out(slot.name, seed, feature, source)
    return seed.train(host.get_submodule(site.path).training)


def example_like(host: nn.Module, example: Example) -> Example:
    """Return the example on the host's present device, floating parts in its present dtype."""
    like = next(host.parameters(), None)
    if like is None:
        return example

    def converted(tensor: Tensor) -> Tensor:
        return tensor.to(device=like.device, dtype=like.dtype if tensor.is_floating_point() else tensor.dtype)

    return pytree.tree_map_only(Tensor, converted, example)
