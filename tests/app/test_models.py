import pytest
import torch
from torch import nn

from larskit.app.models import build

NAMES = ("convnet", "convnet-plain", "resnet18", "resnet50")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (5, 33, 20)])
def test_the_output_has_one_logit_per_class(name, channels, height, width):
    model = build(name, channels, 7, min(height, width))
    assert model(torch.randn(2, channels, height, width)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "count"), [("resnet18", 11_689_512), ("resnet50", 25_557_032)]
)
def test_resnets_have_the_published_number_of_parameters(name, count):
    model = build(name, 3, 1000, 224)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.get_submodule("stage4")(
        torch.zeros(2, 256 * (1 if name == "resnet18" else 4), 2, 2)
    ).shape[2:] == (1, 1)


def test_the_stem_downsamples_large_images_only():
    sides = {
        size: build("resnet18", 3, 2, size)
        .get_submodule("stem")(torch.zeros(2, 3, size, size))
        .shape[-1]
        for size in (64, 63)
    }
    assert sides == {64: 16, 63: 63}


def test_convnet_plain_is_convnet_without_batch_norm():
    normed, plain = (list(build(name, 1, 10, 8).children()) for name in NAMES[:2])
    without = [layer for layer in normed if not isinstance(layer, nn.BatchNorm2d)]
    assert len(without) == len(normed) - 3
    assert [*map(type, without)] == [*map(type, plain)]
