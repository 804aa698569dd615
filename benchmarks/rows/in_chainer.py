"""The hook without an update, called by Chainer: Chainer's own, and larskit's."""

from functools import cache

import chainer  # pyright: ignore[reportMissingImports]
import numpy as np

from larskit import GradientLARS
from rows import Shapes, Work
from rows.in_numpy import backward, gradients, weights

__all__ = ["backward", "hook"]


def hook(shapes: Shapes, ours: bool) -> Work:
    link = _link(shapes)
    optimizer = chainer.optimizers.SGD().setup(link)
    kind = GradientLARS if ours else chainer.optimizer_hooks.GradientLARS
    optimizer.add_hook(kind(weight_decay=1e-4))

    def restore() -> None:
        for name, g in gradients(shapes).items():
            np.copyto(getattr(link, name).grad, g)

    return Work(lambda: optimizer.call_hooks("pre"), restore)


@cache
def _link(shapes: Shapes) -> chainer.Link:
    link = chainer.Link()
    with link.init_scope():
        for name, w in weights(shapes).items():
            setattr(link, name, chainer.Parameter(w))
    link.cleargrads()
    for name, g in gradients(shapes).items():
        getattr(link, name).grad = g.copy()
    return link
