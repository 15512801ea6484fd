"""The Hugging Face callback: bad steps are not taken, damaged runs are rewound, healthy runs are as without it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from morphogen.errors import TrainingCollapsed
from morphogen.governor import Rollback, StepSkipped
from morphogen.integrations.huggingface import GovernorCallback
from morphogen.state import draw_from
from morphogen.telemetry.events import Event

Batch = dict[str, Tensor]
EPOCH_STEPS = 25

logging.set_verbosity_error()


class Classifier(nn.Module):
    """As the Trainer wants it; with ``num_labels`` outputs and the loss beside them."""

    def __init__(self, kit: Any) -> None:
        super().__init__()
        self.net = kit.network()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.net(inputs)
        return {"logits": logits} | ({} if labels is None else {"loss": functional.cross_entropy(logits, labels)})


class Diary(TrainerCallback):
    """What the run is after each optimizer step; and damage before one."""

    def __init__(self, kit: Any, damages: Mapping[int, float]) -> None:
        self.kit, self.damages, self.pages = kit, damages, []

    def page(self, model: nn.Module, optimizer: Any, lr_scheduler: Any) -> list[Any]:
        return self.kit.contents(model, optimizer, lr_scheduler)

    def on_train_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        self.pages = [self.page(parts["model"], parts["optimizer"], parts["lr_scheduler"])]

    def on_step_begin(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        if state.global_step in self.damages:
            self.kit.damage(parts["model"], self.damages[state.global_step])

    def on_step_end(self, args: Any, state: Any, control: Any, **parts: Any) -> None:
        assert not _get_current_function_mode_stack()  # nobody watches between the steps
        self.pages.append(self.page(parts["model"], parts["optimizer"], parts["lr_scheduler"]))

    def unchanged_steps(self) -> list[int]:
        return [number for number in range(len(self.pages) - 1) if self.kit.same(self.pages[number], self.pages[number + 1])]


class Run:
    """One ``train`` and what came of it; batches in ``bad`` are NaN, the first being 0."""

    def __init__(
        self,
        kit: Any,
        folder: Path,
        bad: Iterable[int] = (),
        damages: Mapping[int, float] | None = None,
        *,
        governed: bool = True,
        trainer: Callable[..., Trainer] = Trainer,
        resume: str | None = None,
        **options: Any,
    ) -> None:
        self.events: list[Event] = []
        self.recorder = kit.Recorder()
        self.callback = GovernorCallback(kit.config, detectors=[self.recorder], emit=self.events.append)
        self.diary = Diary(kit, damages or {})
        self.model = Classifier(kit)
        self.batches, self.bad = 0, set(bad)
        inputs, targets = kit.data(16 * EPOCH_STEPS)
        quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1000, "use_cpu": True}
        options = {"num_train_epochs": 2, "learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, **quiet, **options}
        self.trainer = trainer(
            model=self.model,
            args=TrainingArguments(
                str(folder),
                per_device_train_batch_size=16,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
                train_sampling_strategy="sequential",
                **options,
            ),
            train_dataset=[{"inputs": x, "labels": y} for x, y in zip(inputs, targets, strict=True)],
            data_collator=self.collate,
            callbacks=[*([self.callback] if governed else []), self.diary],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.train(resume_from_checkpoint=resume)

    def collate(self, samples: list[Batch]) -> Batch:
        batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
        if self.batches in self.bad:
            batch["inputs"] = batch["inputs"] * math.nan
        self.batches += 1
        return batch

    def loss(self, kit: Any) -> float:
        inputs, targets = kit.data(200, seed=2)
        with torch.no_grad():
            return functional.cross_entropy(self.model.net(inputs), targets).item()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterable[None]:
    yield
    assert not _get_current_function_mode_stack()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0}, {"bf16": True}, {"optim": "adafactor"}], ids=str)
def test_a_nan_batch_changes_nothing_and_training_goes_on(kit: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    run = Run(kit, tmp_path, [30], **options)
    assert run.diary.unchanged_steps() == [30]
    assert [type(event) for event in run.events] == [StepSkipped]
    assert run.events[0].step == 30
    assert run.trainer.state.global_step == 50
    assert run.trainer.lr_scheduler is not None and run.trainer.lr_scheduler.last_epoch == 49
    assert run.loss(kit) < 0.8 * functional.cross_entropy(kit.network()(kit.data(200, 2)[0]), kit.data(200, 2)[1]).item()
    assert run.callback.governor is not None and run.callback.governor.skipped_steps == 1


def test_the_first_batch_may_be_nan(kit: Any, tmp_path: Path) -> None:
    assert Run(kit, tmp_path, [0]).diary.unchanged_steps() == [0]


def test_damaged_weights_are_rewound(kit: Any, tmp_path: Path) -> None:
    run = Run(kit, tmp_path, damages={40: 10.0}, num_train_epochs=4)
    rewinds = [event for event in run.events if isinstance(event, Rollback)]
    assert len(rewinds) == 1 and rewinds[0].from_step == 41
    assert 20 < rewinds[0].to_step < 40
    assert kit.same(run.diary.pages[rewinds[0].from_step + 1], run.diary.pages[rewinds[0].to_step])
    ungoverned = Run(kit, tmp_path, damages={40: 10.0}, num_train_epochs=4, governed=False)
    healthy = Run(kit, tmp_path, num_train_epochs=4)
    assert run.loss(kit) < 1.2 * healthy.loss(kit) < 0.5 * ungoverned.loss(kit)


def test_a_lowered_learning_rate_stays_lower_on_its_schedule(kit: Any, tmp_path: Path) -> None:
    """Accelerate hides the optimizer from the schedule; the second rewind for one fault halves the rates of both."""
    run = Run(kit, tmp_path, damages={40: 10.0, 43: 10.0}, num_train_epochs=4)
    factors = [event.learning_rate_factor for event in run.events if isinstance(event, Rollback)]
    assert factors == [1.0, 0.5]
    last = run.diary.pages[-2][2]
    healthy = Run(kit, tmp_path, num_train_epochs=4, governed=False)
    steps_left = 100 - last["last_epoch"]
    assert last["_last_lr"][0] == pytest.approx(0.5 * 3e-3 * steps_left / 100)
    assert healthy.diary.pages[-1][2]["base_lrs"] == [3e-3, 3e-3]


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 3}, {"bf16": True}, {"max_grad_norm": 0.0, "lr_scheduler_type": "cosine"}],
    ids=str,
)
def test_a_healthy_run_is_the_same_to_the_bit(kit: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    governed, free = Run(kit, tmp_path, **options), Run(kit, tmp_path, governed=False, **options)
    assert not governed.events
    assert kit.same(governed.diary.pages, free.diary.pages)


def test_accumulated_steps_are_judged_once_by_mean_loss_and_norm_before_clipping(kit: Any, tmp_path: Path) -> None:
    run = Run(kit, tmp_path, num_train_epochs=1, gradient_accumulation_steps=4, max_grad_norm=1e-3)
    assert len(run.recorder.seen) == run.trainer.state.global_step == math.ceil(EPOCH_STEPS / 4)
    inputs, targets = kit.data(16 * EPOCH_STEPS)
    network = kit.network()
    loss = functional.cross_entropy(network(inputs[:64]), targets[:64])
    loss.backward()
    first = run.recorder.seen[0]
    assert first.loss == pytest.approx(loss.item(), rel=1e-5)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in network.parameters()])
    assert first.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    network.load_state_dict({name.removeprefix("net."): value for name, value in run.diary.pages[-2][0].items()})
    last = functional.cross_entropy(network(inputs[-16:]), targets[-16:])
    assert run.recorder.seen[-1].loss == pytest.approx(last.item(), rel=1e-5)  # one batch that is left over


def test_one_bad_batch_of_an_accumulated_step_stops_the_whole_step(kit: Any, tmp_path: Path) -> None:
    run = Run(kit, tmp_path, [5], gradient_accumulation_steps=4)
    assert run.diary.unchanged_steps() == [1]
    assert [event.step for event in run.events] == [1]


def test_resuming_from_a_checkpoint_goes_on_as_if_nothing_had_happened(kit: Any, tmp_path: Path) -> None:
    whole = Run(kit, tmp_path, num_train_epochs=3, save_strategy="epoch")
    checkpoint = str(tmp_path / "checkpoint-25")
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-75")
    resumed = Run(kit, tmp_path / "resumed", num_train_epochs=3, resume=checkpoint)
    assert resumed.trainer.state.global_step == 75
    assert kit.same(resumed.diary.pages, whole.diary.pages[25:])
    again = Run(kit, tmp_path / "again", [1, 2], {25: 10.0}, num_train_epochs=3, resume=checkpoint)
    assert any(kit.same(page, whole.diary.pages[25]) for page in again.diary.pages[2:])  # the governor's first snapshot


def test_collapse_ends_the_run(kit: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingCollapsed, match="loss is nan"):
        Run(kit, tmp_path, range(20, 1000), num_train_epochs=10)


def test_nothing_is_left_on_model_and_optimizer(kit: Any, tmp_path: Path) -> None:
    run = Run(kit, tmp_path)
    assert not run.model._forward_hooks
    before = kit.contents(run.model)
    run.model.train()
    run.model(torch.full((2, 10), math.nan), torch.tensor([0, 1]))["loss"].backward()
    assert run.trainer.optimizer is not None
    run.trainer.optimizer.step()
    assert not kit.same(kit.contents(run.model), before)


class OwnLoss(Trainer):
    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(inputs["inputs"])
        loss = 100.0 + functional.mse_loss(outputs["logits"], functional.one_hot(inputs["labels"], 5).float())
        return (loss, outputs) if return_outputs else loss


def test_a_loss_of_ones_own_is_seen_as_it_is(kit: Any, tmp_path: Path) -> None:
    run = Run(kit, tmp_path, [30], trainer=OwnLoss)
    assert run.diary.unchanged_steps() == [30]
    assert 100 < run.recorder.seen[0].loss < 102
    given = Run(kit, tmp_path, [30], trainer=functools.partial(Trainer, compute_loss_func=hundredfold))
    assert given.diary.unchanged_steps() == [30]
    assert given.recorder.seen[0].loss > 100


def hundredfold(outputs: Batch, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return 100 * functional.cross_entropy(outputs["logits"], labels)


class Beside(Trainer):
    def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, **options: Any) -> Any:
        return functional.cross_entropy(model.net(inputs["inputs"]), inputs["labels"])


def test_a_loss_that_goes_round_the_model_is_refused(kit: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_loss"):
        Run(kit, tmp_path, trainer=Beside)


def test_evaluation_in_between_is_not_looked_at(kit: Any, tmp_path: Path) -> None:
    class Evaluating(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, eval_dataset=options["train_dataset"][:40])

    governed, free = (
        Run(kit, tmp_path, trainer=Evaluating, eval_strategy="steps", eval_steps=5, governed=governed, num_train_epochs=1)
        for governed in (True, False)
    )
    assert len(governed.recorder.seen) == 25
    assert kit.same(governed.diary.pages, free.diary.pages)


def test_a_schedule_by_metric_is_left_to_the_trainer(kit: Any, tmp_path: Path) -> None:
    class Evaluating(Trainer):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options, eval_dataset=options["train_dataset"][:40])

    options = {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss"}
    run = Run(kit, tmp_path, [24], trainer=Evaluating, **options)
    assert run.trainer.lr_scheduler is not None and run.trainer.lr_scheduler.last_epoch == 2


class Scaling(Trainer):
    """With a gradient scaler, which accelerate makes by itself on other devices than the CPU alone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)


