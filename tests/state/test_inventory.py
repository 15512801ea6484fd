"""Every tensor of a module once, under a name that does not depend on chance; copies that autograd notices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from morphogen.state.inventory import all_finite, copy_all, disagreements, module_tensors


class Tied(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        weight, shared = nn.Parameter(torch.ones(2, 2)), nn.BatchNorm1d(2)
        for name in names:
            part = nn.Linear(2, 2, bias=False)
            part.weight = weight
            part.norm = shared
            self.add_module(name, part)
        self.register_buffer("hidden", torch.zeros(1), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("none", None)


@pytest.mark.parametrize("names", [("wte", "lm_head"), ("lm_head", "wte")])
def test_a_tied_tensor_has_one_name_whatever_the_order(names: tuple[str, str]) -> None:
    found = module_tensors(Tied(*names))
    buffers = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")}
    owned = {"weight"} | buffers
    assert set(found.tensors) == {"hidden", *(f"lm_head.{name}" for name in owned)}
    assert found.aliases == {f"wte.{name}": f"lm_head.{name}" for name in owned}
    assert set(found.parameters()) == {"lm_head.weight", "lm_head.norm.weight", "lm_head.norm.bias"}


def test_disagreements_name_each_tensor_once() -> None:
    live = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2), "d": torch.zeros(2)}
    saved = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(2).int(), "e": torch.zeros(2)}
    assert disagreements(saved, live) == [
        "`d` is in the run and missing from the snapshot",
        "`e` is in the snapshot and missing from the run",
        "`b` is (2,) torch.float32 in the run, (3,) torch.float32 in the snapshot",
        "`c` is (2,) torch.float32 in the run, (2,) torch.int32 in the snapshot",
    ]


def test_a_graph_from_before_a_copy_raises_instead_of_giving_wrong_gradients() -> None:
    weight = nn.Parameter(torch.ones(2))
    loss = (weight * weight).sum()
    copy_all([(weight, torch.zeros(2))])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("inference", [False, True])
def test_copies_work_in_and_out_of_inference_mode(inference: bool) -> None:
    with torch.inference_mode():
        inferred = torch.ones(2)
    normal, target = torch.ones(2), nn.Parameter(torch.zeros(2))
    with torch.inference_mode(inference):
        copy_all([(target, inferred), (inferred, normal * 3), (torch.zeros(2, dtype=torch.int64), normal)])
    assert target.tolist() == [1, 1]
    assert inferred.tolist() == [3, 3]
    assert target.requires_grad
    (target * 2).sum().backward()


def test_copies_convert_dtype_and_layout() -> None:
    target = torch.zeros(2, 3, dtype=torch.bfloat16).t()
    copy_all([(target, torch.arange(6.0).reshape(3, 2))])
    assert target.tolist() == [[0, 1], [2, 3], [4, 5]]
    copy_all([])


def test_finite_is_decided_exactly() -> None:
    huge = torch.full((4,), 3e38)
    assert all_finite([huge, huge.half().zero_(), torch.tensor([1 + 1j]), torch.tensor([1]), torch.zeros(0)])
    assert not all_finite([torch.zeros(3), torch.tensor([1.0, float("nan")])])
    assert not all_finite([huge, torch.tensor([float("inf")]).double()])
    assert not all_finite([torch.tensor([complex(0, float("inf"))])])
    assert all_finite([])
