import os
import subprocess
import sys

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from larskit import checkpoint
from larskit.checkpoint import atomic

DTYPES = st.sampled_from(
    ["bool", "int8", "int32", "uint64", "float16", "float32", "float64", "complex64"]
)
TENSORS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0))),
    max_size=4,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=TENSORS)
def test_what_is_loaded_is_what_was_saved(tmp_path, tensors):
    checkpoint.save(tensors, tmp_path / "state")
    loaded = checkpoint.load(tmp_path / "state")
    assert set(loaded) == set(tensors)
    for name, x in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (x.dtype, x.shape)
        assert loaded[name].tobytes() == x.tobytes()


@pytest.mark.parametrize(
    "x",
    [
        np.arange(6, dtype="float32").astype(ml_dtypes.bfloat16).reshape(2, 3),
        np.arange(12.0).reshape(3, 4).T[::2],
        np.arange(3, dtype=">f4"),
        np.zeros((0, 3), "float32"),
        3.5,
    ],
    ids=["bfloat16", "strided", "big-endian", "empty", "a float"],
)
def test_unusual_arrays_survive(tmp_path, x):
    checkpoint.save({"x": x}, tmp_path / "state")
    loaded = checkpoint.load(tmp_path / "state")["x"]
    assert loaded.dtype.name == np.asarray(x).dtype.name
    np.testing.assert_array_equal(loaded.astype("float64"), np.float64(x))


def test_a_dtype_that_safetensors_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="'z' has the dtype complex128, expected one"):
        checkpoint.save(
            {"a": np.ones(2), "z": np.ones(2, "complex128")}, tmp_path / "s"
        )
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[:20],
        lambda _: b"",
        lambda _: b"hello " * 99,
    ],
    ids=["last byte", "header", "empty", "foreign"],
)
def test_a_torn_or_foreign_file_is_one_clear_error(tmp_path, spoil):
    file = tmp_path / "state"
    checkpoint.save({"x": np.ones(3)}, file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=r"state is torn, or no safetensors file"):
        checkpoint.load(file)


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    header = b'{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    file = tmp_path / "state"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match="F8_E4M3"):
        checkpoint.load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")


@pytest.mark.parametrize(("mode", "content"), [("wb", b"\x00new"), ("w", "Maße")])
def test_atomic_replaces_bytes_and_text(tmp_path, mode, content):
    file = tmp_path / "results.json"
    file.write_text("old")
    with atomic(file, mode) as opened:
        opened.write(content)
        opened.flush()
        assert file.read_text() == "old"
    expected = content if mode == "wb" else content.encode("utf-8")
    assert file.read_bytes() == expected
    assert os.listdir(tmp_path) == ["results.json"]


def test_who_reads_the_old_file_reads_it_to_its_end(tmp_path):
    file = tmp_path / "state"
    file.write_text("old")
    with file.open() as reader:
        with atomic(file) as opened:
            opened.write(b"new")
        assert reader.read() == "old"


def test_the_bytes_are_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    sizes = []

    def sync(descriptor):
        assert not (tmp_path / "state").exists()
        sizes.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", sync)
    with atomic(tmp_path / "state") as opened:
        opened.write(b"new")
    assert sizes == [3]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    file = tmp_path / "state"
    file.write_text("old")

    def fail():
        with atomic(file) as opened:
            opened.write(b"half")
            raise failure

    with pytest.raises(failure):
        fail()
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_process_that_is_killed_while_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "state"
    file.write_text("old")
    code = (
        "import os, sys\n"
        "from larskit.checkpoint import atomic\n"
        "with atomic(sys.argv[1]) as file:\n"
        "    file.write(b'half')\n"
        "    file.flush()\n"
        "    os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert done.returncode == 9
    assert file.read_text() == "old"


def test_the_file_gets_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic(tmp_path / "state"):
        pass
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic(tmp_path / "link") as opened:
        opened.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "mode", "error", "message"),
    [
        ("no/state", "wb", FileNotFoundError, "no must be a folder that exists"),
        ("plain/state", "wb", NotADirectoryError, "plain must be a folder"),
        ("folder", "wb", IsADirectoryError, "folder: it is a folder"),
        ("state", "rb", ValueError, "mode must be 'wb' or 'w', got 'rb'"),
    ],
)
def test_where_no_file_can_be_written(tmp_path, name, mode, error, message):
    (tmp_path / "plain").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=message), atomic(tmp_path / name, mode):
        pytest.fail("the block must not run")
    assert sorted(os.listdir(tmp_path)) == ["folder", "plain"]


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    expected = "state: Permission denied: .* must be a folder that exists and can be"
    with pytest.raises(PermissionError, match=expected):
        checkpoint.save({"x": np.ones(3)}, tmp_path / "state")
    assert not os.listdir(tmp_path)


def test_importing_it_loads_no_framework_and_no_safetensors():
    code = (
        "import sys, larskit.checkpoint\n"
        "print([m for m in ('jax', 'torch', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"