def test_gradient_scaler_is_let_alone_held_back_and_rewound(kit: Any, tmp_path: Path) -> None:
    plain = Run(kit, tmp_path, max_grad_norm=0.0)
    governed, free = (Run(kit, tmp_path, trainer=Scaling, governed=governed, max_grad_norm=0.0) for governed in (True, False))
    assert not governed.events
    assert kit.same(governed.diary.pages, free.diary.pages)
    assert governed.recorder.seen[0].loss == pytest.approx(plain.recorder.seen[0].loss)
    assert governed.recorder.seen[0].grad_norm == pytest.approx(plain.recorder.seen[0].grad_norm)
    run = Run(kit, tmp_path, [30], {40: 10.0}, trainer=Scaling, max_grad_norm=0.0, num_train_epochs=4)
    assert run.trainer.accelerator.scaler.get_scale() in (128.0, 256.0)  # lowered once, or set back by the rewind to before
    assert 30 in run.diary.unchanged_steps()
    rewind = next(event for event in run.events if isinstance(event, Rollback))
    assert "scaler" in rewind.parts
    assert kit.same(run.diary.pages[rewind.from_step + 1], run.diary.pages[rewind.to_step])
    assert math.isfinite(run.loss(kit))
    once = Run(kit, tmp_path, [30], trainer=Scaling, max_grad_norm=0.0)
    assert once.trainer.accelerator.scaler.get_scale() == 128.0


