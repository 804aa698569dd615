"""``python -m larskit`` runs the command ``larskit``."""

from larskit.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
