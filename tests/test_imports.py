"""What an import of larskit loads, and what it says where a package is missing."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
PROGRAM = Path(__file__).parent / "live" / "imports.py"
PACKAGES = {"larskit", "array_api_compat", "optree", "typing_extensions"}
MODULES = 60  # at most, of which 35 are the packages that larskit requires


def test_import_is_light(python):
    packages, modules = json.loads(python(PROGRAM, "light"))
    assert set(packages) <= PACKAGES
    assert modules <= MODULES


@pytest.mark.parametrize(
    ("case", "frameworks"),
    [
        ("modules larskit", []),
        ("modules larskit.state", []),
        ("star", []),
        ("modules larskit.jax", ["jax", "jaxlib"]),
        ("function", []),
        ("hook", []),
    ],
)
def test_no_framework_is_loaded_but_the_one_that_is_asked_for(python, case, frameworks):
    assert python(PROGRAM, *case.split()) == f"{frameworks}\n"


def test_its_names_are_there_before_what_they_load(python):
    said = "[]\nmodule 'larskit' has no attribute 'tensorflow'\n"
    assert python(PROGRAM, "names") == said


def test_the_help_of_the_command_needs_no_framework(python):
    assert python(PROGRAM, "command_help").endswith("\n[]\n")


@pytest.mark.parametrize(
    ("api", "named"), [("torch", "PyTorch"), ("jax", "JAX"), ("keras", "Keras")]
)
@pytest.mark.parametrize("way", ["attribute", "import"])
def test_a_missing_framework_is_named_with_its_extra(python, api, named, way):
    message = f"larskit.{api} needs {named}: pip install 'larskit[{api}]'\n"
    assert python(PROGRAM, "without", api, api, way) == message


def test_a_missing_backend_is_not_taken_for_a_missing_keras(python):
    assert python(PROGRAM, "without_backend").partition(".")[0].strip() == "torch"


def test_the_hook_is_attached_to_optimizers_only(python):
    said = python(PROGRAM, "attach")
    assert "expected a torch.optim.Optimizer" in said
    assert said.endswith("\n[]\n")


def test_the_command_names_each_missing_package(python, tmp_path):
    packages = ["rich", "matplotlib", "torch", "sklearn"]
    message = "larskit: {} is needed, but not installed: pip install 'larskit[app]'"
    said = python(PROGRAM, "command_without", *packages, cwd=tmp_path).splitlines()
    assert said == [message.format(name) for name in packages]
    assert list(tmp_path.iterdir()) == []
