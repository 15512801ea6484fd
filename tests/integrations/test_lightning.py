"""The Lightning callback: bad steps are not taken, damaged runs are rewound, healthy runs are as without it."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from morphogen.errors import TrainingCollapsed
from morphogen.governor import Rollback, StepSkipped
from morphogen.integrations.lightning import GovernorCallback
from morphogen.telemetry.events import Event

Fault = Callable[[list[Tensor], "Module"], None]
EPOCH_STEPS = 25


class Module(LightningModule):
    def __init__(self, kit: Any, schedule: str = "step", optimizer: str = "adamw") -> None:
        super().__init__()
        self.kit, self.schedule, self.optimizer = kit, schedule, optimizer
        self.net = kit.network()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:
        return None if batch[0].numel() == 0 else functional.cross_entropy(self.net(batch[0]).float(), batch[1])

    def configure_optimizers(self) -> Any:
        if self.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters())
        optimizer = {
            "adamw": lambda: torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1),
            "sgd": lambda: torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1),
        }[self.optimizer]()
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 1000)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.schedule}}


class Faults(Callback):
    """Lets faults happen before the batches of these numbers, the first being 0."""

    def __init__(self, faults: Mapping[int, Fault]) -> None:
        self.faults, self.batches = faults, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: list[Tensor], batch_idx: int) -> None:
        if self.batches in self.faults:
            self.faults[self.batches](batch, pl_module)
        self.batches += 1


class Diary(Callback):
    """What the run is after each batch."""

    def __init__(self, kit: Any) -> None:
        self.kit, self.pages = kit, [[]]

    def page(self, trainer: Trainer, pl_module: LightningModule) -> list[Any]:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        parts = [pl_module, trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler]
        return self.kit.contents(*parts, *([] if scaler is None else [scaler]))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.pages = [self.page(trainer, pl_module)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.pages.append(self.page(trainer, pl_module))

    def unchanged_batches(self) -> list[int]:
        return [number for number in range(len(self.pages) - 1) if self.kit.same(self.pages[number], self.pages[number + 1])]


def nan(batch: list[Tensor], module: Module) -> None:
    batch[0].fill_(math.nan)


class Run:
    """One ``fit`` and what came of it."""

    def __init__(
        self,
        kit: Any,
        faults: Mapping[int, Fault] | None = None,
        *,
        governed: bool = True,
        module: Module | None = None,
        callbacks: Iterable[Callback] = (),
        ckpt_path: str | None = None,
        **options: Any,
    ) -> None:
        self.events: list[Event] = []
        self.recorder = kit.Recorder()
        self.callback = GovernorCallback(kit.config, detectors=[self.recorder], emit=self.events.append)
        self.diary = Diary(kit)
        self.module = module or Module(kit)
        inputs, targets = kit.data(16 * EPOCH_STEPS)
        loader = DataLoader(TensorDataset(inputs, targets), batch_size=16)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        options = {"max_epochs": 2, "enable_checkpointing": False, **quiet, **options}
        governor = [self.callback] if governed else []
        self.trainer = Trainer(devices=1, callbacks=[Faults(faults or {}), *governor, self.diary, *callbacks], **options)
        self.trainer.fit(self.module, loader, ckpt_path=ckpt_path, weights_only=None if ckpt_path is None else True)

    def loss(self, kit: Any) -> float:
        inputs, targets = kit.data(200, seed=2)
        with torch.no_grad():
            return functional.cross_entropy(self.module.net(inputs), targets).item()


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5}, {"precision": "bf16-mixed"}], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_nan_batch_changes_nothing_and_training_goes_on(kit: Any, optimizer: str, options: dict[str, Any]) -> None:
    run = Run(kit, {30: nan}, module=Module(kit, optimizer=optimizer), **options)
    assert run.diary.unchanged_batches() == [30]
    assert [type(event) for event in run.events] == [StepSkipped]
    assert run.events[0].step == 30
    assert run.trainer.global_step == 50
    assert run.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 49
    assert run.loss(kit) < 0.5 * Run(kit, max_epochs=0).loss(kit)
    assert run.callback.governor is not None and run.callback.governor.skipped_steps == 1


def test_the_first_batch_may_be_nan(kit: Any) -> None:
    """Torch's schedules warn if they are stepped before the optimizer ever was."""
    assert Run(kit, {0: nan}).diary.unchanged_batches() == [0]


