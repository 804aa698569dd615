"""Every row of `make matrix`, and some that must fail."""

import re

import matrix
import pytest

pytestmark = pytest.mark.integration
LINE = re.compile(r"\| [\w -]+ \| \d\S+ \| .+ \| (\d\.\de-\d\d) \| \d+\.\d s \|")
NOT_RUN = re.compile(r"\| [\w -]+ \|  \| .+ \| not run: .+ \|  \|")


def rows_of(page):
    return [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Run every row that this machine can run, as `make matrix` does."""
    page = tmp_path_factory.mktemp("matrix") / "matrix.md"
    matrix.main(matrix.ROWS, page)
    return dict(zip(matrix.ROWS, rows_of(page), strict=True))


@pytest.mark.parametrize(
    "row", matrix.ROWS, ids=lambda row: f"{row.integration}, {row.ran}"
)
def test_an_integration_agrees_with_the_rule(page, row):
    if why := matrix.absent(row):
        assert NOT_RUN.fullmatch(page[row])
        pytest.skip(why)
    line = LINE.fullmatch(page[row])
    assert line, page[row]
    assert 0 < float(line[1]) <= matrix.BOUND


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a little off", "is more than 1e-05"),
        ("not a number", "nan is more than 1e-05"),
        ("standing still", "1.0 is more than 1e-05"),
        ("too short", "ValueError"),
        ("missing", "NameError"),
        ("silent", "no line"),
    ],
)
def test_a_wrong_row_fails(name, says, tmp_path, capsys):
    page = tmp_path / "matrix.md"
    row = matrix.Row("NumPy", matrix.PROGRAMS / "wrong.py", name)
    assert matrix.main([row], page) == 1
    assert "**failed**" in page.read_text()
    shown = capsys.readouterr()
    assert says in shown.err
    assert page.read_text() in shown.out


def test_a_row_that_cannot_run_is_listed_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "find_spec", lambda name: None)
    monkeypatch.setattr(matrix.environments, "unsupported", lambda name: "too new")
    page = tmp_path / "matrix.md"
    rows = [row for row in matrix.ROWS if row.integration in ("CuPy", "Chainer")]
    assert matrix.main(rows, page) == 0
    cupy, chainer = rows_of(page)
    assert "not run: cupy, which needs a GPU, is not installed" in cupy
    assert "not run: too new" in chainer


def test_every_program_has_a_row():
    assert {row.program for row in matrix.ROWS} == set(matrix.PROGRAMS.glob("on_*.py"))
    assert len({(row.integration, row.ran) for row in matrix.ROWS}) == len(matrix.ROWS)
