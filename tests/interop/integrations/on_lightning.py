"""PyTorch Lightning."""

import fit
import pytorch_lightning as pl
from on_torch import X, Y, network, weights_of
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from larskit.torch import LARS


class Regression(pl.LightningModule):
    """Trains the network, and keeps its weights."""

    def __init__(self):
        super().__init__()
        self.net = network()
        self.kept = [fit.float64(weights_of(self.net))]

    def training_step(self, batch):
        x, y = batch
        return mse_loss(self.net(x), y)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.kept.append(fit.float64(weights_of(self.net)))

    def configure_optimizers(self):
        return LARS(self.parameters(), *fit.HYPERPARAMETERS)


def found():
    model = Regression()
    trainer = pl.Trainer(
        max_epochs=fit.STEPS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(X, Y), batch_size=len(X)))
    return model.kept


fit.run("pytorch-lightning", {"larskit.torch.LARS": (found, fit.optimizer())})
