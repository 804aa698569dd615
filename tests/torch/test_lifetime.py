"""What an optimizer holds is freed with it, without the cyclic collector."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from larskit.torch import LARS, step_in_backward


@contextmanager
def without_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(references):
    return [name for name, reference in references.items() if reference() is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"foreach": True},
        {"foreach": False, "fused": False},
        {"fused": True, "carry_norms": True},
        {"capturable": True},
        {"on_nonfinite": "skip"},
        {"master_weights": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_everything_is_freed_with_the_optimizer(options, steps):
    def train():
        w = nn.Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
        optimizer = LARS([w], lr=0.5, **options)
        for _ in range(steps):
            w.grad = torch.ones_like(w)
            optimizer.step()
        found = {"optimizer": optimizer, "weight": w, **optimizer.state[w]}
        if steps:
            found["gradient"] = w.grad
        return {name: weakref.ref(x) for name, x in found.items()}

    train()  # what is imported at the first step stays
    with without_collector():
        assert alive(train()) == []


def build():
    model = nn.Linear(3, 2)
    optimizer = LARS(model.parameters(), lr=0.5)
    handle = step_in_backward(optimizer)
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    return model, optimizer, handle


@pytest.mark.parametrize("removed", [False, True])
def test_stepping_in_backward_keeps_nothing_alive(removed):
    def train():
        model, optimizer, handle = build()
        if removed:
            handle.remove()
        found = {"model": model, "optimizer": optimizer, "handle": handle}
        found |= dict(model.named_parameters())
        return {name: weakref.ref(x) for name, x in found.items()}

    train()
    with without_collector():
        assert alive(train()) == []


def test_without_its_optimizer_a_model_keeps_its_gradients():
    model, optimizer, handle = build()
    before = model.weight.detach().clone()
    del optimizer
    model(torch.ones(4, 3)).sum().backward()
    assert model.weight.grad is not None
    assert torch.equal(model.weight, before)
    handle.remove()
