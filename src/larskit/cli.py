"""The command ``larskit``: train a classifier, study optimizers, look for faults."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from larskit.cores import usable_cores

_EXTRA = ("matplotlib", "PIL", "rich", "sklearn", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process where None.

    Returns
    -------
    int
        The exit code: 0 done; 1 the training diverged, or the system failed; 2 the
        input cannot be used, and one sentence on stderr says why; 130 and 143 stopped
        by Ctrl-C or SIGTERM.
    """
    try:
        if not _launched():
            return _run(arguments)
        from larskit.app.ranks import joined

        with joined():
            return _run(arguments)
    except ModuleNotFoundError as why:
        package = (why.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        needed = f"{package} is needed, but not installed"
        return _complain(f"{needed}: pip install 'larskit[app]'", 2)
    except OSError as why:
        return _complain(str(why), 1)
    except KeyboardInterrupt:
        return _complain("stopped", 130)


def _launched() -> bool:
    """Whether torchrun has started this process, and others beside it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _run(arguments: Sequence[str] | None) -> int:
    from larskit.app import InputError

    try:
        args = vars(_parser().parse_args(arguments))
        return args.pop("run")(args)
    except InputError as why:
        return _complain(str(why), 2)


def _complain(sentence: str, code: int) -> int:
    """Print a sentence; what all processes have in common, the first one alone."""
    if code == 1 or not _launched() or os.environ["RANK"] == "0":
        print(f"larskit: {sentence}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        from larskit.app import InputError

        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="larskit", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_study(commands)
    _command(commands, "doctor", "Print what this installation can do.", _doctor)
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_train(commands: Any) -> None:
    text = (
        "Train a classifier of images, in one process or in several: "
        "torchrun --nproc-per-node N -m larskit train ..."
    )
    parser = _command(commands, "train", text, _train)
    _add_settings(parser)
    parser.add_argument("--out", **_out("runs/train"))
    there = parser.add_mutually_exclusive_group()
    there.add_argument(
        "--resume",
        action="store_true",
        help="go on with the training in --out, with its settings",
    )
    there.add_argument(
        "--overwrite", action="store_true", help="replace the training in --out"
    )
    parser.add_argument(
        "--shard",
        choices=("fsdp2",),
        help="spread weights, gradients and momentum over the processes of torchrun "
        "(default: each holds all of them, DDP)",
    )
    parser.add_argument(
        "--best-of",
        metavar="RESULTS",
        help="results.json of a study: take its best settings where none are given",
    )


def _add_study(commands: Any) -> None:
    from larskit.app.settings import RECIPES, Model, Optimizer, Settings

    text = "Compare optimizers over batch sizes, learning rates and seeds."
    parser = _command(commands, "study", text, _study)
    _add_settings(parser, without=("model", "optimizer", "batch_size", "lr"))

    def several(flag: str, default: list[Any], help: str, **how: Any) -> None:
        parser.add_argument(flag, nargs="+", default=default, help=help, **how)

    several("--models", [Settings.model], "default: convnet", choices=get_args(Model))
    several(
        "--optimizers",
        ["lars", "sgd"],
        "default: lars sgd",
        choices=get_args(Optimizer),
    )
    several("--batch-sizes", [64, 256], "default: 64 256", type=int, metavar="N")
    own = " ".join(f"{name}={_list(recipe.lrs)}" for name, recipe in RECIPES.items())
    several(
        "--lrs",
        [],
        f"learning rates (default: {own})",
        type=_rates,
        metavar="OPTIMIZER=LR,LR,...",
    )
    counts = {"type": _count, "metavar": "N"}
    add = parser.add_argument
    add("--seeds", default=3, help="trainings of a kind (default: 3)", **counts)
    jobs = usable_cores()
    add("--jobs", default=jobs, help="at a time (default: the cores)", **counts)
    add("--out", **_out("runs/study"))


def _out(default: str) -> dict[str, Any]:
    text = "folder for the result (default: %(default)s)"
    return {"default": default, "metavar": "DIR", "help": text}


def _add_settings(parser: argparse.ArgumentParser, without: Sequence[str] = ()) -> None:
    """Add an option for every field of `Settings`."""
    from larskit.app.settings import Settings

    for field in fields(Settings):
        if field.name in without:
            continue
        text = field.metadata["help"]
        if field.default is not None:
            text += f" (default: {field.default})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            default=argparse.SUPPRESS,
            help=text,
            **_kind(field.type),
        )


def _kind(annotation: Any) -> dict[str, Any]:
    """Say to argparse what a field of `Settings` takes."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    kind = next(iter(get_args(annotation)), annotation)
    return {"type": kind, "metavar": kind.__name__.upper()}


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 1, got {text}"
        )
    return int(text)


def _rates(text: str) -> tuple[str, list[float]]:
    """Parse ``sgd=0.1,0.2``."""
    optimizer, _, rates = text.partition("=")
    try:
        return optimizer, [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be like sgd=0.1,0.2, got {text}"
        ) from None


def _list(numbers: Sequence[float]) -> str:
    return ",".join(f"{x:g}" for x in numbers)


def _train(args: dict[str, Any]) -> int:
    from larskit.app.results import best
    from larskit.app.train import train

    names = ("out", "resume", "overwrite", "shard")
    flags = {name: args.pop(name) for name in names}
    if results := args.pop("best_of", None):
        args = best(Path(results), args)
    return train(args, **flags)


def _study(args: dict[str, Any]) -> int:
    from larskit.app.study import grid, study

    flags = {name: args.pop(name) for name in ("out", "jobs")}
    axes = ("models", "optimizers", "batch_sizes", "lrs", "seeds")
    axes = {name: args.pop(name) for name in axes}
    return study(grid(args, **axes), **flags)


def _doctor(args: dict[str, Any]) -> int:
    from larskit.doctor import report

    print(report())
    return 0
