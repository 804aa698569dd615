"""Write the tables, the targets and the plot of `step`."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from measure import Measured
from rows import (
    BASELINE,
    CARRIED,
    COPY,
    FUNCTION,
    FUNCTION_OUT,
    HOOK,
    IVY,
    MOVED,
    NATIVE,
    OUR_HOOK,
    ROWS,
    SCALE,
    THEIR_HOOK,
)
from shapes import RESNET, SMALL, VIT

AT_MOST = {
    (NATIVE, BASELINE): {RESNET: 1.25, VIT: 1.25, SMALL: 0.6},
    (CARRIED, BASELINE): {RESNET: 1.2, VIT: 1.2, SMALL: 0.6},
    (HOOK, BASELINE): {RESNET: 2.2, VIT: 2.2, SMALL: 3.0},
}
STATES_APART = 1.4  # the factor between the speeds of two states of the memory
FASTEST_OTHER = "the fastest other LARS"
TIMES_FASTER = {
    (NATIVE, FASTEST_OTHER): {RESNET: 3, VIT: 2, SMALL: 3},
    (FUNCTION, IVY): {RESNET: 50},
    (OUR_HOOK, THEIR_HOOK): {RESNET: 2, VIT: 2, SMALL: 2},
}
EXTRA_AT_MOST = {
    row: {RESNET: 0.01, VIT: 0.01} for row in (NATIVE, CARRIED, FUNCTION_OUT, OUR_HOOK)
}

STYLE = {
    "sgd": ("C7", "SGD, for comparison"),
    "lars": ("C3", "larskit"),
    "other": ("C0", "other packages"),
}


def summary(found: Measured) -> dict[str, dict[str, float]]:
    """Return the figures of each row, the fastest first."""
    rows = {}
    fastest = max(bandwidth(found, row) for row in (COPY, SCALE))
    for name in found.times.keys() - {COPY, SCALE}:
        low, middle, high = np.quantile(found.ratios(name, BASELINE), (0.1, 0.5, 0.9))
        seconds = float(np.median([*found.times[name].values()]))
        alone = float(np.median([*found.alone[name].values()]))
        limit = ROWS[name].passes * found.size / fastest
        rows[name] = {
            "median_ms": 1e3 * seconds,
            "ratio": float(middle),
            "ratio_p10": float(low),
            "ratio_p90": float(high),
            "ratio_alone": found.ratio(name, BASELINE, alone=True),
            "copy_GB_per_s": copy_speed(found, found.times[name]) / 1e9,
            "of_memory_limit": limit / alone,
            "extra_MB": found.peaks[name] / 1e6,
            "rounds": len(found.times[name]),
        }
    return dict(sorted(rows.items(), key=lambda row: row[1]["ratio"]))


def bandwidth(found: Measured, row: str) -> float:
    """Return the bytes per second that a row of kind "memory" reads and writes."""
    seconds = float(np.median([*found.alone[row].values()]))
    return ROWS[row].passes * 4 * MOVED / seconds


def copy_speed(found: Measured, rounds: Iterable[int]) -> float:
    """Return the bytes per second of a copy in some rounds."""
    seconds = float(np.median([found.alone[COPY][i] for i in rounds]))
    return ROWS[COPY].passes * 4 * MOVED / seconds


def moments(found: Measured) -> list[tuple[float, dict[str, float]]]:
    """Return the ratios of each state that the memory was in, if it was in two.

    A shared machine can copy at one speed in some rounds and at half of it in others.
    Each state is the speed of a copy in it, and the ratio of each row.
    """
    seconds = found.alone[COPY]
    slow, fast = np.quantile([*seconds.values()], (0.9, 0.1))
    if slow < STATES_APART * fast:
        return []
    states = []
    for is_fast in (False, True):
        rounds = {
            i for i, s in seconds.items() if (s < np.sqrt(slow * fast)) == is_fast
        }
        ratios = {
            name: float(np.median([times[i] / found.times[BASELINE][i] for i in own]))
            for name, times in found.times.items()
            if (own := times.keys() & rounds)
        }
        states.append((copy_speed(found, rounds), ratios))
    return states


def table(title: str, found: Measured) -> str:
    """Return the figures in Markdown."""
    lines = [
        f"### {title}: {found.size / 4e6:,.1f} million floats",
        "",
        "| optimizer | in a training loop | against fused SGD | 10 % to 90 % "
        "| alone, against SGD | a copy, GB/s | of the memory limit | extra memory |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rows = summary(found)
    for name, row in rows.items():
        lines.append(
            f"| {name} | {row['median_ms']:.3g} ms | {row['ratio']:.3g} "
            f"| {row['ratio_p10']:.3g} to {row['ratio_p90']:.3g} "
            f"| {row['ratio_alone']:.3g} | {row['copy_GB_per_s']:.1f} "
            f"| {100 * row['of_memory_limit']:.0f} % | {row['extra_MB']:.1f} MB |"
        )
    for speed, ratios in moments(found):
        listed = ", ".join(
            f"{name} {ratios[name]:.3g}" for name in rows if name in ratios
        )
        lines += [
            "",
            f"In the rounds where a copy runs at {speed / 1e9:.1f} GB/s: {listed}.",
        ]
    copied, scaled = (bandwidth(found, row) / 1e9 for row in (COPY, SCALE))
    lines += [
        "",
        f"Memory: a copy reads and writes {copied:.1f} GB/s, scaling in place "
        f"{scaled:.1f} GB/s. The faster one is the limit.",
    ]
    lines += [f"Skipped: {name} ({why})." for name, why in found.left_out.items()]
    return "\n".join(lines)


def verdicts(title: str, found: Measured) -> Iterator[str]:
    """Yield a line for each target on these shapes: met or missed."""
    for (row, other), limits in AT_MOST.items():
        ratio = _ratio(found, row, other)
        yield from _verdict(title, f"{row}, time / {other}", ratio, limits, -1)
    for (row, other), limits in TIMES_FASTER.items():
        slower = _fastest_other(found) if other == FASTEST_OTHER else other
        ratio = _ratio(found, slower, row)
        yield from _verdict(title, f"{row}, times faster than {other}", ratio, limits)
    for row, limits in EXTRA_AT_MOST.items():
        extra = found.peaks[row] / found.size if row in found.peaks else None
        yield from _verdict(title, f"{row}, extra memory / model", extra, limits, -1)


def _ratio(found: Measured, row: str, other: str) -> float | None:
    known = row in found.times and other in found.times
    return found.ratio(row, other) if known else None


def _fastest_other(found: Measured) -> str:
    """Name the fastest LARS of another package; hooks have fewer memory passes."""
    others = {
        found.ratio(name, BASELINE): name
        for name in found.times
        if ROWS[name].kind == "other" and ROWS[name].passes == ROWS[NATIVE].passes
    }
    return others[min(others)] if others else ""


def _verdict(
    title: str,
    what: str,
    value: float | None,
    limits: Mapping[str, float],
    sign: int = 1,
) -> Iterator[str]:
    limit = limits.get(title)
    if limit is None:
        return
    wish = f"at {'least' if sign > 0 else 'most'} {limit:g}"
    if value is None:
        yield f"- not measured: {title}, {what} ({wish})"
    else:
        met = "met" if sign * value >= sign * limit else "MISSED"
        yield f"- {met}: {title}, {what}: {value:.3g} ({wish})"


def write(results: dict[str, Measured], out: Path, about: dict[str, Any]) -> None:
    """Write the results as Markdown, JSON and PNG, and print the targets."""
    out.mkdir(parents=True, exist_ok=True)
    said = [line for item in results.items() for line in verdicts(*item)]
    facts = ", ".join(f"{key}: {value}" for key, value in about.items()) + "."
    print(facts, *said, sep="\n")
    tables = [table(title, found) for title, found in results.items()]
    page = [facts, *tables, "### Targets", "\n".join(said)]
    (out / "step.md").write_text("\n\n".join(page) + "\n")
    numbers = {**about, "shapes": {}, "figures to reach": said}
    for title, found in results.items():
        numbers["shapes"][title] = {
            "GB_per_s": {row: bandwidth(found, row) / 1e9 for row in (COPY, SCALE)},
            "rows": summary(found),
            "left_out": found.left_out,
            "versions": found.versions,
        }
    (out / "step.json").write_text(json.dumps(numbers, indent=1) + "\n")
    plot(results).savefig(out / "step.png")


def plot(results: dict[str, Measured]) -> Figure:
    """Draw the ratios as bars, one panel for each set of shapes."""
    figures = [summary(found) for found in results.values()]
    names = sorted(
        {name for rows in figures for name in rows},
        key=lambda name: np.mean(
            [np.log(r[name]["ratio"]) for r in figures if name in r]
        ),
    )
    size = (3 + 2.4 * len(figures), 1 + 0.23 * len(names))
    figure = Figure(size, dpi=150, layout="constrained")
    panels = figure.subplots(1, len(figures), sharey=True, squeeze=False)[0]
    for ax, title, rows in zip(panels, results, figures, strict=True):
        _draw(ax, names, rows)
        ax.set_title(title, fontsize="medium")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.supxlabel("time of a step, torch's fused SGD = 1", fontsize="medium")
    patches = [Patch(color=colour, label=label) for colour, label in STYLE.values()]
    figure.legend(handles=patches, loc="outside upper center", ncols=len(patches))
    return figure


def _draw(ax: Axes, names: list[str], rows: dict[str, dict[str, float]]) -> None:
    for y, name in enumerate(names):
        if name in rows:
            ratio = rows[name]["ratio"]
            ax.barh(y, ratio, color=STYLE[ROWS[name].kind][0])
            ax.annotate(
                f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}",
                (ratio, y),
                (3, 0),
                textcoords="offset points",
                va="center",
                fontsize="small",
            )
    ax.set_xscale("log")
    ax.axvline(1, color="black", linewidth=0.8)
    ax.margins(x=0.25, y=0.01)
    ax.set_xlim(left=min(0.3, 0.5 * min(row["ratio"] for row in rows.values())))
    ax.spines[["top", "right"]].set_visible(False)
