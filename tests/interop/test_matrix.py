"""The runner of `make matrix`, on two of its rows and on some that must fail."""

import re

import matrix
import pytest

QUICK = [
    row
    for row in matrix.ROWS
    if (row.client, row.ran)
    in {("NumPy", "lars_update"), ("PyTorch", "larskit.torch.LARS")}
]
LINE = re.compile(r"\| (\w+) \| \d\S+ \| (\S+) \| (\d\.\de-\d\d) \| \d+\.\d s \|")
WRONG = """
import itertools, sys
sys.path.append({clients!r})
import fit

expected = fit.optimizer()
fit.run("numpy", {{"wrong": (lambda: {found}, expected)}})
"""
SCALED = "([w * {} for w in weights] for weights in fit.optimizer())"


def rows_of(page):
    return [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]


def test_the_page_has_a_line_of_each_row(tmp_path, capsys):
    page = tmp_path / "matrix.md"
    assert matrix.main(QUICK, page) == 0
    lines = [LINE.fullmatch(line) for line in rows_of(page)]
    assert [line and line[1] for line in lines] == ["NumPy", "PyTorch"]
    assert [line and line[2] for line in lines] == ["lars_update", "larskit.torch.LARS"]
    assert all(line and 0 < float(line[3]) <= matrix.BOUND for line in lines)
    assert page.read_text() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (SCALED.format("(1 + 1e-4)"), "is more than 1e-05"),
        (SCALED.format("float('nan')"), "nan is more than 1e-05"),
        ("itertools.repeat(fit.WEIGHTS)", "1.0 is more than 1e-05"),
        ("itertools.islice(fit.optimizer(), 10)", "ValueError"),
        ("missing", "NameError"),
        ("exit()", "no line"),
    ],
)
def test_a_wrong_row_fails(found, says, tmp_path, capsys):
    program = tmp_path / "wrong.py"
    program.write_text(WRONG.format(clients=str(matrix.CLIENTS), found=found))
    page = tmp_path / "matrix.md"
    assert matrix.main([matrix.Row("NumPy", program, "wrong")], page) == 1
    assert "**failed**" in page.read_text()
    assert says in capsys.readouterr().err


def test_a_row_that_cannot_run_is_listed_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "find_spec", lambda name: None)
    monkeypatch.setattr(matrix.environments, "unsupported", lambda name: "too new")
    page = tmp_path / "matrix.md"
    rows = [row for row in matrix.ROWS if row.client in ("CuPy", "Chainer")]
    assert matrix.main(rows, page) == 0
    cupy, chainer = rows_of(page)
    assert "not run: cupy, which needs a GPU, is not installed" in cupy
    assert "not run: too new" in chainer


def test_every_program_has_a_row():
    assert {row.program for row in matrix.ROWS} == set(matrix.CLIENTS.glob("on_*.py"))
    assert len({(row.client, row.ran) for row in matrix.ROWS}) == len(matrix.ROWS)
