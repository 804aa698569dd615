"""Which layers are adapted and which are decayed."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

Pattern = str | re.Pattern[str]
Selection = None | bool | Pattern | Sequence[Pattern] | Callable[[str, Any], bool]


def select(
    selection: Selection,
    names: Sequence[str] | None,
    arrays: Sequence[Any],
    what: str,
) -> tuple[bool, ...]:
    """Decide for each array whether it is selected.

    Parameters
    ----------
    selection : None, bool, pattern, sequence of patterns, or callable
        None selects what has two or more dimensions (weights, not biases and norms),
        True all, False none. A string is an `fnmatch` pattern of the whole name, a
        compiled expression is searched in it; of several patterns one must match. A
        callable gets ``(name, array)``.
    names : sequence of str, or None
        One name per array; None where there are none.
    arrays : sequence of array
        Only their ``shape`` is looked at, unless `selection` is callable.
    what : str
        The argument's name, for messages.

    Returns
    -------
    tuple of bool
        One per array.
    """
    if selection is None:
        return tuple(len(array.shape) >= 2 for array in arrays)
    if isinstance(selection, bool):
        return (selection,) * len(arrays)
    if not (callable(selection) or patterns(selection)):
        raise TypeError(
            f"{what} must be None, True, False, a name pattern or a callable "
            f"(name, array) -> bool, got {selection!r}"
        )
    if names is None:
        raise ValueError(
            f"{what}={selection!r} needs names, but the parameters came without: pass "
            "model.named_parameters() or larskit.torch.param_groups(model)"
        )
    pairs = zip(names, arrays, strict=True)
    if callable(selection):
        return tuple(bool(selection(name, array)) for name, array in pairs)
    return tuple(_matches(patterns(selection), name) for name in names)


def check_matched(selection: Selection, selected: Sequence[bool], what: str) -> None:
    """Refuse a name pattern that selected nothing at all."""
    if patterns(selection) and not any(selected):
        raise ValueError(
            f"{what}={selection!r} matches no parameter: check the names, or pass "
            f"{what}=False to select none"
        )


def patterns(selection: Any) -> tuple[Pattern, ...]:
    """Return the name patterns of a selection; none where it is of another kind."""
    if isinstance(selection, (str, re.Pattern)):
        return (selection,)
    if isinstance(selection, Sequence) and all(
        isinstance(item, (str, re.Pattern)) for item in selection
    ):
        return tuple(selection)
    return ()


def _matches(wanted: tuple[Pattern, ...], name: str) -> bool:
    return any(
        fnmatchcase(name, pattern)
        if isinstance(pattern, str)
        else pattern.search(name) is not None
        for pattern in wanted
    )
