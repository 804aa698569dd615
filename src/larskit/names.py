"""The names of layers: two sets of them compared, and listed in messages."""

from collections.abc import Callable, Collection, Hashable, Iterable
from typing import TypeVar

SHOWN = 8
Name = TypeVar("Name", bound=Hashable)


def listed(names: Iterable[object]) -> str:
    """List some names, as Python writes them; of many the first few."""
    shown = list(map(repr, names))
    more = len(shown) - SHOWN
    text = ", ".join(shown[:SHOWN])
    return f"{text} and {more} more" if more > 0 else text


def missing_and_extra(
    found: Collection[Name], expected: Collection[Name]
) -> tuple[list[Name], list[Name]]:
    """Return the names that `found` does not have, and those that it should not."""
    missing = [name for name in expected if name not in found]
    return missing, [name for name in found if name not in expected]


def check_same(
    what: str,
    found: Collection[Name],
    expected: Collection[Name],
    remedy: str,
    *,
    optional: Collection[Name] = (),
    text: Callable[[Name], object] = str,
) -> None:
    """Refuse names that differ from those that are expected, in any order.

    Parameters
    ----------
    what : str
        What has the names, for the message.
    found, expected : collection of names
        Dictionaries serve as well. Large ones should be sets or dictionaries.
    remedy : str
        What was expected, and what to do.
    optional : collection of names
        Those that `found` may have besides.
    text : callable, default=str
        Writes a name as users know it.

    Raises
    ------
    ValueError
        Listing what is missing, else what is not expected.
    """
    missing, extra = missing_and_extra(found, expected)
    extra = [name for name in extra if name not in optional]
    for verb, wrong in (("misses", missing), ("has the extra", extra)):
        if wrong:
            raise ValueError(f"{what} {verb} {listed(map(text, wrong))}, {remedy}")
