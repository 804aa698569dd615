import io
import json
import os
import re
import signal
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from larskit.app import InputError, results, study
from larskit.app.data import read
from larskit.app.plot import plot
from larskit.app.results import Point
from larskit.app.settings import Settings
from larskit.app.trainer import Trainer

AXES = {
    "models": ["convnet"],
    "optimizers": ["sgd", "lars"],
    "batch_sizes": [20],
    "lrs": [("sgd", [0.1, 1e20]), ("lars", [1.0, 4.0])],
    "seeds": 1,
}


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def cells(few) -> list[Settings]:
    return study.grid({"data": few, "epochs": 2}, **AXES)


@pytest.fixture(scope="module")
def done(cells, tmp_path_factory) -> tuple[Path, str]:
    """Name the folder of a study by two processes, and what it said."""
    out, shown = tmp_path_factory.mktemp("done"), console()
    assert study.study(cells, str(out), jobs=2, console=shown) == 0
    return out, said(shown)


def test_the_grid_is_the_product_seed_by_seed():
    axes = {"models": ["resnet18", "convnet"], "batch_sizes": [8, 16], "seeds": 2}
    given = {"seed": 5, "epochs": 3, "trust_coefficient": 0.1}
    cells = study.grid(given, optimizers=["sgd", "lars"], lrs=[("sgd", [1.0])], **axes)
    lars = len(study.RECIPES["lars"].lrs)
    assert len(cells) == len(set(cells)) == 2 * 2 * 2 * (1 + lars)
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)
    assert {cell.seed for cell in cells} == {5, 6}
    assert {cell.epochs for cell in cells} == {3}
    assert {(cell.optimizer, cell.trust_coefficient) for cell in cells} == {
        ("sgd", None),
        ("lars", 0.1),
    }


def test_rates_of_an_optimizer_that_does_not_take_part_are_refused():
    with pytest.raises(InputError, match="--lrs names 'adamw'"):
        study.grid({}, **{**AXES, "lrs": [("adamw", [0.1])]})


def test_every_cell_is_the_training_alone(done, cells, few):
    found = results.load(done[0] / "results.json")
    data = read(few)
    assert len(found) == len(cells)
    for cell in found:
        trainer = Trainer(Settings(**cell["settings"]), data)
        for _ in trainer.run():
            pass
        for name in results.MEASURES:
            assert cell[name] == trainer.history[-1][name]
        assert cell["data"] == data.fingerprint
        assert cell["seconds"] > 0


def test_a_divergence_is_a_result(done):
    found = results.load(done[0] / "results.json")
    (cell,) = (cell for cell in found if cell["settings"]["lr"] == 1e20)
    assert cell["train_loss"] is None
    assert cell["test_accuracy"] < 0.5
    json.loads((done[0] / "results.json").read_text(), parse_constant=pytest.fail)


def test_the_table_and_each_training_are_shown(done):
    out, text = done
    assert text.count("seed 0: ") == 4
    assert re.search(r"convnet .* 20 .* sgd .* 0\.1 ", text)
    assert re.search(r"convnet .* 20 .* lars ", text)
    assert f"{out / 'results.json'}" in text


def test_the_table_names_the_rates_near_the_best_of_the_panel():
    def points(**means: float) -> list[Point]:
        return [Point(float(lr[1:]), x, x - 0.01, 1.0) for lr, x in means.items()]

    lars = points(_1=0.985, _2=0.99, _4=0.97, _8=0.984, _16=0.5)
    poor = points(_3=0.5)
    shown = console()
    panel = {"lars": lars, "sgd": points(_0=0.1, _5=0.981), "larc": poor}
    shown.print(study.table({("m", 8): panel, ("m", 9): {"adamw": poor}}))
    rows = [re.split(r" *│ *", line)[1:-1] for line in said(shown).splitlines()]
    assert ["m", "8", "lars", "99.00", "98.0-100.0", "2", "1-2, 8"] in rows
    assert ["m", "8", "sgd", "98.10", "97.1-100.0", "5", "5"] in rows
    assert ["m", "8", "larc", "50.00", "49.0-100.0", "3", "none"] in rows
    assert ["m", "9", "adamw", "50.00", "49.0-100.0", "3", "3"] in rows


