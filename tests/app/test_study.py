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


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def runs(few) -> list[Settings]:
    return study.grid({"data": few, "epochs": 2}, **AXES)


@pytest.fixture(scope="module")
def done(runs, tmp_path_factory) -> tuple[Path, str]:
    """Run a study in two processes; return its folder and its output."""
    out, shown = tmp_path_factory.mktemp("done"), console()
    assert study.study(runs, str(out), jobs=2, console=shown) == 0
    return out, text_of(shown)


def test_the_grid_is_a_product_ordered_by_seed():
    axes = {"models": ["resnet18", "convnet"], "batch_sizes": [8, 16], "seeds": 2}
    given = {"seed": 5, "epochs": 3, "trust_coefficient": 0.1}
    runs = study.grid(given, optimizers=["sgd", "lars"], lrs=[("sgd", [1.0])], **axes)
    lars = len(study.RECIPES["lars"].lrs)
    assert len(runs) == len(set(runs)) == 2 * 2 * 2 * (1 + lars)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert {run.seed for run in runs} == {5, 6}
    assert {run.epochs for run in runs} == {3}
    assert {(run.optimizer, run.trust_coefficient) for run in runs} == {
        ("sgd", None),
        ("lars", 0.1),
    }


def test_rates_of_an_optimizer_outside_the_study_are_an_error():
    with pytest.raises(InputError, match="--lrs has rates for 'adamw'"):
        study.grid({}, **{**AXES, "lrs": [("adamw", [0.1])]})


def test_every_result_is_that_of_a_single_run(done, runs, few):
    found = results.load(done[0] / "results.json")
    data = read(few)
    assert len(found) == len(runs)
    for result in found:
        trainer = Trainer(Settings(**result["settings"]), data)
        for _ in trainer.run():
            pass
        for name in results.METRICS:
            assert result[name] == trainer.history[-1][name]
        assert result["data"] == data.fingerprint
        assert result["seconds"] > 0


def test_a_diverged_run_is_a_result(done):
    found = results.load(done[0] / "results.json")
    (result,) = (x for x in found if x["settings"]["lr"] == 1e20)
    assert result["train_loss"] is None
    assert result["test_accuracy"] < 0.5
    json.loads((done[0] / "results.json").read_text(), parse_constant=pytest.fail)


def test_the_output_has_the_table_and_every_run(done):
    out, text = done
    assert text.count("seed 0: ") == 4
    assert re.search(r"convnet .* 20 .* sgd .* 0\.1 ", text)
    assert re.search(r"convnet .* 20 .* lars ", text)
    assert f"{out / 'results.json'}" in text


def test_the_table_lists_the_rates_near_the_best_of_a_panel():
    def points(**means: float) -> list[Point]:
        return [Point(float(lr[1:]), x, x - 0.01, 1.0) for lr, x in means.items()]

    lars = points(_1=0.985, _2=0.99, _4=0.97, _8=0.984, _16=0.5)
    poor = points(_3=0.5)
    shown = console()
    panel = {"lars": lars, "sgd": points(_0=0.1, _5=0.981), "larc": poor}
    shown.print(study.table({("m", 8): panel, ("m", 9): {"adamw": poor}}))
    rows = [re.split(r" *│ *", line)[1:-1] for line in text_of(shown).splitlines()]
    assert ["m", "8", "lars", "99.00", "98.0-100.0", "2", "1-2, 8"] in rows
    assert ["m", "8", "sgd", "98.10", "97.1-100.0", "5", "5"] in rows
    assert ["m", "8", "larc", "50.00", "49.0-100.0", "3", "none"] in rows
    assert ["m", "9", "adamw", "50.00", "49.0-100.0", "3", "3"] in rows


def test_the_plot_has_a_panel_per_model_and_batch_size(done, tmp_path):
    image = matplotlib.image.imread(done[0] / "study.png")
    assert min(image.shape[:2]) > 300
    colors = np.unique((255 * image[..., :3]).astype(int).reshape(-1, 3), axis=0)
    assert len(colors) > 50
    points = [Point(lr, 0.5, 0.4, 0.6) for lr in (0.1, 1.0)]
    curves = {(m, b): {"lars": points} for m in ("m", "n", "o") for b in (1, 2)}
    plot(curves, tmp_path / "large.png")
    large = matplotlib.image.imread(tmp_path / "large.png")
    assert large.shape[0] > 2 * image.shape[0]
    assert large.shape[1] > 1.5 * image.shape[1]


def test_a_finished_run_is_not_repeated(done, runs, monkeypatch):
    monkeypatch.setattr(study, "_run", None)
    shown = console()
    assert study.study(runs, str(done[0]), jobs=2, console=shown) == 0
    assert "lars" in text_of(shown)


def test_a_larger_study_trains_the_missing_runs_only(done, few, monkeypatch):
    requested = []

    def run(missing, *rest):
        requested.extend(missing)
        return 130

    monkeypatch.setattr(study, "_run", run)
    before, shown = (done[0] / "results.json").read_bytes(), console()
    more = study.grid({"data": few, "epochs": 2}, **{**AXES, "seeds": 2})
    assert study.study(more, str(done[0]), jobs=2, console=shown) == 130
    assert {run.seed for run in requested} == {1}
    assert len(requested) == 4
    assert "4 of 8 training runs are in" in text_of(shown)
    other = study.grid({"data": few, "epochs": 3}, **AXES)
    study.study(other, str(done[0]), jobs=2, console=console())
    assert requested[4:] == other
    assert (done[0] / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "batch_size", "message"),
    [
        ({"data": "none"}, 20, "does not exist"),
        ({}, 999, r"--batch-size must be at most .* got 999"),
        ({}, 1, "convnet needs 2"),
        ({"device": "nonsense"}, 20, "--device nonsense"),
    ],
)
def test_invalid_input_creates_no_folder(few, tmp_path, given, batch_size, message):
    axes = {**AXES, "batch_sizes": [20, batch_size]}
    runs = study.grid({"data": few, **given}, **axes)
    with pytest.raises(InputError, match=message):
        study.study(runs, str(tmp_path / "out"), jobs=1)
    assert not (tmp_path / "out").exists()


def test_a_foreign_results_file_is_not_overwritten(runs, tmp_path):
    (tmp_path / "results.json").write_text("my results")
    with pytest.raises(InputError, match="truncated or corrupt, or was not written by"):
        study.study(runs, str(tmp_path), jobs=1)
    assert (tmp_path / "results.json").read_text() == "my results"


def test_the_death_of_a_process_is_reported(runs, tmp_path, monkeypatch):
    class Dying(ProcessPoolExecutor):
        def submit(self, fn, /, *args, **kwargs):
            future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setattr(study, "ProcessPoolExecutor", Dying)
    shown = console()
    assert study.study(runs, str(tmp_path), jobs=1, console=shown) == 1
    assert "A process died" in text_of(shown)
    assert "0 of 4 training runs are in" in text_of(shown)


@pytest.mark.integration
def test_ctrl_c_keeps_the_finished_runs(start, few, tmp_path):
    command = ["-W", "error", "-m", "larskit", "study", "--data", few]
    flags = ["--out", str(tmp_path), "--epochs", "2", "--batch-sizes", "20"]
    flags += ["--seeds", "999", "--jobs", "1"]
    process = start(*command, *flags, until=tmp_path / "results.json")
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors == ""
    finished = results.load(tmp_path / "results.json")
    assert f"{len(finished)} of {999 * 14} training runs are in" in output
    assert 1 <= len(finished) < 999
