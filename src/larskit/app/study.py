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
from multiprocessing.synchronize import Event
from pathlib import Path

from rich.console import Console
from rich.table import Table

from larskit.app import InputError, results
from larskit.app.data import Data, read
from larskit.app.plot import plot
from larskit.app.ranks import current_ranks
from larskit.app.results import Curves, Point, Result
from larskit.app.settings import RECIPES, Arguments, Settings
from larskit.app.train import catch_signals, make_folder, progress_bar
from larskit.app.trainer import Trainer, select_device

# Seconds between two looks at the signals.
POLL_SECONDS = 0.2
# The table lists the learning rates with an accuracy this close to the best.
NEAR_BEST = 0.01


def grid(
    given: Arguments,
    *,
    models: Sequence[str],
    optimizers: Sequence[str],
    batch_sizes: Sequence[int],
    lrs: Iterable[tuple[str, Sequence[float]]] = (),
    seeds: int,
) -> list[Settings]:
    """Return the settings of every run of a study.

    Parameters
    ----------
    given : dict
        Arguments of `Settings` for all runs. A trust coefficient is dropped for
        optimizers without one.
    models, optimizers : sequence of str
        Values of `Settings.model` and `Settings.optimizer`.
    batch_sizes : sequence of int
        Images per step.
    lrs : iterable of (str, sequence of float)
        An optimizer and its learning rates, which replace those of its recipe.
    seeds : int
        The number of seeds. They start at `Settings.seed`.

    Returns
    -------
    list of Settings
        Ordered by seed, so that a study that is stopped early covers the whole grid.
    """
    custom = dict(lrs)
    for optimizer in custom:
        if optimizer not in optimizers:
            raise InputError(
                f"--lrs has rates for {optimizer!r}, which is not among --optimizers "
                f"{' '.join(optimizers)}: add it there, or remove its rates"
            )
    first = Settings(**given).seed
    runs = product(range(first, first + seeds), models, batch_sizes, optimizers)
    return [
        Settings(
            **{
                "threads": 1,
                **_applicable(optimizer, given),
                "model": model,
                "optimizer": optimizer,
                "batch_size": batch_size,
                "lr": lr,
                "seed": seed,
            }
        )
        for seed, model, batch_size, optimizer in runs
        for lr in custom.get(optimizer, RECIPES[optimizer].lrs)
    ]


def _applicable(optimizer: str, given: Arguments) -> Arguments:
    """Drop a trust coefficient if the optimizer has none."""
    if RECIPES[optimizer].trust_coefficient is not None:
        return given
    return {k: v for k, v in given.items() if k != "trust_coefficient"}


def study(
    runs: Sequence[Settings], out: str, *, jobs: int, console: Console | None = None
) -> int:
    """Train with each of the settings, then tabulate and plot the results.

    ``results.json`` is rewritten atomically after every run, and ``study.png`` when all
    are finished. Runs whose result is already in ``results.json`` are skipped.

    Parameters
    ----------
    runs : sequence of Settings
        The settings of each run, as `grid` returns them.
    out : str
        The folder. It is created if it does not exist.
    jobs : int
        The number of processes that train in parallel.
    console : rich.console.Console, optional
        The console that shows the progress and the table.

    Returns
    -------
    int
        0 if all runs finished; 1 if a process died; 128 plus the signal number if
        SIGINT or SIGTERM stopped the study.

    Raises
    ------
    InputError
        The settings, data or folder cannot be used. Nothing has been written.
    """
    if current_ranks().launched:
        raise InputError(
            "larskit study was started by torchrun, but it starts its own processes: "
            "run it without torchrun, and set their number with --jobs"
        )
    console, folder = console or Console(), Path(out)
    path = folder / results.FILE
    finished = _by_key(results.load(path)) if path.exists() else {}
    data = read(runs[0].data, runs[0].image_size)
    for settings in runs:
        select_device(settings, data, current_ranks())
    wanted = {results.run_key(asdict(s), data.fingerprint): s for s in runs}
    missing = [s for key, s in wanted.items() if key not in finished]
    make_folder(folder)

    def record(result: Result) -> None:
        finished.update(_by_key([result]))
        results.save(path, finished.values())

    code = 0
    if missing:
        with _progress(len(wanted), len(missing), console) as show:
            code = _run(missing, data, min(jobs, len(missing)), record, show)
    if code:
        count = sum(key in finished for key in wanted)
        reason = "A process died, possibly out of memory. " if code == 1 else ""
        console.print(
            f"{reason}{count} of {len(wanted)} training runs are in {path}. Repeat the "
            "same command to continue.",
            soft_wrap=True,
        )
        return code
    curves = results.curves(finished[key] for key in wanted)
    console.print(table(curves))
    plot(curves, folder / "study.png")
    console.print(f"Results: {path}; plot: {folder / 'study.png'}")
    return 0


