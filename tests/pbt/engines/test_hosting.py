"""What members come to in the hands of whoever holds them, whichever engine that is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morphogen.pbt.engines.hosting import Birth, Members, Succession


class Loading:
    """A member whose parameters bring the rate they were trained with along, as checkpoints of optimizers do."""

    def __init__(self) -> None:
        self.rate = 0.0

    def train(self, until: int) -> float:
        return self.rate

    def get_parameters(self, include_optimizer: bool = False) -> dict[str, Any]:
        return {"rate": self.rate}

    def set_parameters(self, values: Mapping[str, Any]) -> None:
        self.rate = values["rate"]

    def apply_hyperparameters(self, values: Mapping[str, Any]) -> dict[str, Any]:
        self.rate = values["rate"]
        return {"rate": self.rate}


def test_hyperparameters_rule_after_parameters_that_bring_their_own() -> None:
    members = Members(lambda *_: Loading(), "score")
    for number, rate in ((0, 0.1), (1, 0.2)):
        assert members.begin(Birth(number, {"rate": rate}, number)) == ""
    values = members.read(1, "reset")
    assert values == {"rate": 0.2}
    assert members.take_over(Succession(0, {"rate": 0.3}, 7, "reset"), values) == ""
    trained = members.train(0, 1).trained
    assert trained is not None and trained.score == 0.3
