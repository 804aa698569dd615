"""Train an image classifier, compare optimizers, or inspect this installation."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeAlias, get_args, get_origin

from larskit.cores import usable_cores

# The values of the options of a command, by name.
Arguments = dict[str, Any]
Command = Callable[[Arguments], int]
Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"

# The packages of the extra ``app``.
_APP_PACKAGES = ("matplotlib", "PIL", "rich", "sklearn", "torch")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command-line arguments; by default those of the process.

    Returns
    -------
    int
        The exit code: 0 for success; 1 if the training diverged or the operating system
        reported an error; 2 for invalid input, with the reason on stderr; 130 or 143 if
        SIGINT or SIGTERM stopped the command.
    """
    try:
        if not _under_torchrun():
            return _run(arguments)
        from larskit.app.ranks import process_group

        with process_group():
            return _run(arguments)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _APP_PACKAGES:
            raise
        reason = f"{package} is needed, but not installed"
        return _fail(f"{reason}: pip install 'larskit[app]'", 2)
    except OSError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return _fail("stopped", 130)


def _under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _run(arguments: Sequence[str] | None) -> int:
    from larskit.app import InputError

    try:
        args = vars(_parser().parse_args(arguments))
        return args.pop("run")(args)
    except InputError as error:
        return _fail(str(error), 2)


def _fail(message: str, code: int) -> int:
    """Print an error message and return the exit code.

    Errors of code 1 can differ between processes. All others occur on every process,
    and only rank 0 prints them.
    """
    if code == 1 or not _under_torchrun() or os.environ["RANK"] == "0":
        print(f"larskit: {message}", file=sys.stderr)
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
    _command(
        commands,
        "doctor",
        "Show this machine, the available engines and the installed packages.",
        _doctor,
    )
    return parser


def _command(
    commands: Commands, name: str, text: str, run: Command
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_train(commands: Commands) -> None:
    text = (
        "Train an image classifier. For N processes, run "
        "torchrun --nproc-per-node N -m larskit train ..."
    )
    parser = _command(commands, "train", text, _train)
    _add_settings(parser)
    parser.add_argument("--out", **_out("runs/train"))
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="continue the training run in --out, with its settings",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="replace the training run in --out"
    )
    parser.add_argument(
        "--shard",
        choices=("fsdp2",),
        help="shard weights, gradients and optimizer state over the processes of "
        "torchrun (default: replicate them with DDP)",
    )
    parser.add_argument(
        "--best-of",
        metavar="RESULTS",
        help="results.json of a study: use its best settings for options not given",
    )


def _add_study(commands: Commands) -> None:
    from larskit.app.settings import RECIPES, Model, Optimizer, Settings

    text = "Compare optimizers across batch sizes, learning rates and seeds."
    parser = _command(commands, "study", text, _study)
    _add_settings(parser, without=("model", "optimizer", "batch_size", "lr"))

    def several(flag: str, default: list[Any], help: str, **options: Any) -> None:
        parser.add_argument(flag, nargs="+", default=default, help=help, **options)

    several("--models", [Settings.model], "default: convnet", choices=get_args(Model))
    several(
        "--optimizers",
        ["lars", "sgd"],
        "default: lars sgd",
        choices=get_args(Optimizer),
    )
    several("--batch-sizes", [64, 256], "default: 64 256", type=int, metavar="N")
    default_rates = " ".join(
        f"{name}={_list(recipe.lrs)}" for name, recipe in RECIPES.items()
    )
    several(
        "--lrs",
        [],
        f"learning rates (default: {default_rates})",
        type=_optimizer_rates,
        metavar="OPTIMIZER=LR,LR,...",
    )
    count: dict[str, Any] = {"type": _positive_integer, "metavar": "N"}
    add = parser.add_argument
    add("--seeds", default=3, help="seeds per combination (default: 3)", **count)
    text = "parallel training processes (default: one per core)"
    add("--jobs", default=usable_cores(), help=text, **count)
    add("--out", **_out("runs/study"))


def _out(default: str) -> dict[str, Any]:
    text = "output folder (default: %(default)s)"
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
            **_type_options(field.type),
        )


def _type_options(annotation: Any) -> dict[str, Any]:
    """Return the argparse options that describe the type of a field of `Settings`."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    # The type of an optional field is its first alternative: ``int | None``.
    parse = next(iter(get_args(annotation)), annotation)
    return {"type": parse, "metavar": parse.__name__.upper()}


def _positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"must be an integer of at least 1, got {text}"
        )
    return int(text)


def _optimizer_rates(text: str) -> tuple[str, list[float]]:
    """Parse ``sgd=0.1,0.2``."""
    optimizer, _, rates = text.partition("=")
    try:
        return optimizer, [float(rate) for rate in rates.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must have the form sgd=0.1,0.2, got {text}"
        ) from None


def _list(numbers: Sequence[float]) -> str:
    return ",".join(f"{x:g}" for x in numbers)


def _train(args: Arguments) -> int:
    from larskit.app.results import best
    from larskit.app.train import train

    names = ("out", "resume", "overwrite", "shard")
    options = {name: args.pop(name) for name in names}
    if results := args.pop("best_of", None):
        args = best(Path(results), args)
    return train(args, **options)


def _study(args: Arguments) -> int:
    from larskit.app.study import grid, study

    options = {name: args.pop(name) for name in ("out", "jobs")}
    names = ("models", "optimizers", "batch_sizes", "lrs", "seeds")
    axes = {name: args.pop(name) for name in names}
    return study(grid(args, **axes), **options)


def _doctor(args: Arguments) -> int:
    from larskit.doctor import report

    print(report())
    return 0
