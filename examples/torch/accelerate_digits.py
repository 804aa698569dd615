"""Train on scikit-learn's digits with LARS and Hugging Face Accelerate.

pip install 'larskit[torch]' accelerate scikit-learn
python examples/torch/accelerate_digits.py
accelerate launch --num-processes 2 examples/torch/accelerate_digits.py --bf16
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset, random_split

from larskit.torch import LARS, param_groups

EPOCHS, BATCH = 10, 128


def network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def main():
    parser = argparse.ArgumentParser(description="digits with LARS and Accelerate")
    parser.add_argument("--accumulate", type=int, default=2, help="parts of a batch")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    args = parser.parse_args()
    accelerator = Accelerator(
        mixed_precision="bf16" if args.bf16 else "no",
        gradient_accumulation_steps=args.accumulate,
        # a batch is that of all processes, and the schedule takes one step for each
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    set_seed(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = TensorDataset(images, torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2])
    batches = DataLoader(train, BATCH // args.accumulate, shuffle=True)
    model = network()
    groups = param_groups(model, weight_decay=1e-4, excluded_lr=0.1)
    optimizer = LARS(groups, lr=8.0)
    end = EPOCHS * -(-len(batches) // args.accumulate)
    schedule = LambdaLR(
        optimizer, lambda step: min(10 * (step + 1) / end, (1 - step / end) ** 2)
    )
    model, optimizer, schedule, batches, others = accelerator.prepare(
        model, optimizer, schedule, batches, DataLoader(test, 2 * BATCH)
    )
    for epoch in range(EPOCHS):
        model.train()
        for images, labels in batches:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        model.eval()
        hits = []
        for images, labels in others:
            with torch.no_grad():
                right = model(images).argmax(1) == labels
            hits.append(accelerator.gather_for_metrics(right))
        accuracy = torch.cat(hits).float().mean()
        ratios = [x.ratio for x in optimizer.optimizer.layer_stats().values()]
        accelerator.print(
            f"epoch {epoch + 1}: accuracy {accuracy:.2%}, "
            f"smallest trust ratio {min(ratios):.2g}"
        )
    accelerator.end_training()


if __name__ == "__main__":
    main()
