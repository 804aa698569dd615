"""`larskit study`: compare optimizers over batch sizes, learning rates and seeds."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from larskit.app import InputError, results
from larskit.app.data import Data, read
from larskit.app.plot import plot
from larskit.app.ranks import here
from larskit.app.results import Cell, Curves, Point
from larskit.app.settings import RECIPES, Settings
from larskit.app.train import prepare, progress_bar, stopping
from larskit.app.trainer import Trainer, check

POLL = 0.2
USABLE = 0.01


def grid(
    given: dict[str, Any],
    *,
    models: Sequence[str],
    optimizers: Sequence[str],
    batch_sizes: Sequence[int],
    lrs: Iterable[tuple[str, Sequence[float]]] = (),
    seeds: int,
) -> list[Settings]:
    """Return the settings of every training of a study.

    Parameters
    ----------
    given : dict
        Arguments of `Settings` that all share; what means nothing to an optimizer is
        omitted for it.
    models, optimizers : sequence of str
        As in `Settings`.
    batch_sizes : sequence of int
        Images per step.
    lrs : iterable of (str, sequence of float)
        Learning rates of an optimizer, in place of those in its recipe.
    seeds : int
        How many trainings of each kind, with seeds from `Settings.seed` on.

    Returns
    -------
    list of Settings
        Seed by seed: a study that is stopped has seen the whole grid.
    """
    own = dict(lrs)
    for optimizer in own:
        if optimizer not in optimizers:
            raise InputError(
                f"--lrs names {optimizer!r}, which is not among --optimizers "
                f"{' '.join(optimizers)}"
            )
    first = Settings(**given).seed
    cells = product(range(first, first + seeds), models, batch_sizes, optimizers)
    return [
        Settings(
            **{
                "threads": 1,
                **_meant_for(optimizer, given),
                "model": model,
                "optimizer": optimizer,
                "batch_size": batch_size,
                "lr": lr,
                "seed": seed,
            }
        )
        for seed, model, batch_size, optimizer in cells
        for lr in own.get(optimizer, RECIPES[optimizer].lrs)
    ]


def _meant_for(optimizer: str, given: dict[str, Any]) -> dict[str, Any]:
    if RECIPES[optimizer].trust_coefficient is not None:
        return given
    return {k: v for k, v in given.items() if k != "trust_coefficient"}


def study(
    cells: Sequence[Settings], out: str, *, jobs: int, console: Console | None = None
) -> int:
    """Train with each of many settings, and show how they compare.

    The folder gets ``results.json``, complete after every training, and
    ``study.png``. A training that ``results.json`` holds already is not run again.

    Parameters
    ----------
    cells : sequence of Settings
        As `grid` returns them.
    out : str
        The folder; made if need be.
    jobs : int
        How many processes train at a time.
    console : rich.console.Console, optional
        Where to show progress and table.

    Returns
    -------
    int
        0 when all is done; 1 when a process died; 128 plus the signal's number when
        SIGINT or SIGTERM stopped it.

    Raises
    ------
    InputError
        Before anything is written.
    """
    if here().launched:
        raise InputError(
            "larskit study starts processes of its own, see --jobs: run it without "
            "torchrun"
        )
    console, folder = console or Console(), Path(out)
    path = folder / results.FILE
    known = _by_identity(results.load(path)) if path.exists() else {}
    data = read(cells[0].data, cells[0].image_size)
    for settings in cells:
        check(settings, data, here())
    wanted = {results.identity(asdict(s), data.fingerprint): s for s in cells}
    missing = [s for key, s in wanted.items() if key not in known]
    prepare(folder)

    def keep(cell: Cell) -> None:
        known.update(_by_identity([cell]))
        results.save(path, known.values())

    code = 0
    if missing:
        with _display(len(wanted), len(missing), console) as show:
            code = _run(missing, data, min(jobs, len(missing)), keep, show)
    if code:
        why = "A process died, perhaps out of memory. " if code == 1 else ""
        console.print(
            f"{why}{sum(key in known for key in wanted)} of {len(wanted)} trainings "
            f"are in {path}; the same command resumes there.",
            soft_wrap=True,
        )
        return code
    curves = results.curves(known[key] for key in wanted)
    console.print(table(curves))
    plot(curves, folder / "study.png")
    console.print(f"All of it is in {path}, drawn in {folder / 'study.png'}")
    return 0


def table(curves: Curves) -> Table:
    """Show the best rate of each optimizer, and the rates that are nearly as good."""
    headings = (
        "model",
        "batch",
        "optimizer",
        "best",
        "over seeds",
        "at lr",
        "good lrs",
    )
    made = Table(
        *headings,
        title="Accuracy on the test images in %",
        caption=f"good lrs: within {USABLE:.0%} of the best that any optimizer does",
    )
    for (model, batch_size), optimizers in curves.items():
        top = max(point.mean for points in optimizers.values() for point in points)
        for optimizer, points in optimizers.items():
            best = max(points, key=lambda point: point.mean)
            made.add_row(
                model,
                str(batch_size),
                optimizer,
                f"{100 * best.mean:.2f}",
                f"{100 * best.low:.1f}-{100 * best.high:.1f}",
                f"{best.lr:g}",
                _ranges(points, top - USABLE),
            )
        made.add_section()
    return made


def _ranges(points: Iterable[Point], floor: float) -> str:
    """Say between which rates the mean accuracy is at least `floor`."""
    runs = groupby(points, lambda point: point.mean >= floor)
    rates = [[f"{point.lr:g}" for point in run] for good, run in runs if good]
    return ", ".join("-".join(dict.fromkeys((r[0], r[-1]))) for r in rates) or "none"


def _by_identity(cells: Iterable[Cell]) -> dict[str, Cell]:
    return {results.identity(cell["settings"], cell["data"]): cell for cell in cells}


def _run(
    missing: Sequence[Settings],
    data: Data,
    jobs: int,
    keep: Callable[[Cell], None],
    show: Callable[[Cell], None],
) -> int:
    """Train in `jobs` processes, and hand each result on; return the exit code."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(jobs, context, _begin, (data, stop))
    with stopping() as signals:
        with _deaf():
            pending = {pool.submit(_measure, settings) for settings in missing}
        try:
            while pending and not signals:
                done, pending = wait(pending, POLL, FIRST_COMPLETED)
                for cell in filter(None, [future.result() for future in done]):
                    keep(cell)
                    show(cell)
        except BrokenProcessPool:
            return 1
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return 128 + signals[0] if pending else 0


