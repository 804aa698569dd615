"""Who may import whom, read from the source."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "larskit"
FILES = sorted(SOURCE.rglob("*.py"))

# What each part may import of ours, anywhere in its file.
CORE = {
    "arrays",
    "cores",
    "names",
    "config",
    "rule",
    "select",
    "tree",
    "layers",
    "state",
}
MACHINERY = CORE | {"engines", "layout", "norms", "functional", "hook", "containers"}
ALLOWED = {
    "config": {"arrays"},
    "arrays": set(),
    "cores": set(),
    "names": set(),
    "state": {"arrays", "config", "functional", "layers", "names", "select", "tree"},
    "layers": {"arrays", "config", "select", "tree"},
    "containers": {"arrays", "functional", "tree"},
    "layout": {"arrays"},
    "rule": {"arrays", "config"},
    "select": {"config"},
    "tree": {"arrays", "names"},
    "presets": {"config"},
    "norms": {"rule", "arrays", "config", "layout"},
    "engines": {"rule", "norms", "arrays", "config", "layout", "_native"},
    "functional": CORE - {"state"} | {"engines", "layout", "norms"},
    "hook": CORE | {"engines", "layout", "norms", "jax"},
    "torch": MACHINERY,
    "jax": MACHINERY,
    "keras": MACHINERY,
    "monitor": set(),
    "report": {"monitor"},
    "doctor": {"engines"},
    "app": MACHINERY | {"torch", "presets", "monitor", "report"},
    "__init__": {
        "functional",
        "hook",
        "containers",
        "torch",
        "jax",
        "keras",
        "presets",
    },
    "__main__": {"cli"},
}
FRAMEWORKS = {
    "torch", "jax", "jaxlib", "keras", "tensorflow", "paddle", "cupy", "optax", "flax",
    "brainpy", "chainer", "ivy", "triton",
}  # fmt: skip
AT_TOP = {
    "torch": {"torch"},
    "jax": {"jax"},
    "keras": {"keras"},
    "app": {"torch"},
    "engines.foreach": {"torch"},
    "engines.triton": {"torch", "triton"},
    "engines.xla": {"jax"},
    "norms.dtensor": {"torch"},
    "norms.mesh": {"jax"},
}


def module(file: Path) -> str:
    name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def part(name: str) -> str:
    return name.partition(".")[0]


def imports(node: ast.AST, top: bool = True):
    """Yield (dotted name, whether it stands at the top of the file)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            if child.module == "larskit":
                yield from ((f"larskit.{alias.name}", top) for alias in child.names)
            else:
                yield child.module or "", top
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(child, top and not inside)


@pytest.mark.parametrize("file", FILES, ids=module)
def test_own_imports(file):
    here = part(module(file))
    for name, top in imports(ast.parse(file.read_text())):
        root, _, rest = name.partition(".")
        if root != "larskit" or part(rest) == here:
            continue
        if here == "cli":
            assert not top or part(rest) in CORE, f"cli imports {name} at its top"
            continue
        assert part(rest) in ALLOWED[here], f"{module(file)} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=module)
def test_frameworks_are_imported_where_their_name_stands(file):
    name = module(file)
    above = name.rpartition(".")[0]
    allowed = set().union(*(AT_TOP.get(x, set()) for x in (name, above, part(name))))
    for imported, top in imports(ast.parse(file.read_text())):
        if top and part(imported) in FRAMEWORKS:
            assert part(imported) in allowed, f"{name} imports {imported} at its top"


def test_no_drawers():
    drawers = {"utils", "helpers", "base", "common", "core", "types"}
    assert not drawers & {part for file in FILES for part in module(file).split(".")}


def test_the_rules_see_a_violation():
    tree = ast.parse("import torch\ndef f():\n    from larskit import cli")
    assert list(imports(tree)) == [("torch", True), ("larskit.cli", False)]
