"""Image classifiers: two small convolutional networks, ResNet-18 and ResNet-50."""

from collections import OrderedDict

from torch import Tensor, nn

# The stem of a ResNet downsamples images of at least this many pixels.
DOWNSAMPLED_FROM = 64


def build(name: str, channels: int, classes: int, size: int) -> nn.Module:
    """Build a randomly initialized network.

    Parameters
    ----------
    name : {"convnet", "convnet-plain", "resnet18", "resnet50"}
        "convnet-plain" is "convnet" without batch norm.
    channels : int
        Channels of an image.
    classes : int
        Number of outputs.
    size : int
        Shorter side of an image in pixels. For 64 or more, a ResNet starts with a 7x7
        convolution of stride 2 and pooling; below, with a 3x3 convolution.

    Returns
    -------
    torch.nn.Module
        Maps (images, channels, height, width) to (images, classes).
    """
    if name.startswith("convnet"):
        return _convnet(channels, classes, norm=name == "convnet")
    return _resnet(channels, classes, size, deep=name == "resnet50")


class Mean(nn.Module):
    """Average over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (images, channels, height, width) to (images, channels)."""
        # Adaptive pooling has no deterministic gradient on CUDA.
        return x.mean((2, 3))


def _convnet(channels: int, classes: int, *, norm: bool) -> nn.Module:
    layers: list[nn.Module] = []
    for width, pool in ((16, True), (32, False), (64, False)):
        layers.append(nn.Conv2d(channels, width, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(width)] * norm + [nn.ReLU()]
        layers += [nn.MaxPool2d(2, ceil_mode=True)] * pool
        channels = width
    return nn.Sequential(*layers, Mean(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """``relu(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        """Store the two branches."""
        super().__init__()
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Add the branches."""
        return (self.body(x) + self.shortcut(x)).relu()


def _resnet(channels: int, classes: int, size: int, *, deep: bool) -> nn.Module:
    stem = [*_conv(channels, 64, 3), nn.ReLU()]
    if size >= DOWNSAMPLED_FROM:
        stem = [*_conv(channels, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    parts = OrderedDict[str, nn.Module](stem=nn.Sequential(*stem))
    width = 64
    for stage, depth in enumerate((3, 4, 6, 3) if deep else (2, 2, 2, 2)):
        blocks = []
        for i in range(depth):
            stride = 2 if stage and not i else 1
            blocks.append(_block(width, 64 << stage, stride, deep))
            width = (64 << stage) * (4 if deep else 1)
        parts[f"stage{stage + 1}"] = nn.Sequential(*blocks)
    model = nn.Sequential(
        OrderedDict(**parts, mean=Mean(), head=nn.Linear(width, classes))
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def _block(channels: int, width: int, stride: int, deep: bool) -> Residual:
    out = width * 4 if deep else width
    if deep:
        body = [
            *_conv(channels, width, 1),
            nn.ReLU(),
            *_conv(width, width, 3, stride),
            nn.ReLU(),
            *_conv(width, out, 1),
        ]
    else:
        body = [
            *_conv(channels, width, 3, stride),
            nn.ReLU(),
            *_conv(width, out, 3),
        ]
    same = stride == 1 and channels == out
    shortcut = [nn.Identity()] if same else _conv(channels, out, 1, stride)
    return Residual(nn.Sequential(*body), nn.Sequential(*shortcut))


def _conv(channels: int, width: int, size: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm2d(width)]
