"""The sets of shapes that are stepped over."""

from collections.abc import Callable

import torch
from rows import Shapes

from larskit.app.models import build

RESNET, VIT, SMALL = "ResNet-50", "ViT-B/16", "100 x (64x64 + 64)"


def _resnet50() -> Shapes:
    with torch.device("meta"):
        model = build("resnet50", channels=3, classes=1000, size=224)
    return tuple(tuple(p.shape) for p in model.parameters())


def _vit_b_16() -> Shapes:
    """Return the shapes of ``torchvision.models.vit_b_16``."""
    d, mlp = 768, 3072
    norm = ((d,), (d,))
    attention = ((3 * d, d), (3 * d,), (d, d), (d,))
    block = (*norm, *attention, *norm, (mlp, d), (mlp,), (d, mlp), (d,))
    stem = ((1, 1, d), (d, 3, 16, 16), (d,), (1, 197, d))
    return (*stem, *block * 12, *norm, (1000, d), (1000,))


SHAPES: dict[str, Callable[[], Shapes]] = {
    RESNET: _resnet50,
    VIT: _vit_b_16,
    SMALL: lambda: ((64, 64), (64,)) * 100,
}
