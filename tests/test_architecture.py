"""Who may import whom, read from the source; imports inside functions count as well."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "larskit"

# What each module may import of ours, by full names. A row "package.*" is for the
# modules of a package that have no row of their own; "x" does not allow "x.y".
ALLOWED = {
    # the core: arrays, hyper-parameters, the rule, containers
    "arrays": set(),
    "cores": set(),
    "names": set(),
    "select": set(),
    "config": {"arrays"},
    "norm": {"arrays"},
    "rule": {"arrays", "config", "norm"},
    "tree": {"arrays", "names"},
    "leaves": {"arrays", "config", "select", "tree"},
    # where the rule runs: the contract, and the engines behind it
    "engines.contract": {"arrays", "config", "rule"},
    "engines.conditional": {"arrays", "config", "engines.contract"},
    "engines.layout": {"arrays", "engines.contract"},
    "engines": {
        *("arrays", "config", "engines.conditional", "engines.contract"),
        *("engines.foreach", "engines.native"),
    },
    "engines.reference": {
        *("arrays", "config", "engines.conditional", "engines.contract"),
        *("norm", "rule"),
    },
    "engines.foreach": {
        *("arrays", "config", "engines.conditional", "engines.contract"),
        *("engines.reference", "rule"),
    },
    "engines.native": {
        *("_native", "arrays", "config", "cores", "engines.conditional"),
        *("engines.contract", "engines.layout", "engines.reference", "rule"),
    },
    "engines.triton": {"engines.triton.group"},
    "engines.triton.group": {
        *("arrays", "config", "engines.conditional", "engines.contract"),
        *("engines.layout", "engines.triton.kernels", "rule"),
    },
    "engines.triton.kernels": {"config"},
    "norms": {"arrays"},
    "norms.dtensor": {"arrays", "engines"},
    "norms.mesh": set(),
    # the functions, the hook, containers with methods
    "functional": {"arrays", "config", "engines", "leaves", "select", "tree"},
    "hook": {
        *("arrays", "config", "engines", "jax.transform", "norms", "norms.dtensor"),
        "torch.attach",
    },
    "containers": {"arrays", "functional", "tree"},
    # state in files
    "state": {"state.files", "state.functional", "state.portable"},
    "state.files": {"arrays"},
    "state.portable": {"arrays", "config", "names", "state.files"},
    "state.functional": {
        *("arrays", "config", "functional", "leaves", "select", "state.portable"),
        "tree",
    },
    # the optimizers
    "torch": {"torch.backward", "torch.foreign", "torch.groups", "torch.optimizer"},
    "torch.groups": {"config", "select"},
    "torch.options": {"config", "engines"},
    "torch.bucket": {
        *("arrays", "config", "engines", "norms", "norms.dtensor", "rule"),
        "torch.options",
    },
    "torch.plan": {
        *("engines", "norm", "norms", "norms.dtensor", "torch.bucket"),
        "torch.options",
    },
    "torch.stepper": {
        *("config", "engines", "norms", "rule", "torch.options", "torch.plan"),
        "torch.turn",
    },
    "torch.attach": {
        *("config", "norms", "torch.options", "torch.plan", "torch.turn"),
    },
    "torch.turn": set(),
    "torch.backward": {
        *("config", "rule", "torch.options", "torch.plan", "torch.stepper"),
    },
    "torch.describe": {"config", "torch.options", "torch.plan"},
    "torch.foreign": {"arrays", "config", "torch.bucket", "torch.options"},
    "torch.portable": {
        *("arrays", "config", "norms", "norms.dtensor", "state", "state.portable"),
        *("torch.options", "torch.plan"),
    },
    "torch.optimizer": {
        *("arrays", "config", "norms", "rule", "select", "state", "torch.bucket"),
        *("torch.describe", "torch.foreign", "torch.options", "torch.portable"),
        "torch.stepper",
    },
    "jax": {"containers", "jax.optimizer", "jax.transform", "jax.variables"},
    "jax.variables": {"arrays"},
    "jax.graph": {"arrays", "jax.variables", "names", "state.files"},
    "jax.transform": {
        *("arrays", "config", "norm", "norms.mesh", "rule", "select", "tree"),
    },
    "jax.optimizer": {
        *("arrays", "config", "jax.graph", "jax.variables", "names", "rule"),
        *("state", "state.portable"),
    },
    "keras": {"keras.optimizer"},
    "keras.variables": {"arrays"},
    "keras.portable": {
        *("arrays", "config", "keras.variables", "state", "state.portable"),
    },
    "keras.optimizer": {
        *("arrays", "config", "keras.portable", "keras.variables", "names", "rule"),
        *("select", "state", "state.portable"),
    },
    # the command line, which uses only what is public
    "app": set(),
    "app.*": {"app", "app.*", "config", "cores", "state", "torch"},
    "doctor": {"engines"},
    "cli": {"app", "app.*", "cores", "doctor"},
    "__main__": {"cli"},
    "": {"containers", "functional", "hook"},
}
LIGHT = {"cores"}  # what cli may import at its top
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
    "norms.dtensor": {"torch"},
    "norms.mesh": {"jax"},
}


def module(file: Path) -> str:
    name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix("__init__").removesuffix(".")


MODULES = {module(file): ast.parse(file.read_text()) for file in SOURCE.rglob("*.py")}


def imports(node: ast.AST, top: bool = True) -> Iterator[tuple[str, bool]]:
    """Yield (full name, whether it is imported at the top of the file)."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from ((alias.name, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            yield from ((f"{child.module}.{alias.name}", top) for alias in child.names)
        inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from imports(child, top and not inside)