@pytest.mark.slow
def test_a_compiled_model(kit: Any, tmp_path: Path) -> None:
    compiled = Run(kit, tmp_path, [30], torch_compile=True, torch_compile_backend="eager")
    assert compiled.diary.unchanged_steps() == [30]
    assert kit.same(compiled.recorder.seen[0].loss, Run(kit, tmp_path).recorder.seen[0].loss)


def test_several_processes_are_refused(kit: Any, tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    arguments._n_gpu = 2
    with pytest.raises(ValueError, match="not_distributed"):
        GovernorCallback().on_train_begin(arguments, None, None)


def test_language_model_with_empty_labels(tmp_path: Path, kit: Any) -> None:
    """A batch whose labels are all ignored has a loss of 0/0, which the Trainer would let through."""
    tokens = torch.randint(8, (96, 6), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[40:48] = -100
    samples = [{"input_ids": row, "labels": wanted} for row, wanted in zip(tokens, labels, strict=True)]
    with draw_from(torch.Generator().manual_seed(0)):
        model = GPT2LMHeadModel(
            GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=6, vocab_size=8, bos_token_id=0, eos_token_id=0)
        )
    callback, diary = GovernorCallback(kit.config, detectors=[recorder := kit.Recorder()]), Diary(kit, {})
    arguments = TrainingArguments(
        str(tmp_path),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
    )
    trainer = Trainer(model, arguments, train_dataset=samples, callbacks=[callback, diary])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert diary.unchanged_steps() == [5]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [seen.loss for seen in recorder.seen[:5]] == pytest.approx(logged[:5], rel=1e-3)
