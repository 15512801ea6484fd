"""What torch draws for one episode: a stream of its own, whoever else draws in the process."""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import torch
from torch import Tensor


class Chance:
    """The states of torch's global generators as one episode left them; a network with dropout draws from these.

    Args:
        seed: Where they start.
        device: Where the network is; beside the CPU's, the generator of this device is the episode's own.

    Example:
        >>> chance, before = Chance(seed=1), torch.get_rng_state()
        >>> with chance.at_work():
        ...     first = torch.rand(())
        >>> with chance.at_work():
        ...     first == torch.rand(())
        tensor(False)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        """Change nothing yet."""
        self._device = torch.device(device)
        devices = ["cpu", self._device] if self._device.type == "cuda" else ["cpu"]
        self._own = [torch.Generator(device).manual_seed(seed).get_state() for device in devices]

    @contextlib.contextmanager
    def at_work(self) -> Generator[None]:
        """Within the block torch's global generators are the episode's; afterwards they are as before."""
        before = self._read()
        self._write(self._own)
        try:
            yield
        finally:
            self._own = self._read()
            self._write(before)

    def _read(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return [*states, torch.cuda.get_rng_state(self._device)] if len(self._own) > 1 else states

    def _write(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._device)