@contextmanager
def _deaf() -> Iterator[None]:
    """Ignore Ctrl-C; processes that start meanwhile ignore it all their life."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_given: dict[str, Any] = {}


def _begin(data: Data, stop: Any) -> None:
    """Prepare a process to train many times."""
    _given.update(data=data, stop=stop)


def _measure(settings: Settings) -> Cell | None:
    """Train once; None if stopped."""
    begun = time.perf_counter()
    trainer = Trainer(settings, _given["data"], test_last=True)
    for _ in trainer.run():
        if _given["stop"].is_set():
            return None
    last = trainer.history[-1]
    return {
        "settings": asdict(settings),
        "data": trainer.data.fingerprint,
        **{name: last[name] for name in results.MEASURES},
        "seconds": round(time.perf_counter() - begun, 3),
    }


@contextmanager
def _display(
    total: int, missing: int, console: Console
) -> Iterator[Callable[[Cell], None]]:
    """Show a bar on a terminal, elsewhere one line per training."""
    with progress_bar(console) as bar:
        task = bar.add_task("", total=total, completed=total - missing)

        def show(cell: Cell) -> None:
            line = "{model}, {batch_size}, {optimizer}, lr {lr:g}, seed {seed}"
            line = line.format(**cell["settings"]) + f": {cell['test_accuracy']:.2%}"
            bar.update(task, advance=1, description=line)
            if bar.disable:
                console.print(line)

        yield show
