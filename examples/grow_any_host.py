"""Grow a network that was never written to be grown: find the points, blend two seeds in, see what each is worth, fold one in.

Run: python examples/grow_any_host.py
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from morphogen import GrowableModel, TrainingState
from morphogen.growth import Stage, count_parameters, measure_contributions, measure_shapley, suggest_points

pixels, classes = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 8, 8), torch.tensor(classes)
decision, held_out = [(inputs[1300:1500], targets[1300:1500])], [(inputs[1500:], targets[1500:])]


class RowReader(nn.Module):
    """Reads an image row by row. Its encoder and its LSTM know nothing of growth."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.reader = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, rows: Tensor) -> Tensor:
        states, _ = self.reader(self.embed(rows).tanh())
        return self.head(states.mean(1))


def correct(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.argmax(1) == labels).float()


host = RowReader()
found = suggest_points(host, inputs[:2])
for suggestion in found:
    print(f"{suggestion.name}: {suggestion.shape} {suggestion.layout}, for example {', '.join(suggestion.blueprints[:4])}")
points = {suggestion.name: suggestion.point for suggestion in found if suggestion.name in ("embed", "reader")}

model = GrowableModel(host, points, inputs[:2])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
state = TrainingState(model, optimizer)
generator = torch.Generator().manual_seed(0)
model.germinate("embed", "low_rank", options={"rank": 4})
model.germinate("reader", "glu")

for _ in range(25):
    model.train()
    for _ in range(20):
        batch = torch.randint(0, 1300, (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.sense()
    model.tick()
    for slot, stage in model.stages().items():
        if stage is Stage.HOLDING:
            value = measure_contributions(model, decision, correct, [slot]).slots[slot]
            model.record_contribution(slot, value.value, value.error)
            model.fossilize(slot)  # refused unless the seed contributes
        elif stage is not Stage.FOSSILIZED:
            model.advance(slot)

worth = measure_shapley(model, held_out, correct)
print(f"accuracy {worth.metric:.1%} with both, {worth.baseline:.1%} with none of them")
for slot, value in worth.slots.items():
    print(f"{slot}: {value.value:+.1%} +- {value.error:.1%}, {count_parameters(model)[slot]} parameters")

model.eval()
before = model(inputs).detach()
model.merge("embed")  # its seed is a linear map: folded into the host's own weights
state.verify()
moved = float((model(inputs).detach() - before).abs().max())
print(f"merged: outputs moved by {moved:.1e}, the slot is {model.stages()['embed'].name}")
print(f"exported: {sum(p.numel() for p in model.export().parameters())} parameters, torch alone")