def test_the_picture_is_a_png_with_a_panel_per_model_and_batch_size(done, tmp_path):
    image = matplotlib.image.imread(done[0] / "study.png")
    assert min(image.shape[:2]) > 300
    colours = np.unique((255 * image[..., :3]).astype(int).reshape(-1, 3), axis=0)
    assert len(colours) > 50
    points = [Point(lr, 0.5, 0.4, 0.6) for lr in (0.1, 1.0)]
    curves = {(m, b): {"lars": points} for m in ("m", "n", "o") for b in (1, 2)}
    plot(curves, tmp_path / "large.png")
    large = matplotlib.image.imread(tmp_path / "large.png")
    assert large.shape[0] > 2 * image.shape[0]
    assert large.shape[1] > 1.5 * image.shape[1]


def test_what_is_known_is_not_trained_again(done, cells, monkeypatch):
    monkeypatch.setattr(study, "_run", None)
    shown = console()
    assert study.study(cells, str(done[0]), jobs=2, console=shown) == 0
    assert "lars" in said(shown)


def test_a_larger_study_trains_what_is_missing(done, cells, few, monkeypatch):
    asked = []

    def run(missing, *rest):
        asked.extend(missing)
        return 130

    monkeypatch.setattr(study, "_run", run)
    before, shown = (done[0] / "results.json").read_bytes(), console()
    more = study.grid({"data": few, "epochs": 2}, **{**AXES, "seeds": 2})
    assert study.study(more, str(done[0]), jobs=2, console=shown) == 130
    assert {cell.seed for cell in asked} == {1}
    assert len(asked) == 4
    assert "4 of 8 trainings are in" in said(shown)
    other = study.grid({"data": few, "epochs": 3}, **AXES)
    study.study(other, str(done[0]), jobs=2, console=console())
    assert asked[4:] == other
    assert (done[0] / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "batch_size", "message"),
    [
        ({"data": "none"}, 20, "does not exist"),
        ({}, 999, "--batch-size 999 is larger"),
        ({}, 1, "batch norm needs 2"),
        ({"device": "nonsense"}, 20, "--device nonsense"),
    ],
)
def test_bad_input_leaves_no_folder(few, tmp_path, given, batch_size, message):
    axes = {**AXES, "batch_sizes": [20, batch_size]}
    cells = study.grid({"data": few, **given}, **axes)
    with pytest.raises(InputError, match=message):
        study.study(cells, str(tmp_path / "out"), jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_foreign_results_file_is_not_overwritten(cells, tmp_path):
    (tmp_path / "results.json").write_text("my results")
    with pytest.raises(InputError, match="corrupt, or no result of larskit study"):
        study.study(cells, str(tmp_path), jobs=1)
    assert (tmp_path / "results.json").read_text() == "my results"


def test_a_process_that_dies_is_said(cells, tmp_path, monkeypatch):
    class Dying(ProcessPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(study, "ProcessPoolExecutor", Dying)
    shown = console()
    assert study.study(cells, str(tmp_path), jobs=1, console=shown) == 1
    assert "A process died" in said(shown)
    assert "0 of 4 trainings are in" in said(shown)


@pytest.mark.integration
def test_ctrl_c_keeps_what_is_finished(start, few, tmp_path):
    command = ["-W", "error", "-m", "larskit", "study", "--data", few]
    flags = ["--out", str(tmp_path), "--epochs", "2", "--batch-sizes", "20"]
    flags += ["--seeds", "999", "--jobs", "1"]
    process = start(*command, *flags, until=tmp_path / "results.json")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors == ""
    kept = results.load(tmp_path / "results.json")
    assert f"{len(kept)} of {999 * 14} trainings are in" in output
    assert 1 <= len(kept) < 999
