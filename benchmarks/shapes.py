"""The sets of parameter shapes that the benchmarks step."""

from collections.abc import Callable

import torch
from rows import Shapes

from larskit.app.models import build

RESNET, VIT, SMALL = "ResNet-50", "ViT-B/16", "100 x (64x64 + 64)"
VIT_L, GPT = "ViT-L/16", "GPT 1.3B"


def _resnet50() -> Shapes:
    with torch.device("meta"):
        model = build("resnet50", channels=3, classes=1000, size=224)
    return tuple(tuple(p.shape) for p in model.parameters())


def _vit(d: int, blocks: int) -> Shapes:
    """Return the shapes of ``torchvision.models.vit_b_16`` or ``vit_l_16``."""
    stem = ((1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d))
    return (*stem, *_block(d) * blocks, (d,), (d,), (1000, d), (1000,))


def _gpt(d: int, blocks: int) -> Shapes:
    """Return the shapes of GPT-2 with a context of 2048."""
    return ((50257, d), (2048, d), *_block(d) * blocks, (d,), (d,))


def _block(d: int) -> Shapes:
    norm = ((d,), (d,))
    attention = ((3 * d, d), (3 * d,), (d, d), (d,))
    return (*norm, *attention, *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,))


SHAPES: dict[str, Callable[[], Shapes]] = {
    RESNET: _resnet50,
    VIT: lambda: _vit(768, 12),
    SMALL: lambda: ((64, 64), (64,)) * 100,
}
# For GPUs only.
LARGE: dict[str, Callable[[], Shapes]] = {
    VIT_L: lambda: _vit(1024, 24),
    GPT: lambda: _gpt(2048, 24),
}
