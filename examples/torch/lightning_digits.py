"""Train on scikit-learn's digits with LARS in PyTorch Lightning.

pip install 'larskit[torch]' pytorch-lightning scikit-learn
python examples/torch/lightning_digits.py
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset, random_split

from larskit.torch import LARS, param_groups


class Classifier(pl.LightningModule):
    def __init__(self, lr):
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
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

    def training_step(self, batch):
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def test_step(self, batch):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Warm up over a tenth of the steps, then decay quadratically."""
        groups = param_groups(self.net, weight_decay=1e-4, excluded_lr=0.1)
        optimizer = LARS(groups, self.lr)
        end = self.trainer.estimated_stepping_batches
        schedule = LambdaLR(
            optimizer, lambda step: min(10 * (step + 1) / end, (1 - step / end) ** 2)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def main():
    pl.seed_everything(0)
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = TensorDataset(images, torch.tensor(labels))
    train, test = random_split(data, [0.8, 0.2])
    model = Classifier(lr=8.0)
    trainer = pl.Trainer(max_epochs=10, logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(train, batch_size=128, shuffle=True))
    trainer.test(model, DataLoader(test, batch_size=len(test)))


if __name__ == "__main__":
    main()
