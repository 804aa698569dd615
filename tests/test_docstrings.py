"""The examples of the docstrings run, and give what stands below them."""

import doctest
import importlib
from importlib.util import find_spec
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = [file for file in sorted(SOURCE.rglob("*.py")) if ">>> " in file.read_text()]
FRAMEWORKS = ("torch", "jax", "keras")


def module(file: Path) -> str:
    name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=module)
def test_the_examples_run(file, tmp_path, monkeypatch):
    text = file.read_text()
    for framework in FRAMEWORKS:
        if f"import {framework}" in text and not find_spec(framework):
            pytest.skip(f"{framework} is missing")
    monkeypatch.chdir(tmp_path)
    failed, tried = doctest.testmod(importlib.import_module(module(file)))
    assert tried == text.count(">>> ")  # none is where doctest does not look
    assert not failed
