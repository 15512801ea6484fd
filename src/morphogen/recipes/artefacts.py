"""The grown network as files that need torch alone: ``.pt2`` (program and weights) and ``.safetensors`` (weights)."""

from __future__ import annotations

import io
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from morphogen.errors import MorphogenError
from morphogen.growth import GrowableModel
from morphogen.recipes.run_directory import write_bytes


def write_network(model: GrowableModel, example: Tensor, stem: Path) -> float:
    """Export ``model`` and write ``stem``.pt2 and ``stem``.safetensors; each appears whole or not at all.

    The program is read back and compared with the model in eval mode.

    Args:
        model: What was grown.
        example: A batch of at least two inputs; the first dimension stays free.
        stem: Path without ending.

    Returns:
        Largest absolute difference between the outputs of the model and of the program read back, on ``example``.

    Raises:
        MorphogenError: torch could not export the network, or the disk refused.
    """
    plain = model.export()
    program_path, weights_path = stem.with_suffix(".pt2"), stem.with_suffix(".safetensors")
    _write_program(plain, example, program_path)
    write_bytes(weights_path, safetensors.torch.save({name: value.contiguous() for name, value in plain.state_dict().items()}))
    return _difference(model, program_path, example)


def _write_program(plain: nn.Module, example: Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(plain, (example,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:  # pyright: ignore
        first = str(error).strip().split("\n")[0]
        raise MorphogenError(f"{path}: torch.export refused the network: {first}") from error
    content = io.BytesIO()  # in memory first: torch's own file writer ends the process on a full disk
    torch.export.save(program, content)
    write_bytes(path, content.getvalue())


def _difference(model: GrowableModel, path: Path, example: Tensor) -> float:
    program = torch.export.load(path).module()
    training = model.training
    model.eval()
    with torch.no_grad():
        difference = (model(example) - program(example)).abs().max()
    model.train(training)
    return float(difference)
