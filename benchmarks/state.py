"""What a snapshot and a rewind cost, as ratios to plainly copying the same tensors.

A network of the shape of a small GPT (about 23 million parameters, head tied to the embedding) with AdamW moments, in
float32, one thread. All methods run once a round, in a drawn order, so that load on the machine meets all alike. Times
are process CPU time; reported are medians, of the times and of the ratios within a round. What a capture or a restore
adds to the copy does not grow with the network, only with the number of its tensors: about a millisecond for 300.

Run it from anywhere: ``python benchmarks/state.py [--repeats N] [--json PATH]``.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import io
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from morphogen.state import TrainingState

VOCABULARY, CONTEXT, WIDTH, NUM_HEADS, NUM_LAYERS = 8192, 512, 512, 8, 6
AIMS = {
    "capture / copy": 1.1,
    "restore / copy": 1.1,
    "capture / deepcopy(state_dict)": 1 / 1.2,
    "capture / torch.save to memory": 1 / 4,
    "capture / torch.save to tmpfs": 1 / 4,
    "peak memory of the first capture / snapshot": 1.1,
}
RESULTS = Path(__file__).parent / "results" / "state.json"
TMPFS = "/dev/shm"
MEBI = 2**20


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.rise, self.fall = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3, NUM_HEADS, WIDTH // NUM_HEADS).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.fall(F.gelu(self.rise(self.norm_2(x))))


class GPT(nn.Module):
    """A language model whose head is tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.blocks(x)))


def main() -> None:
    """Measure, print the table, and write the results."""
    parser = argparse.ArgumentParser(description="Cost of a snapshot and a rewind, as ratios to a plain copy.")
    parser.add_argument("--repeats", type=int, default=15, help="times each method runs (default 15)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go (default benchmarks/results/)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    train_one_step(model, optimizer)
    state = TrainingState(model, optimizer)
    memory = measure_memory(state)
    with tempfile.NamedTemporaryFile(dir=TMPFS) as file:
        times = measure_times(model, optimizer, state, options.repeats, Path(file.name))
    results = report(model, optimizer, times, memory, options.repeats)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.json}")


def train_one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill the moments."""
    tokens = torch.randint(VOCABULARY, (1, 33), generator=torch.Generator().manual_seed(0))
    logits = model(tokens[:, :-1])
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor a snapshot of the two has to copy."""
    moments = [value for values in optimizer.state.values() for value in values.values()]
    return [parameter.detach() for parameter in model.parameters()] + moments


