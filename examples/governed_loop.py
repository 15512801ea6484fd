"""A plain training loop that survives a NaN batch and damaged weights: three lines more than without a governor.

Run: python examples/governed_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from morphogen import Governor, TrainingState

STEPS, BAD_BATCH, BAD_LOAD = 600, 200, 400

pixels, classes = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)
train, test = slice(0, 1300), slice(1300, None)

model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
governor = Governor(TrainingState(model, optimizer))  # 1
generator = torch.Generator().manual_seed(0)

for step in range(STEPS):
    batch = torch.randint(0, 1300, (64,), generator=generator)
    x = inputs[batch]
    if step == BAD_BATCH:
        x = x * torch.nan  # the batch poisons loss, gradients and BatchNorm's running statistics
    if step == BAD_LOAD:
        model[-1].weight.data.mul_(-100)  # someone damages the weights themselves
    logits = model(x)
    loss = nn.functional.cross_entropy(logits, targets[batch])
    optimizer.zero_grad()
    loss.backward()
    verdict = governor.observe(loss, logits=logits)  # 2
    if verdict.proceed:  # 3
        optimizer.step()
    else:
        print(f"step {step}: {verdict.action.value}: {verdict.reason}")

model.eval()
accuracy = (model(inputs[test]).argmax(1) == targets[test]).float().mean()
print(f"test accuracy {accuracy:.1%}")
print(governor.report())
