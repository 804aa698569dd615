"""The code of the README runs, and the tree in the docs is that of the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
WITH_CODE = [
    document
    for document in sorted((ROOT / "docs").glob("*.md"))
    if "```python" in document.read_text()
]


def test_the_code_runs_in_the_order_it_stands(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    ratio, table = capsys.readouterr().out.split("\n", 1)
    assert 0 < float(ratio) < 1
    assert re.search(r"^2\.weight +2x16 +yes +yes ", table, re.MULTILINE)
    assert "0.9" in table  # the last lines are the kernel


@pytest.mark.parametrize("document", WITH_CODE, ids=lambda document: document.name)
def test_the_code_of_a_document_runs(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)
    scope = {}
    for block in blocks:
        exec(compile(block, document.name, "exec"), scope)
    assert len(scope) > len(blocks)


def test_the_tree_names_what_there_is():
    tree = (ROOT / "docs" / "architecture.md").read_text()
    tree = tree.split("src/larskit/\n")[1].split("```")[0]
    listed = set(re.findall(r"^  (\w+(?:\.py|/))", tree, re.MULTILINE))
    package = ROOT / "src" / "larskit"
    there = {
        path.name + ("/" if path.is_dir() else "")
        for path in package.iterdir()
        if not path.name.startswith("_") and path.name != "py.typed"
    }
    assert listed == there


def test_links_lead_somewhere():
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        links = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
        for link in links:
            assert (document.parent / link).exists(), f"{document.name}: {link}"
