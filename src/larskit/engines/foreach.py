"""The rule on whole lists of torch tensors, through torch's multi-tensor functions.

It may fuse a multiplication with an addition where the reference does not, so the two
agree to 2 ulp of the larger operand a step.
"""

from typing import Any

import torch
from torch import Tensor

from larskit import rule
from larskit.arrays import norm_dtype, scalar
from larskit.config import Config, is_number, is_zero
from larskit.rule import Lengths

Tensors = list[Tensor]


def lengths(arrays: Tensors) -> Tensor:
    """Return the length of each tensor, as a wide 1-d tensor."""
    dtype = getattr(torch, norm_dtype(arrays[0]))
    return torch.stack(torch._foreach_norm(_real(arrays), 2, dtype))


def step_(
    weights: Tensors,
    gradients: Tensors,
    buffers: list[Any],
    lr: Any,
    config: Config,
    norms: tuple[Tensor, Tensor] | None = None,
) -> Lengths:
    """Move `weights` and `buffers` in place, see `larskit.engines`."""
    narrow = _real(weights)
    w, g = _widen(narrow), _widen(_real(gradients))
    lr = scalar(lr, w[0])
    v = [None if buffer is None else _real([buffer])[0] for buffer in buffers]
    move = _move_along_buffer if config.denominator == "momentum" else _move
    y, new_v, found = move(w, g, v, lr, config, norms)
    if not is_zero(config.momentum):
        _store(buffers, new_v, weights)
    torch._foreach_sub_(w, y)
    if w is not narrow:
        torch._foreach_copy_(narrow, w)
    return found


def _move(
    w: Tensors, g: Tensors, v: list[Any], lr: Any, config: Config, norms: Any
) -> tuple[Tensors, Tensors, Lengths]:
    """Return what to subtract from the weights, the new buffers and the lengths."""
    u = _decayed(w, g, config)
    measured = u if config.denominator == "decayed_gradient" else g
    w_norms, q = norms or (lengths(w), lengths(measured))
    ratio = rule.trust_ratio(w_norms, q, lr, config)
    inside = config.lr_placement == "inside"
    scale = rule.rounded(ratio, w[0])
    factors = ((lr * scale) if inside else scale).unbind()
    if u is g:  # which is not ours to change
        x = list(torch._foreach_mul(u, factors))
    else:
        torch._foreach_mul_(u, factors)
        x = u
    y, new_v = _accumulate(v, x, config)
    if not inside:
        y = torch._foreach_mul(y, lr)
    return list(y), new_v, Lengths(w_norms, q, ratio)


def _move_along_buffer(
    w: Tensors, g: Tensors, v: list[Any], lr: Any, config: Config, norms: Any
) -> tuple[Tensors, Tensors, Lengths]:
    """Do what `_move` does where the ratio is taken on the updated buffer."""
    u = _decayed(w, g, config)
    v = [torch.zeros_like(x) if v is None else v for x, v in zip(u, v, strict=True)]
    y, new_v = _accumulate(v, u, config)
    w_norms, q = norms or (lengths(w), lengths(y))
    ratio = rule.trust_ratio(w_norms, q, lr, config)
    scale = lr * rule.rounded(ratio, w[0])
    return (
        list(torch._foreach_mul(y, scale.unbind())),
        new_v,
        Lengths(w_norms, q, ratio),
    )


def _decayed(w: Tensors, g: Tensors, config: Config) -> Tensors:
    if config.maximize:
        g = list(torch._foreach_neg(g))
    wd = rule.weight_decay(config)
    if is_zero(wd):
        return g
    if is_number(wd):
        return list(torch._foreach_add(g, w, alpha=wd))
    return list(torch._foreach_add(g, torch._foreach_mul(w, wd)))


def _accumulate(v: list[Any], x: Tensors, config: Config) -> tuple[Tensors, Tensors]:
    """Return the direction to step along and the buffers that took x."""
    if is_zero(config.momentum):
        return x, x
    new_v = list(x)
    old = [i for i, buffer in enumerate(v) if buffer is not None]
    if old:
        kept = _widen([v[i] for i in old])
        added = [x[i] for i in old]
        if not is_zero(config.dampening):
            added = torch._foreach_mul(added, 1 - config.dampening)
        torch._foreach_mul_(kept, config.momentum)
        torch._foreach_add_(kept, added)
        for i, buffer in zip(old, kept, strict=True):
            new_v[i] = buffer
    if not config.nesterov:
        return new_v, new_v
    ahead = torch._foreach_mul(new_v, config.momentum)
    return list(torch._foreach_add(x, ahead)), new_v


def _store(buffers: list[Any], new_v: Tensors, weights: Tensors) -> None:
    """Keep the buffers that are not kept yet: new ones, and those of a narrow dtype."""
    for i, (buffer, new) in enumerate(zip(buffers, new_v, strict=True)):
        if weights[i].is_complex():
            new = torch.view_as_complex(new)
        if buffer is None:
            buffers[i] = new.to(weights[i].dtype)
        elif buffer.dtype != new.dtype:
            buffer.copy_(new)


def _real(tensors: Tensors) -> Tensors:
    if not any(x.is_complex() for x in tensors):
        return tensors
    return [torch.view_as_real(x) if x.is_complex() else x for x in tensors]


def _widen(tensors: Tensors) -> Tensors:
    if tensors[0].element_size() >= 4:
        return tensors
    return [x.float() for x in tensors]
