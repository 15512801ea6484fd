"""The governor as a callback of the Lightning ``Trainer``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from morphogen.governor import Detector, Governor, GovernorConfig
from morphogen.integrations.steps import Interception, StepGate, for_data_that_goes_on
from morphogen.state import TrainingState, surgery
from morphogen.telemetry.events import Emit, discard

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("Lightning is not installed. Run: pip install 'morphogen[lightning]'") from error


class GovernorCallback(Callback):
    """Stops bad optimizer steps of a Lightning run, and rewinds the run when that does not help.

    Watched are module, optimizer, schedulers and gradient scaler, from the first training batch on; a checkpoint that is
    resumed from is loaded by then, and the governor starts anew from it: what it had learned and kept before is not in
    Lightning's checkpoints. Each optimizer step is judged once, by the mean loss of its batches and the norm of its gradients,
    unscaled and before they are clipped. A step that is stopped changes nothing, and schedulers with ``interval="step"`` stay
    where they are; ``trainer.global_step`` counts it. A rewind puts back what is watched and torch's, NumPy's and Python's
    generators, not data loaders, metrics, loggers or other callbacks.

    Args:
        config: Knobs of the governor; ``skip_window_steps`` is taken as 0, as batches do not come again after a rewind.
        detectors: Own detectors to use beside the standard ones.
        emit: Receives the governor's events; their steps are ``trainer.global_step``.

    Attributes:
        governor: The governor of the present or last ``fit``; None before the first.

    Raises:
        ValueError: From ``fit``: manual optimization, several processes, or no optimizer that one gradient is enough for.
        TrainingCollapsed: From ``fit``: the fault came back after every rewind.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> callback = GovernorCallback()
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(accelerator="cpu", max_steps=4, callbacks=[callback], enable_checkpointing=False, **quiet)
        >>> trainer.fit(BoringModel(), BoringModel().train_dataloader())
        >>> callback.governor.rollbacks
        0
    """

    def __init__(
        self, config: GovernorConfig | None = None, *, detectors: Sequence[Detector] = (), emit: Emit = discard
    ) -> None:
        """Remember what the governor is to be made of."""
        self.governor: Governor | None = None
        self._config = for_data_that_goes_on(config or GovernorConfig())
        self._detectors, self._emit = tuple(detectors), emit
        self._gate: StepGate | None = None
        self._schedules: Interception | None = None
        self._stepped_with_optimizer: list[Any] = []
        self._losses: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse at once what cannot be governed."""
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise ValueError(
                "`automatic_optimization` must be True for GovernorCallback, got False. In manual optimization, use "
                "morphogen.Governor in training_step itself: observe(loss) between manual_backward and step."
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"`devices` times `num_nodes` must be 1, got {trainer.world_size} processes: each would judge its own share of "
                "a batch. Train on one device."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the governor: optimizer and schedulers exist, and a checkpoint was loaded."""
        self._detach()
        trained = [optimizer for optimizer in trainer.optimizers if surgery.parameters_of(optimizer)]
        if len(trained) != 1:
            raise ValueError(
                f"`configure_optimizers` must return one optimizer, got {len(trained)}. Without one there is no step to govern."
            )
        optimizer = trained[0]
        schedules = trainer.lr_scheduler_configs
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        state = TrainingState(
            pl_module,
            optimizer,
            {f"schedule{number}": schedule.scheduler for number, schedule in enumerate(schedules)},
            scaler,
        )
        self.governor = Governor(state, self._config, detectors=self._detectors, emit=self._emit)
        self._gate = StepGate(optimizer, scaler)
        self._stepped_with_optimizer = [schedule.scheduler for schedule in schedules if schedule.interval == "step"]
        self._schedules = Interception(pl_module, "lr_scheduler_step", self._step_schedule)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Nothing is held back until this batch was judged."""
        if self._gate is not None:
            self._gate.held = False

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Remember the loss of this batch, which Lightning has divided by ``accumulate_grad_batches`` and scaled."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = loss.detach() * trainer.accumulate_grad_batches
        self._losses.append(loss if scaler is None else loss / scaler.scale(torch.ones_like(loss)))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judge the step: the gradients are unscaled and not clipped yet."""
        losses, self._losses = self._losses, []
        if self.governor is None or self._gate is None or not losses:
            return
        verdict = self.governor.observe(torch.stack(losses).mean(), step=trainer.global_step)
        self._gate.held = not verdict.proceed

    def _step_schedule(self, method: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> None:
        held = self._gate is not None and self._gate.held
        if not (held and any(scheduler is one for one in self._stepped_with_optimizer)):
            method(scheduler, *args, **kwargs)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge what was not looked at yet, if ``check_every`` is above 1, and let go of the optimizer."""
        self._detach()
        if self.governor is not None:
            self.governor.flush()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go of the optimizer."""
        self._detach()

    def _detach(self) -> None:
        self._losses = []
        if self._gate is not None and self._schedules is not None:
            self._gate.remove()
            self._schedules.remove()
            self._gate = self._schedules = None
