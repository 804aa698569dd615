"""Hugging Face Accelerate."""

import fit
from accelerate import Accelerator
from on_torch import X, Y, network, weights_of
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from larskit.torch import LARS


def found():
    net, accelerator = network(), Accelerator(cpu=True, gradient_accumulation_steps=2)
    half = DataLoader(TensorDataset(X, Y), batch_size=len(X) // 2)
    optimizer = LARS(net.parameters(), *fit.HYPERPARAMETERS)
    net, optimizer, loader = accelerator.prepare(net, optimizer, half)
    while True:
        yield weights_of(net)
        for x, y in loader:
            with accelerator.accumulate(net):
                accelerator.backward(mse_loss(net(x), y))
                optimizer.step()
                optimizer.zero_grad()


fit.run("accelerate", {"larskit.torch.LARS": (found, fit.optimizer())})
