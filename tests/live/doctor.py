"""`larskit doctor` where something about Python is changed. Run by test_doctor.py."""

import sys


def without_torch() -> None:
    sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    from larskit.cli import main

    sys.exit(main(["doctor"]))


def imported() -> None:
    """Print which of the packages it reports on are loaded by that."""
    from larskit.doctor import report

    report()
    heavy = {"jax", "keras", "tensorflow", "paddle", "sklearn", "rich", "matplotlib"}
    print("imported ", sorted(heavy & set(sys.modules)))


if __name__ == "__main__":
    globals()[sys.argv[1]]()