def test_schedules_by_epoch_go_on(kit: Any) -> None:
    run = Run(kit, {24: nan, 30: nan}, module=Module(kit, schedule="epoch"))
    assert run.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 2
    assert run.diary.pages[24][:2] != [] and kit.same(run.diary.pages[24][0], run.diary.pages[25][0])


def test_damaged_weights_are_rewound(kit: Any) -> None:
    run = Run(kit, {40: lambda batch, module: kit.damage(module)}, max_epochs=4)
    rewinds = [event for event in run.events if isinstance(event, Rollback)]
    assert len(rewinds) == 1 and rewinds[0].from_step == 41
    after = run.diary.pages[rewinds[0].from_step + 1]
    assert 20 < rewinds[0].to_step < 40
    assert kit.same(after, run.diary.pages[rewinds[0].to_step])
    ungoverned = Run(kit, {40: lambda batch, module: kit.damage(module)}, max_epochs=4, governed=False)
    healthy = Run(kit, max_epochs=4)
    assert run.loss(kit) < 1.2 * healthy.loss(kit) < 0.5 * ungoverned.loss(kit)


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}],
    ids=str,
)
@pytest.mark.parametrize("schedule", ["step", "epoch"])
def test_a_healthy_run_is_the_same_to_the_bit(kit: Any, options: dict[str, Any], schedule: str) -> None:
    governed = Run(kit, module=Module(kit, schedule), **options)
    free = Run(kit, module=Module(kit, schedule), governed=False, **options)
    assert not governed.events
    assert kit.same(governed.diary.pages, free.diary.pages)


def test_accumulated_steps_are_judged_once_by_mean_loss_and_norm_before_clipping(kit: Any) -> None:
    run = Run(kit, max_epochs=1, accumulate_grad_batches=4, gradient_clip_val=1e-3)
    assert len(run.recorder.seen) == run.trainer.global_step == math.ceil(EPOCH_STEPS / 4)
    inputs, targets = kit.data(16 * EPOCH_STEPS)
    network = kit.network()
    loss = functional.cross_entropy(network(inputs[:64]), targets[:64])
    loss.backward()
    first = run.recorder.seen[0]
    assert first.loss == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
    assert first.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    network.load_state_dict({name.removeprefix("net."): value for name, value in run.diary.pages[24][0].items()})
    last = functional.cross_entropy(network(inputs[-16:]), targets[-16:])
    assert run.recorder.seen[-1].loss == pytest.approx(last.item(), rel=1e-5)  # one batch that is left over


def test_one_bad_batch_of_an_accumulated_step_stops_the_whole_step(kit: Any) -> None:
    run = Run(kit, {5: nan}, accumulate_grad_batches=4)
    assert kit.same(run.diary.pages[4], run.diary.pages[8])
    assert not kit.same(run.diary.pages[8], run.diary.pages[12])
    assert [event.step for event in run.events] == [1]


def test_a_batch_without_a_loss_is_left_to_lightning(kit: Any) -> None:
    def empty(batch: list[Tensor], module: Module) -> None:
        batch[0] = batch[0][:0]

    with pytest.warns(UserWarning, match="returned `None`"):
        run = Run(kit, {29: nan, 30: empty})
    assert run.diary.unchanged_batches() == [29]
    assert len(run.recorder.seen) == 49