def own_imports(name: str) -> Iterator[tuple[str, bool]]:
    """Yield the modules of ours that a module imports, without ``larskit.``."""
    for imported, top in imports(MODULES[name]):
        root, _, rest = imported.partition(".")
        if root == "larskit":
            known = rest in MODULES or rest == "_native"
            yield rest if known else rest.rpartition(".")[0], top


def row(name: str) -> str:
    return name if name in ALLOWED else name.rpartition(".")[0] + ".*"


def matches(name: str, allowed: str) -> bool:
    return name == allowed or row(name) == allowed


@pytest.mark.parametrize("name", sorted(MODULES))
def test_own_imports(name):
    for imported, top in own_imports(name):
        assert any(matches(imported, allowed) for allowed in ALLOWED[row(name)]), (
            f"{name} imports {imported}"
        )
        assert name != "cli" or not top or imported in LIGHT, "cli starts slowly"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_engines_are_reached_through_their_package(name):
    if name.startswith("engines."):
        return
    inside = {x for x, _ in own_imports(name) if x.startswith("engines.")}
    assert name == "engines" or not inside


@pytest.mark.parametrize("name", sorted(MODULES))
def test_only_the_engines_compare_the_type_of_a_device(name):
    """But for what a dtype of MPS can be, and for the app, which chooses a device."""
    if name.startswith(("engines", "app", "arrays")):
        return
    compared = [
        ast.unparse(node)
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Attribute) and node.attr == "type"
        if "device" in ast.unparse(node.value)
    ]
    assert not compared


@pytest.mark.parametrize("here", ALLOWED)
def test_what_is_allowed_is_needed(here):
    names = [name for name in MODULES if row(name) == here]
    assert names, f"there is no {here}"
    found = {imported for name in names for imported, _ in own_imports(name)}
    unused = {x for x in ALLOWED[here] if not any(matches(name, x) for name in found)}
    assert unused == set()


def edges(name: str) -> set[str]:
    """Return what must be loaded for a module: its imports, and their packages."""
    found = set()
    for imported, _ in own_imports(name):
        parts = imported.split(".")
        found |= {".".join(parts[: i + 1]) for i in range(len(parts))}
    return {x for x in found if x != name and not name.startswith(f"{x}.")}


def test_no_module_needs_itself():
    try:
        TopologicalSorter({name: edges(name) for name in MODULES}).prepare()
    except CycleError as why:
        pytest.fail(" <- ".join(why.args[1]))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_frameworks_are_imported_where_their_name_is(name):
    above = name.rpartition(".")[0]
    root = name.partition(".")[0]
    allowed = set().union(*(AT_TOP.get(x, set()) for x in (name, above, root)))
    for imported, top in imports(MODULES[name]):
        framework = imported.partition(".")[0]
        if top and framework in FRAMEWORKS:
            assert framework in allowed, f"{name} imports {imported} at its top"


def test_no_drawers():
    drawers = {"utils", "helpers", "base", "common", "core", "types"}
    assert not drawers & {part for name in MODULES for part in name.split(".")}


def test_the_rules_see_a_violation():
    tree = ast.parse("import torch\ndef f():\n    from larskit import cli")
    assert list(imports(tree)) == [("torch", True), ("larskit.cli", False)]
    assert not matches("torch.bucket", "torch")
    assert matches("app.train", "app.*")
    assert not matches("app", "app.*")