def table(curves: Curves) -> Table:
    """Tabulate the best learning rate of each optimizer, and those close to it."""
    headings = (
        "model",
        "batch",
        "optimizer",
        "best",
        "over seeds",
        "at lr",
        "good lrs",
    )
    tabulated = Table(
        *headings,
        title="Test accuracy in %",
        caption=f"good lrs: accuracy within {NEAR_BEST:.0%} of the best optimizer",
    )
    for (model, batch_size), optimizers in curves.items():
        top = max(point.mean for points in optimizers.values() for point in points)
        for optimizer, points in optimizers.items():
            best = max(points, key=lambda point: point.mean)
            tabulated.add_row(
                model,
                str(batch_size),
                optimizer,
                f"{100 * best.mean:.2f}",
                f"{100 * best.low:.1f}-{100 * best.high:.1f}",
                f"{best.lr:g}",
                _ranges(points, top - NEAR_BEST),
            )
        tabulated.add_section()
    return tabulated


def _ranges(points: Iterable[Point], floor: float) -> str:
    """Format the ranges of rates whose mean accuracy is at least `floor`."""
    runs = groupby(points, lambda point: point.mean >= floor)
    rates = [[f"{point.lr:g}" for point in run] for good, run in runs if good]
    return ", ".join("-".join(dict.fromkeys((r[0], r[-1]))) for r in rates) or "none"


def _by_key(found: Iterable[Result]) -> dict[str, Result]:
    return {results.run_key(x["settings"], x["data"]): x for x in found}


def _run(
    missing: Sequence[Settings],
    data: Data,
    jobs: int,
    record: Callable[[Result], None],
    show: Callable[[Result], None],
) -> int:
    """Train in `jobs` processes, record each result, and return the exit code."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (data, stop))
    with catch_signals() as signals:
        with _ignoring_sigint():
            pending = {pool.submit(_train, settings) for settings in missing}
        try:
            while pending and not signals:
                done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
                for result in filter(None, [future.result() for future in done]):
                    record(result)
                    show(result)
        except BrokenProcessPool:
            return 1
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    return 128 + signals[0] if pending else 0


@contextmanager
def _ignoring_sigint() -> Iterator[None]:
    """Ignore SIGINT. Processes that start inside the block inherit this for good."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


_data: Data
_stop: Event


def _start_worker(data: Data, stop: Event) -> None:
    """Store what all runs of a worker process share."""
    global _data, _stop
    _data, _stop = data, stop


def _train(settings: Settings) -> Result | None:
    """Train once in a worker process; return None if the study is stopped."""
    started = time.perf_counter()
    trainer = Trainer(settings, _data, test_last=True)
    for _ in trainer.run():
        if _stop.is_set():
            return None
    last = trainer.history[-1]
    return {
        "settings": asdict(settings),
        "data": trainer.data.fingerprint,
        "test_accuracy": last["test_accuracy"],
        "test_loss": last["test_loss"],
        "train_accuracy": last["train_accuracy"],
        "train_loss": last["train_loss"],
        "seconds": round(time.perf_counter() - started, 3),
    }


@contextmanager
def _progress(
    total: int, missing: int, console: Console
) -> Iterator[Callable[[Result], None]]:
    """Show a progress bar on a terminal, and one line per run elsewhere."""
    with progress_bar(console) as bar:
        task = bar.add_task("", total=total, completed=total - missing)

        def show(result: Result) -> None:
            line = "{model}, {batch_size}, {optimizer}, lr {lr:g}, seed {seed}"
            line = (
                line.format(**result["settings"]) + f": {result['test_accuracy']:.2%}"
            )
            bar.update(task, advance=1, description=line)
            if bar.disable:
                console.print(line)

        yield show
