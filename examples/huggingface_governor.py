"""Hugging Face Trainer: a small GPT-2 meets a batch without labels (its loss is 0/0) and then damaged weights.

Run: python examples/huggingface_governor.py    (needs: pip install 'morphogen[transformers]')
"""

import math
import tempfile

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from morphogen.integrations.huggingface import GovernorCallback
from morphogen.state import draw_from
from morphogen.telemetry.events import Event

EMPTY_STEP, DAMAGED_STEP, STEPS, VOCABULARY, LENGTH = 120, 200, 300, 16, 24

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()


def sentences(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Chains of tokens in which nine of ten follow from the one before."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    follows = torch.rand(count, LENGTH, generator=generator) < 0.9
    for place in range(1, LENGTH):
        tokens[:, place] = torch.where(follows[:, place], (5 * tokens[:, place - 1] + 3) % VOCABULARY, tokens[:, place])
    return [{"input_ids": sentence, "labels": sentence} for sentence in tokens]


def collate(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


class Faulty:
    """A collator with one batch in which every label is the one to be ignored."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.batches += 1
        batch = collate(samples)
        return batch | {"labels": torch.full_like(batch["labels"], -100)} if self.batches == EMPTY_STEP else batch


class Damage(TrainerCallback):
    """Noise on all weights, at one step."""

    def on_step_begin(self, args, state, control, model, **kwargs):
        if state.global_step == DAMAGED_STEP:
            noise = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += torch.randn(weight.shape, generator=noise)


def perplexity_after_training(*callbacks: TrainerCallback, collator=collate) -> float:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    with draw_from(torch.Generator().manual_seed(0)):
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=sentences(2000, seed=0),
            data_collator=collator,
            callbacks=list(callbacks),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    model.eval()
    with torch.no_grad():
        return math.exp(min(model(**collate(sentences(500, seed=1))).loss.nan_to_num(700.0).item(), 700.0))


def tell(event: Event) -> None:
    print(f"  step {event.step}: {type(event).__name__} {getattr(event, 'reason', '')}")


governor = GovernorCallback(emit=tell)
healthy = perplexity_after_training()
ungoverned = perplexity_after_training(Damage(), collator=Faulty())
print("With the governor:")
governed = perplexity_after_training(Damage(), governor, collator=Faulty())
print(f"test perplexity: no faults {healthy:.2f}, faults {ungoverned:.2f}, faults and governor {governed:.2f}")
print(f"skipped {governor.governor.skipped_steps} step(s), rewound {governor.governor.rollbacks} time(s)")
