"""Grow one seed by hand in a plain loop, and take the grown network out as a plain module.

Run: python examples/grow_by_hand.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from morphogen import GrowableModel, TrainingState
from morphogen.growth import measure_contributions

pixels, classes = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8), torch.tensor(classes)
train, held_out = slice(0, 1300), slice(1300, None)

host = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4), nn.ReLU()),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(4, 10),
)
model = GrowableModel(host, points={"block": "0"}, example_input=inputs[:2])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
state = TrainingState(model, optimizer)  # the optimizer now follows every change of the model
generator = torch.Generator().manual_seed(0)


def correct(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (outputs.argmax(1) == labels).float()


for tick in range(30):
    model.train()
    for _ in range(20):
        batch = torch.randint(0, 1300, (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.sense()  # what the gates ask for, from the last gradients
    model.tick()
    stage = model.stages()["block"].name
    if stage == "DORMANT" and tick == 5:
        model.germinate("block", blueprint="conv3x3")
    elif stage in ("GERMINATED", "TRAINING", "BLENDING"):
        model.advance("block")  # refused, as a value, until the gate is open
    elif stage == "HOLDING":
        found = measure_contributions(model, [(inputs[held_out], targets[held_out])], correct).slots["block"]
        model.record_contribution("block", found.value, found.error)
        if model.fossilize("block"):
            print(f"tick {tick}: fossilised, contributing {found.value:+.1%} +- {found.error:.1%}")

state.verify()
plain = model.export()
print({type(part).__module__.split(".")[0] for part in plain.modules()}, "are the packages of the exported network")
model.eval()
same = torch.equal(plain(inputs[held_out]), model(inputs[held_out]))
print(f"held-out accuracy {correct(plain(inputs[held_out]), targets[held_out]).mean():.1%}, same outputs: {same}")
