"""The governor as a callback of the Hugging Face ``Trainer``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from morphogen.errors import MorphogenError
from morphogen.governor import Detector, Governor, GovernorConfig
from morphogen.integrations.steps import BackwardWatch, StepGate, for_data_that_goes_on
from morphogen.state import TrainingState, surgery
from morphogen.telemetry.events import Emit, discard

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.training_args import ParallelMode
except ImportError as error:
    raise ImportError("Transformers is not installed. Run: pip install 'morphogen[transformers]'") from error


class GovernorCallback(TrainerCallback):
    """Stops bad optimizer steps of a Hugging Face ``Trainer``, and rewinds the run when that does not help.

    Watched are model, optimizer, learning-rate schedule and gradient scaler, from the first step on; a checkpoint that is
    resumed from is loaded by then, and the governor starts anew from it: what it had learned and kept before is not in the
    Trainer's checkpoints. Each optimizer step is judged once, by its loss and its gradients' norm before clipping.
    The loss is the one that ``backward`` is called on, summed over the step's batches, so losses of one's own
    (``compute_loss_func``, ``label_smoothing_factor``, an overridden ``compute_loss``) are seen as they are. A step that is
    stopped changes nothing, and the schedule stays where it is; ``state.global_step`` counts it. A rewind puts back what is
    watched and torch's, NumPy's and Python's generators, not the data loader, logs or other callbacks.

    Args:
        config: Knobs of the governor; ``skip_window_steps`` is taken as 0, as batches do not come again after a rewind.
        detectors: Own detectors to use beside the standard ones.
        emit: Receives the governor's events; their steps are ``state.global_step``.

    Attributes:
        governor: The governor of the present or last ``train``; None before the first.

    Raises:
        ValueError: From ``train``: several processes or devices, or an optimizer that needs more than one gradient.
        TrainingCollapsed: From ``train``: the fault came back after every rewind.

    Example:
        >>> callback = GovernorCallback()  # to be given to Trainer(..., callbacks=[callback])
        >>> callback.governor is None
        True
    """

    def __init__(
        self, config: GovernorConfig | None = None, *, detectors: Sequence[Detector] = (), emit: Emit = discard
    ) -> None:
        """Remember what the governor is to be made of."""
        self.governor: Governor | None = None
        self._config = for_data_that_goes_on(config or GovernorConfig())
        self._detectors, self._emit = tuple(detectors), emit
        self._run: _Run | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make the governor: model, optimizer and schedule are ready, and a checkpoint was loaded."""
        self.detach()
        if args.parallel_mode is not ParallelMode.NOT_PARALLEL:
            raise ValueError(
                f"`parallel_mode` must be not_parallel for GovernorCallback, got {args.parallel_mode.value}: each process "
                "would judge its own share of a batch. Train in one process on one device (CUDA_VISIBLE_DEVICES=0)."
            )
        self._run = _Run(kwargs["model"], kwargs["optimizer"], kwargs["lr_scheduler"])
        self.governor = Governor(self._run.state, self._config, detectors=self._detectors, emit=self._emit)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge the step."""
        run = self._run
        if self.governor is None or run is None:
            return
        run.watch.close()
        try:
            loss, grad_norm = run.loss_and_norm()
            verdict = self.governor.observe(loss, grad_norm=grad_norm, step=state.global_step)
        except MorphogenError:
            self.detach()
            raise
        run.hold(not verdict.proceed)

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look away until the next batch of this step."""
        if self._run is not None:
            self._run.watch.close()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Judge what was not looked at yet, if ``check_every`` is above 1, and let go of model and optimizer."""
        self.detach()
        if self.governor is not None:
            self.governor.flush()

    def detach(self) -> None:
        """Let go of model and optimizer. The end of ``train`` does so, and the next one; call it after a Ctrl-C."""
        if self._run is not None:
            self._run.detach()
            self._run = None


class _Run:
    """The parts of one ``train`` and what is attached to them."""

    def __init__(self, model: nn.Module, optimizer: Any, schedule: Any) -> None:
        if not isinstance(optimizer, AcceleratedOptimizer):
            raise ValueError(f"`optimizer` must be stepped by accelerate, got {type(optimizer).__name__}. Use no DeepSpeed.")
        self._optimizer: Any = optimizer
        scaler = self._optimizer.scaler
        bare: Any = self._optimizer.optimizer
        self.state = TrainingState(model, bare, _Schedule(schedule, bare), scaler)
        self.gate = StepGate(optimizer)
        self.watch = BackwardWatch(surgery.parameters_of(bare), scaler)
        self._hook = model.register_forward_hook(self._after_forward)

    def _after_forward(self, model: nn.Module, inputs: Any, outputs: Any) -> None:
        if torch.is_grad_enabled():
            self.watch.open()

    def loss_and_norm(self) -> tuple[Tensor, Tensor]:
        seen = self.watch.take()
        if seen is None:
            raise ValueError(
                "`compute_loss` must call the model as a whole, and its loss be what `backward` starts from, got a step "
                "without. Call `model(...)`, not a part of it."
            )
        return seen

    def hold(self, held: bool) -> None:
        self.gate.held = held
        self._optimizer._is_overflow = held  # what the Trainer asks before it steps the schedule

    def detach(self) -> None:
        self.watch.close()
        self._hook.remove()
        self.gate.remove()


class _Schedule:
    """A schedule with the optimizer as TrainingState knows it: the Trainer gives it one that accelerate has wrapped."""

    def __init__(self, schedule: Any, optimizer: Any) -> None:
        self.schedule = schedule.scheduler if isinstance(schedule, AcceleratedScheduler) else schedule
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(state)
