"""Hugging Face's Trainer, on a Llama of a few thousand parameters made here.

Its gradients are its own, so what the rule is given are those that it steps with.
"""

import tempfile
from typing import Any

import fit
import torch
from transformers import (  # pyright: ignore[reportMissingImports]
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from larskit.torch import LARS

torch.manual_seed(0)
# At the raw rate the scales of norms would move by a few roundings of 1 only.
EVERY_LAYER: dict[str, Any] = {"adapt": True, "decay": True}
TOKENS = torch.randint(32, (8, 12))
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
)


class Keep(TrainerCallback):
    """Keeps the weights after each step, and the gradients it was made with."""

    def __init__(self, model):
        self.weights = [fit.float64(w.detach() for w in model.parameters())]
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model, **more):
        self.gradients.append(fit.float64(w.grad for w in model.parameters()))

    def on_step_end(self, args, state, control, model, **more):
        self.weights.append(fit.float64(w.detach() for w in model.parameters()))


def train(folder):
    model = LlamaForCausalLM(CONFIG)
    keep = Keep(model)
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=fit.STEPS,
        per_device_train_batch_size=len(TOKENS),
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    optimizer = LARS(model.parameters(), *fit.HYPERPARAMETERS, **EVERY_LAYER)
    Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in TOKENS],
        optimizers=(optimizer, None),
        callbacks=[keep],
    ).train()
    return keep


with tempfile.TemporaryDirectory() as folder:
    keep = train(folder)
given = iter(keep.gradients)
fit.run(
    "transformers",
    {
        "larskit.torch.LARS in Trainer": (
            lambda: keep.weights,
            fit.optimizer(keep.weights[0], lambda weights: next(given), **EVERY_LAYER),
        )
    },
)
