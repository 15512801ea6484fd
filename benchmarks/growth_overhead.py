"""What growth costs in the training step, as ratios to the same network without it.

Two convolutional hosts in float32 on one thread: *small* (3 blocks of 8 to 16 channels on 8x8 images) and *medium*
(4 blocks of 64 channels on 16x16 images), a slot after each block. Compared are one training step (SGD with momentum) of

    dormant     a GrowableModel with empty slots            with the bare host
    incubating  one seed in incubation                      with the bare host, and the same seed trained beside it by hand
    exported    a seed in every slot, fossilised, exported  with the same network written by hand as one nn.Module

All take turns within a round, in a drawn order, so that load on the machine meets all alike; times are process CPU time;
reported are medians of the ratios within a round. "Bare again" measures the host against itself: the noise.

    python benchmarks/growth_overhead.py [--rounds N] [--json PATH]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.growth import GrowableModel, Stage, blueprints
from morphogen.testing import LENIENT, lead_to

RESULTS = Path(__file__).parent / "results" / "growth_overhead.json"
BLUEPRINT = "conv3x3"
HOSTS: dict[str, dict[str, Any]] = {
    "small": {"widths": (8, 8, 16), "size": 8, "batch": 64, "steps": 4},
    "medium": {"widths": (64, 64, 64, 64), "size": 16, "batch": 32, "steps": 1},
}
COMPARED = {
    "bare again / bare": ("bare again", "bare", None),
    "dormant / bare": ("dormant", "bare", 1.03),
    "incubating / bare and seed": ("incubating", "bare and seed", 1.05),
    "exported / by hand": ("exported", "by hand", 1.00),
    "exported / by hand, eval": ("exported, eval", "by hand, eval", 1.00),
}
NOISE = "bare again / bare"
"""An aim counts as met up to half the interquartile range of this ratio above it: one program differs so much from itself."""


class Host(nn.Module):
    """Blocks of convolution, BatchNorm and ReLU, average pooling, a linear head."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        channels = (3, *widths)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(inside, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True))
                for inside, out in zip(channels, widths, strict=False)
            )
        )
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class GrownBlock(nn.Module):
    """A block and its seed, written by hand."""

    def __init__(self, block: nn.Module, seed: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.norm, self.inner, self.activation, self.outer = (
            copy.deepcopy(seed.get_submodule(name)) for name in ("norm", "inner", "activation", "outer")
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(x)
        return h + self.outer(self.activation(self.inner(self.norm(h))))


class HostAndSeed(nn.Module):
    """The host with a seed beside it that is given a fixed gradient: what the seed costs and nothing else."""

    def __init__(self, host: Host, seed: nn.Module, point: int) -> None:
        super().__init__()
        self.host, self.seed, self.point = host, seed, point

    def forward(self, x: Tensor) -> Tensor:
        feature = self.host.blocks[: self.point + 1](x)
        self.residual = self.seed(feature.detach())
        return self.host.head(self.host.blocks[self.point + 1 :](feature).mean((2, 3)))


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description="Cost of growth in the training step, as ratios.")
    parser.add_argument("--rounds", type=int, default=150, help="rounds for each host (default 150)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {name: measure(name, options.rounds, **shape) for name, shape in HOSTS.items()}
    content = {"rounds": options.rounds, "torch": torch.__version__, "python": platform.python_version(), "hosts": results}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written to {options.json}")


def measure(name: str, rounds: int, *, widths: tuple[int, ...], size: int, batch: int, steps: int) -> dict[str, Any]:
    """Print the table of one host and return it as JSON data."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(10, (batch,), generator=generator)
    methods = build(Host(widths), inputs, labels)
    times: dict[str, list[float]] = {method: [] for method in methods}
    order, shuffle = list(methods), random.Random(0).shuffle
    for round_number in range(rounds + 3):
        shuffle(order)  # what ran before decides what is in the processor's caches
        for method in order:
            start = time.process_time()
            for _ in range(steps):
                methods[method]()
            if round_number >= 3:  # the first rounds warm up
                times[method].append((time.process_time() - start) / steps)
    return report(name, times)


def build(host: Host, inputs: Tensor, labels: Tensor) -> dict[str, Callable[[], object]]:
    """Return every method; each works on networks of its own."""
    points = {f"slot{index}": f"blocks.{index}" for index in range(len(host.blocks))}
    middle = len(host.blocks) // 2

    def growable() -> GrowableModel:
        return GrowableModel(copy.deepcopy(host), points, inputs, config=LENIENT)

    incubating = growable()
    incubating.germinate(f"slot{middle}", BLUEPRINT)
    incubating.advance(f"slot{middle}")
    width = incubating.slot(f"slot{middle}").site.width
    beside = HostAndSeed(copy.deepcopy(host), blueprints.get(BLUEPRINT).build(width, "NCHW"), middle)
    grown = growable()
    for slot in points:
        grown.germinate(slot, BLUEPRINT)
        lead_to(grown, slot, Stage.FOSSILIZED, inputs)
    exported = grown.export()
    by_hand = copy.deepcopy(host)
    for index, block in enumerate(host.blocks):
        seed = grown.slot(f"slot{index}").seed
        assert seed is not None
        by_hand.blocks[index] = GrownBlock(copy.deepcopy(block), seed.body)
    return {
        "bare": training(copy.deepcopy(host), inputs, labels),
        "bare again": training(copy.deepcopy(host), inputs, labels),
        "dormant": training(growable(), inputs, labels),
        "incubating": training(incubating, inputs, labels),
        "bare and seed": training(beside, inputs, labels, beside=beside),
        "exported": training(exported, inputs, labels),
        "by hand": training(by_hand, inputs, labels),
        "exported, eval": evaluation(copy.deepcopy(exported), inputs),
        "by hand, eval": evaluation(copy.deepcopy(by_hand), inputs),
    }


def training(module: nn.Module, inputs: Tensor, labels: Tensor, beside: HostAndSeed | None = None) -> Callable[[], object]:
    """Return one training step of ``module``; ``beside`` has a residual that gets a gradient of its own."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)
    gradients: list[Tensor] = []

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(module(inputs), labels).backward()
        if beside is not None:
            if not gradients:
                gradients.append(torch.full_like(beside.residual, 1e-3))
            beside.residual.backward(gradients[0])
        optimizer.step()

    return step


def evaluation(module: nn.Module, inputs: Tensor) -> Callable[[], object]:
    """Return one forward pass in eval mode."""
    module.eval()

    def run() -> None:
        with torch.no_grad():
            module(inputs)

    return run


def report(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    """Print the table of one host and return it as JSON data."""
    medians = {method: statistics.median(values) for method, values in times.items()}
    print(f"{name} host, CPU time of one step:")
    for method, value in medians.items():
        print(f"  {method:16} {1000 * value:8.3f} ms")
    ratios: dict[str, dict[str, float | None]] = {}
    quartiles = {label: quartiles_of(times[method], times[base]) for label, (method, base, _) in COMPARED.items()}
    noise = (quartiles[NOISE][2] - quartiles[NOISE][0]) / 2
    for label, (_, _, aim) in COMPARED.items():
        low, ratio, high = quartiles[label]
        verdict = "" if aim is None else f", aim <= {aim:.2f}: {'met' if ratio <= aim + noise else 'MISSED'}"
        print(f"  {label:28} {ratio:6.3f}   quartiles {low:.3f} to {high:.3f}{verdict}")
        ratios[label] = {"measured": round(ratio, 4), "low": round(low, 4), "high": round(high, 4), "aim": aim}
    return {"median_cpu_milliseconds": {method: round(1000 * value, 3) for method, value in medians.items()}, "ratios": ratios}


def quartiles_of(times: list[float], base: list[float]) -> list[float]:
    """Return the quartiles of the ratios within the rounds."""
    return statistics.quantiles([value / other for value, other in zip(times, base, strict=True)], n=4)


if __name__ == "__main__":
    main()
