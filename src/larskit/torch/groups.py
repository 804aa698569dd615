"""The parameters of a model, in groups."""

from typing import Any

import torch

from larskit.config import check_lr
from larskit.select import Selection, check_matched, select

_Group = dict[str, Any]  # what `torch.optim.Optimizer` takes


def param_groups(
    model: torch.nn.Module,
    *,
    weight_decay: float | None = None,
    adapt: Selection = None,
    decay: Selection = None,
    excluded_lr: float | None = None,
) -> list[_Group]:
    """Split a model's parameters into groups by whether they are adapted and decayed.

    Parameters
    ----------
    model : torch.nn.Module
        Its parameters that require gradients, each once.
    weight_decay : float, optional
        Of the layers that are decayed; None: the default of the optimizer.
    adapt, decay : None, bool, pattern, sequence of patterns, or callable
        As in `LARS`.
    excluded_lr : float, optional
        The learning rate of the layers that are not adapted. The usual rates of LARS,
        1 to 30, are too high for most biases.

    Returns
    -------
    list of dict
        For `LARS`, with named parameters: at most four groups, none empty.

    Examples
    --------
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    >>> groups = param_groups(model, adapt="0.weight", excluded_lr=0.1)
    >>> [(group["adapt"], len(group["params"])) for group in groups]
    [(True, 1), (False, 3)]
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module: pass the "
            "model itself, not its parameters"
        )
    for name, given in (("weight_decay", weight_decay), ("excluded_lr", excluded_lr)):
        if given is not None:
            check_lr(given, name)  # of the same range as a rate
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient"
        )
    names, tensors = zip(*named, strict=True)
    flags = []
    for what, selection in (("adapt", adapt), ("decay", decay)):
        selected = select(selection, names, tensors, what)
        check_matched(selection, selected, what)
        flags.append(selected)
    groups: dict[tuple[bool, bool], _Group] = {}
    for pair, adapted, decayed in zip(named, *flags, strict=True):
        own: _Group = {"params": [], "adapt": adapted, "decay": decayed}
        if weight_decay is not None:
            own["weight_decay"] = weight_decay
        if excluded_lr is not None and not adapted:
            own["lr"] = excluded_lr
        groups.setdefault((adapted, decayed), own)["params"].append(pair)
    return list(groups.values())