def test_resuming_from_a_checkpoint_goes_on_as_if_nothing_had_happened(kit: Any, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    whole = Run(kit, max_epochs=3, callbacks=[Save()])
    resumed = Run(kit, max_epochs=3, ckpt_path=str(tmp_path / "first.ckpt"))
    assert resumed.trainer.global_step == 75
    assert kit.same(resumed.diary.pages, whole.diary.pages[25:])
    faults = {0: lambda batch, module: kit.damage(module), 1: nan, 2: nan}
    again = Run(kit, faults, ckpt_path=str(tmp_path / "first.ckpt"))
    assert any(kit.same(page, whole.diary.pages[25]) for page in again.diary.pages[2:])  # the governor's first snapshot


def test_collapse_ends_the_run(kit: Any) -> None:
    module = Module(kit)
    with pytest.raises(TrainingCollapsed, match="loss is nan"):
        Run(kit, dict.fromkeys(range(20, 1000), nan), module=module, max_epochs=10)
    assert "lr_scheduler_step" not in vars(module)


def test_nothing_is_left_behind(kit: Any) -> None:
    run = Run(kit)
    assert "lr_scheduler_step" not in vars(run.module)
    before = kit.contents(run.module)
    loss = run.module.net(torch.full((2, 10), math.nan)).sum()
    loss.backward()
    run.trainer.optimizers[0].step()
    assert not kit.same(kit.contents(run.module), before)


def test_one_callback_serves_several_fits(kit: Any) -> None:
    run = Run(kit, {30: nan})
    first = run.callback.governor
    run.trainer.fit_loop.max_epochs = 3
    inputs, targets = kit.data(16 * EPOCH_STEPS)
    run.trainer.fit(run.module, DataLoader(TensorDataset(inputs, targets), batch_size=16))
    assert run.callback.governor is not first
    assert run.callback.governor is not None and run.callback.governor.skipped_steps == 0


def with_scaler(**options: Any) -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=10, **options))]}


def test_gradient_scaler_healthy_run_is_the_same_to_the_bit(kit: Any) -> None:
    governed = Run(kit, **with_scaler(init_scale=256.0))
    free = Run(kit, governed=False, **with_scaler(init_scale=256.0))
    assert not governed.events
    assert kit.same(governed.diary.pages, free.diary.pages)
    assert governed.recorder.seen[0].loss == pytest.approx(Run(kit).recorder.seen[0].loss, rel=1e-2)
    assert governed.recorder.seen[0].grad_norm == pytest.approx(Run(kit).recorder.seen[0].grad_norm, rel=1e-2)


def test_gradient_scaler_a_stopped_step_lowers_the_scale_once_as_without_a_governor(kit: Any) -> None:
    governed = Run(kit, {30: nan}, **with_scaler(init_scale=256.0))
    free = Run(kit, {30: nan}, governed=False, **with_scaler(init_scale=256.0))
    assert [type(event) for event in governed.events] == [StepSkipped]
    scales = [[page[3]["scale"] for page in run.diary.pages] for run in (governed, free)]
    assert scales[0] == scales[1] and scales[0][31] == scales[0][30] / 2
    assert kit.same(governed.diary.pages[31][:2], governed.diary.pages[30][:2])
    assert governed.diary.pages[31][2]["last_epoch"] == 30
    assert free.diary.pages[31][2]["last_epoch"] == 31  # Lightning alone goes on with the schedule


def test_gradient_scaler_is_rewound(kit: Any) -> None:
    run = Run(kit, {40: lambda batch, module: kit.damage(module, 3.0)}, max_epochs=4, **with_scaler(init_scale=256.0))
    rewinds = [event for event in run.events if isinstance(event, Rollback)]
    assert rewinds and "scaler" in rewinds[0].parts
    assert kit.same(run.diary.pages[rewinds[0].from_step + 1], run.diary.pages[rewinds[0].to_step])
    assert math.isfinite(run.loss(kit))


def test_what_cannot_be_governed_is_refused(kit: Any) -> None:
    manual = Module(kit)
    manual.automatic_optimization = False
    with pytest.raises(ValueError, match="automatic_optimization"):
        Run(kit, module=manual)
    with pytest.raises(ValueError, match="LBFGS"):
        Run(kit, module=Module(kit, optimizer="lbfgs"))
    with pytest.raises(ValueError, match="2 processes"):
        GovernorCallback().setup(types.SimpleNamespace(world_size=2), Module(kit), "fit")


def test_module_without_an_optimizer_is_refused(kit: Any) -> None:
    module = Module(kit)
    module.configure_optimizers = lambda: None
    with pytest.warns(UserWarning, match="will run with no optimizer"), pytest.raises(ValueError, match="one optimizer"):
        Run(kit, module=module)


def test_a_module_can_be_copied_while_it_is_governed(kit: Any) -> None:
    class Copies(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            pl_module.trainer = None
            self.copied = copy.deepcopy(pl_module)
            pl_module.trainer = trainer

    copies = Copies()
    run = Run(kit, max_steps=3, callbacks=[copies])
    assert kit.same(kit.contents(copies.copied), kit.contents(run.module))