def measure_memory(state: TrainingState) -> dict[str, float]:
    """Return MiB: what a snapshot holds, and by how much the process grew at most, at the first capture and later ones."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else the gradients' memory, free by now, would hide what a capture takes
    reset_peak()
    before = resident()
    snapshot = state.capture()
    first_peak, size = peak() - before, snapshot.num_bytes / MEBI
    other = state.capture()  # a ring holds two; from now on nothing has to be allocated
    reset_peak()
    before = resident()
    for _ in range(5):
        snapshot, other = other, None
        other = state.capture()
        state.restore(snapshot)
    return {"snapshot": size, "first capture": first_peak, "five more captures and restores": peak() - before}


def measure_times(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: TrainingState, repeats: int, file: Path
) -> dict[str, list[float]]:
    """Return the CPU seconds of each run of each method; the methods take turns."""
    live = tensors_of(model, optimizer)
    buffers = [tensor.clone() for tensor in live]
    kept: dict[str, Any] = {"snapshot": state.capture(), "clones": None, "copies": None}

    def capture() -> None:
        kept["snapshot"] = None
        kept["snapshot"] = state.capture()

    def clone() -> None:
        kept["clones"] = None
        kept["clones"] = [tensor.clone() for tensor in live]

    def deep_copy() -> None:
        kept["copies"] = None
        kept["copies"] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def save(target: Any) -> None:
        torch.save((model.state_dict(), optimizer.state_dict()), target)

    def load_deep_copy() -> None:
        weights, moments = kept["copies"]
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(moments))  # without the copy the optimizer would train the snapshot

    methods: dict[str, Callable[[], object]] = {
        "snapshot: copy into kept buffers": lambda: torch._foreach_copy_(buffers, live),
        "snapshot: capture": capture,
        "snapshot: fresh clone": clone,
        "snapshot: deepcopy(state_dict)": deep_copy,
        "snapshot: torch.save to memory": lambda: save(io.BytesIO()),
        "snapshot: torch.save to tmpfs": lambda: save(file),
        "rewind: copy from kept buffers": lambda: torch._foreach_copy_(live, buffers),
        "rewind: restore": lambda: state.restore(kept["snapshot"]),
        "rewind: load_state_dict": load_deep_copy,
    }
    times: dict[str, list[float]] = {name: [] for name in methods}
    order, shuffle = list(methods), random.Random(0).shuffle
    deep_copy()
    for round_number in range(repeats + 2):
        shuffle(order)  # what ran before decides what is in the processor's caches
        for name in order:
            live = tensors_of(model, optimizer)  # load_state_dict replaced the moments
            start = time.process_time()
            methods[name]()
            if round_number >= 2:  # the first rounds warm up
                times[name].append(time.process_time() - start)
    return times


def report(
    model: nn.Module, optimizer: torch.optim.Optimizer, times: dict[str, list[float]], memory: dict[str, float], repeats: int
) -> dict[str, Any]:
    """Print the table and return the results as JSON data."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {name: ratio_to_copy(name, times) for name in times}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters / 1e6:.1f} M parameters, {len(tensors_of(model, optimizer))} tensors, {memory['snapshot']:.0f} MiB")
    for name, value in medians.items():
        spread = [f"{1000 * quantile:.1f}" for quantile in statistics.quantiles(times[name], n=4)]
        print(f"  {name:34} {1000 * value:7.1f} ms   {ratios[name]:5.2f} x   quartiles {spread[0]} to {spread[2]}")
    for name in ("first capture", "five more captures and restores"):
        print(f"  memory, {name}: peak {memory[name]:+.1f} MiB")
    others = ("deepcopy(state_dict)", "torch.save to memory", "torch.save to tmpfs")
    measured = {
        "capture / copy": ratios["snapshot: capture"],
        "restore / copy": ratios["rewind: restore"],
        **{f"capture / {name}": paired_ratio(times["snapshot: capture"], times[f"snapshot: {name}"]) for name in others},
        "peak memory of the first capture / snapshot": memory["first capture"] / memory["snapshot"],
    }
    for name, value in measured.items():
        print(f"  {name}: {value:.3f}, aim <= {AIMS[name]:.3g}: {'met' if value <= AIMS[name] else 'MISSED'}")
    return {
        "command": f"python benchmarks/state.py --repeats {repeats}",
        "parameters": num_parameters,
        "repeats": repeats,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "median_cpu_milliseconds": {name: round(1000 * value, 2) for name, value in medians.items()},
        "ratio_to_copy": {name: round(value, 3) for name, value in ratios.items()},
        "memory_mebibytes": {name: round(value, 2) for name, value in memory.items()},
        "aims": {name: {"measured": round(value, 3), "aim": round(AIMS[name], 3)} for name, value in measured.items()},
    }


def ratio_to_copy(name: str, times: dict[str, list[float]]) -> float:
    """Return the median over the rounds of the method's time over the plain copy's in the same round."""
    base = "snapshot: copy into kept buffers" if name.startswith("snapshot") else "rewind: copy from kept buffers"
    return paired_ratio(times[name], times[base])


def paired_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over the rounds of one method's time over another's in the same round."""
    return statistics.median(value / other for value, other in zip(values, others, strict=True))


def reset_peak() -> None:
    """Start the process's memory high-water mark anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Return the high-water mark of resident memory in MiB."""
    return _status("VmHWM")


def resident() -> float:
    """Return the resident memory in MiB."""
    return _status("VmRSS")


def _status(key: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
