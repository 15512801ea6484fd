"""Lightning: the digits run that a NaN batch and then damaged weights would ruin, with and without the governor's callback.

Run: python examples/lightning_governor.py    (needs: pip install 'morphogen[lightning]')
"""

import logging

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from morphogen.integrations.lightning import GovernorCallback
from morphogen.state import draw_from
from morphogen.telemetry.events import Event

NAN_STEP, DAMAGED_STEP, EPOCHS = 120, 220, 15

torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pixels, classes = load_digits(return_X_y=True)
inputs, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(classes)
train, test = slice(0, 1300), slice(1300, None)


class Digits(LightningModule):
    def __init__(self):
        super().__init__()
        with draw_from(torch.Generator().manual_seed(0)):
            self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * 21)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Faults(Callback):
    """One batch of NaN; later, noise of ten times their size on all weights."""

    def __init__(self):
        self.batches = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches += 1
        if self.batches == NAN_STEP:
            batch[0].fill_(torch.nan)
        if self.batches == DAMAGED_STEP:
            noise = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for weight in pl_module.parameters():
                    weight += 10 * weight.std() * torch.randn(weight.shape, generator=noise)


def accuracy_after_training(*callbacks: Callback) -> float:
    shuffle = torch.Generator().manual_seed(0)
    loader = DataLoader(TensorDataset(inputs[train], targets[train]), batch_size=64, shuffle=True, generator=shuffle)
    module = Digits()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=EPOCHS, accelerator="cpu", devices=1, callbacks=list(callbacks), **quiet)
    trainer.fit(module, loader)
    with torch.no_grad():
        return (module.net(inputs[test]).argmax(1) == targets[test]).float().mean().item()


def tell(event: Event) -> None:
    print(f"  step {event.step}: {type(event).__name__} {getattr(event, 'reason', '')}")


governor = GovernorCallback(emit=tell)
healthy = accuracy_after_training()
ungoverned = accuracy_after_training(Faults())
print("With the governor:")
governed = accuracy_after_training(Faults(), governor)
print(f"test accuracy: no faults {healthy:.1%}, faults {ungoverned:.1%}, faults and governor {governed:.1%}")
print(f"skipped {governor.governor.skipped_steps} step(s), rewound {governor.governor.rollbacks} time(s)")
