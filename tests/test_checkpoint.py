import hashlib
import json
import os
import re
import struct
import sys
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from larskit.config import Config
from larskit.state import (
    PortableState,
    atomic,
    files,
    load_optimizer,
    read_state,
    save_optimizer,
    write_state,
)
from larskit.state.portable import hyperparameters

KILLED = Path(__file__).parent / "live" / "killed.py"
DTYPES = st.sampled_from(
    ["bool", "int8", "int32", "uint64", "float16", "float32", "float64", "complex64"]
)
TENSORS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0))),
    max_size=4,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors=TENSORS)
def test_what_is_loaded_is_what_was_saved(tmp_path, tensors):
    files.save(tensors, tmp_path / "state")
    loaded = files.load(tmp_path / "state")
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
    files.save({"x": x}, tmp_path / "state")
    loaded = files.load(tmp_path / "state")["x"]
    assert loaded.dtype.name == np.asarray(x).dtype.name
    np.testing.assert_array_equal(loaded.astype("float64"), np.float64(x))


def test_a_dtype_that_safetensors_lacks_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="'z' has the dtype complex128, expected one"):
        files.save({"a": np.ones(2), "z": np.ones(2, "complex128")}, tmp_path / "s")
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
def test_a_truncated_or_foreign_file_is_one_clear_error(tmp_path, spoil):
    file = tmp_path / "state"
    files.save({"x": np.ones(3)}, file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=r"state is truncated or corrupt, or no"):
        files.load(file)


def test_a_dtype_that_numpy_lacks_is_refused(tmp_path):
    header = b'{"x":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}'
    file = tmp_path / "state"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ValueError, match="F8_E4M3"):
        files.load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.load(tmp_path / "nowhere")


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


@pytest.mark.distributed
def test_a_process_that_is_killed_while_writing_leaves_the_old_file(python, tmp_path):
    file = tmp_path / "state"
    file.write_text("old")
    python(KILLED, "between_two_writes", file, code=9)
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
        files.save({"x": np.ones(3)}, tmp_path / "state")
    assert not os.listdir(tmp_path)


LAYER = hyperparameters(0.5, Config(dampening=0.1))


def state(**changes):
    momentum = {
        "a/b": np.arange(3, dtype="float32"),
        "é\x1f": np.ones((2, 1), ml_dtypes.bfloat16),
    }
    layers = {"a/b": LAYER, "é\x1f": {**LAYER, "lr": None}, "fresh": LAYER}
    parts = {"step": 7, "layers": layers, "momentum": momentum}
    return PortableState(**{**parts, "master": {"a/b": np.ones(3)}, **changes})


def content(state):
    arrays = {"momentum": state.momentum, "master": state.master}
    return (
        state.step,
        {name: dict(layer) for name, layer in state.layers.items()},
        {
            (kind, name): (x.dtype, x.shape, x.tobytes())
            for kind, named in arrays.items()
            for name, x in named.items()
        },
    )


def by_hand(about, tensors=b"", data=b""):
    """Write a file without larskit, as docs/checkpoints.md says; values are JSON."""
    text = json.dumps(json.dumps(about)).encode()
    header = b'{"__metadata__":{"larskit":' + text + b"}" + tensors + b"}"
    whole = struct.pack("<Q", len(header)) + header + data
    assert whole.count(b"0" * 64) <= 1
    return whole.replace(b"0" * 64, hashlib.sha256(whole).hexdigest().encode())


ABOUT = {"format": 1, "sha256": "0" * 64, "step": 3, "layers": {"w": LAYER}}
ONE = b',"momentum/w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize("step", [7, 0, None])
def test_a_state_that_is_read_is_the_one_that_was_written(tmp_path, step):
    written = state(step=step)
    write_state(written, tmp_path / "state")
    assert content(read_state(tmp_path / "state")) == content(written)
    first = (tmp_path / "state").read_bytes()
    write_state(written, tmp_path / "state")
    assert (tmp_path / "state").read_bytes() == first


def test_anybody_can_write_a_file_and_read_one(tmp_path):
    file = tmp_path / "state"
    file.write_bytes(by_hand(ABOUT, ONE, struct.pack("<f", 0.25)))
    found = read_state(file)
    assert (found.step, found.momentum["w"].tolist()) == (3, [0.25])
    assert found.layers == {"w": LAYER}

    write_state(state(), file)
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    about = json.loads(header["__metadata__"]["larskit"])
    assert {*header} == {
        "__metadata__", "momentum/a/b", "momentum/é\x1f", "master/a/b",
    }  # fmt: skip
    assert (about["format"], about["step"]) == (1, 7)
    assert about["layers"]["fresh"] == {"lr": 0.5, **vars(Config(dampening=0.1))}
    unsigned = data.replace(about["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(unsigned).hexdigest() == about["sha256"]


def test_no_bit_of_a_file_can_flip_unseen(tmp_path):
    file = tmp_path / "state"
    write_state(state(layers={"é\x1f": LAYER, "a/b": {}}), file)
    data = file.read_bytes()
    descriptor = os.open(file, os.O_WRONLY)
    try:
        for place, byte in enumerate(data):
            for bit in range(8):
                os.pwrite(descriptor, bytes([byte ^ (1 << bit)]), place)
                with pytest.raises(ValueError, match="state"):
                    read_state(file)
            os.pwrite(descriptor, bytes([byte]), place)
    finally:
        os.close(descriptor)
    assert read_state(file).step == 7


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[:-1], "corrupt"),
        (lambda data: data[:300], "corrupt"),
        (lambda data: data + b"0", "corrupt"),
        (lambda _: b"", "corrupt"),
        (lambda _: b"\x80\x04K\x01.", "corrupt"),
        (lambda data: data[:-1] + b"\7", "damaged after it was written: take another"),
        (lambda data: data.replace(b": 7,", b": 8,"), "was damaged after"),
        (lambda data: data.replace(b'"larskit"', b'"torches"'), "not the state of an"),
        (
            lambda _: by_hand({**ABOUT, "format": 2}),
            "format 2, this larskit reads 1: update larskit",
        ),
    ],
    ids=[
        "last byte", "half", "longer", "empty", "pickle", "data", "step", "foreign",
        "newer",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_says_why(tmp_path, spoil, message):
    file = tmp_path / "state"
    write_state(state(), file)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(ValueError, match=f"state .*{message}"):
        read_state(file)


def test_plain_safetensors_are_no_state(tmp_path):
    files.save({"x": np.ones(3)}, tmp_path / "state")
    with pytest.raises(ValueError, match="holds arrays, but not the state of an opti"):
        read_state(tmp_path / "state")


@pytest.mark.parametrize(
    ("about", "tensors", "message"),
    [
        ({**ABOUT, "step": -1}, b"", "step must be None or an int >= 0, got -1"),
        ({**ABOUT, "step": 1.0}, b"", "step must be .* got 1.0"),
        ({**ABOUT, "step": True}, b"", "step must be .* got True"),
        ({**ABOUT, "layers": []}, b"", "breaks the rules of its format .*items"),
        ({**ABOUT, "layers": {"w": 3}}, b"", "layer 'w' must be a mapping, got 3"),
        ({**ABOUT, "layers": {}}, ONE, "momentum has 'w', which is no layer"),
        (ABOUT, ONE.replace(b"momentum", b"velocity"), "rules .*velocity"),
        ({**ABOUT, "sha256": ""}, b"", "empty separator"),
        ({**ABOUT, "sha256": 5}, b"", "breaks the rules .*encode"),
        ({"format": 1}, b"", "breaks the rules .*sha256"),
        ([], b"", "breaks the rules"),
    ],
    ids=[
        "negative step", "a float", "a flag", "a list of layers", "a number as layer",
        "no layers", "velocity", "empty digest", "a number as digest", "no digest",
        "a list",
    ],
)  # fmt: skip
def test_a_file_that_breaks_the_rules_is_refused(tmp_path, about, tensors, message):
    file = tmp_path / "state"
    file.write_bytes(by_hand(about, tensors, bytes(4) if tensors else b""))
    with pytest.raises(ValueError, match=f"state .*{message}"):
        read_state(file)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"a/b": "x"}, ValueError, r"names has no entry for 'é\\x1f', 'fresh': add it"),
        (lambda _: "x", ValueError, "maps several layers to 'x': give each its own"),
        (lambda _: 5, TypeError, "maps 'a/b' to 5, expected a string"),
        (dict.fromkeys(state().layers, None), TypeError, "maps 'a/b' to None"),
    ],
)
def test_names_that_do_not_work_are_listed(names, error, message):
    with pytest.raises(error, match=message):
        state().renamed(names)


@pytest.mark.parametrize("callable_", [False, True])
def test_layers_are_renamed_with_all_that_is_theirs(callable_):
    new = {name: f"net.{i}" for i, name in enumerate(state().layers)}
    found = state().renamed(new.__getitem__ if callable_ else {**new, "other": "x"})
    assert [*found.layers] == ["net.0", "net.1", "net.2"]
    assert found.layers["net.1"]["lr"] is None
    assert (*found.momentum, *found.master) == ("net.0", "net.1", "net.0")
    np.testing.assert_array_equal(found.momentum["net.0"], [0, 1, 2])


class Optimizer:
    """What save_optimizer and load_optimizer need of an optimizer."""

    def __init__(self, state):
        self.state = state

    def portable_state(self):
        return self.state

    def load_portable_state(self, state, *, names, convert):
        self.loaded = state, names, convert


@pytest.mark.parametrize(
    ("counted", "saved", "loaded", "step"),
    [
        (None, None, None, None),
        (None, 5, None, 5),
        (None, None, 5, 5),
        (5, None, None, 5),
        (5, 5, np.int32(5), 5),
    ],
)
def test_the_step_is_what_somebody_knows(tmp_path, counted, saved, loaded, step):
    optimizer = Optimizer(state(step=counted))
    names = dict(zip(state().layers, "xyz", strict=True))
    save_optimizer(optimizer, tmp_path / "state", names=names, step=saved)
    found = load_optimizer(
        optimizer, tmp_path / "state", names=names, step=loaded, convert=True
    )
    assert optimizer.loaded == (found, names, True)
    assert (found.step, [*found.layers]) == (step, ["x", "y", "z"])


def test_a_step_that_contradicts_is_refused(tmp_path):
    optimizer, file = Optimizer(state()), tmp_path / "state"
    message = "step=8, but 7 steps were counted: omit step"
    with pytest.raises(ValueError, match=message):
        save_optimizer(optimizer, file, step=8)
    assert not file.exists()
    save_optimizer(optimizer, file)
    with pytest.raises(ValueError, match=message):
        load_optimizer(optimizer, file, step=8)
    with pytest.raises(ValueError, match="step must be None or an int >= 0, got -1"):
        save_optimizer(Optimizer(state(step=None)), file, step=-1)
    assert not hasattr(optimizer, "loaded")


def test_other_optimizers_are_refused(tmp_path):
    other: Any = object()
    for function in (save_optimizer, load_optimizer):
        with pytest.raises(TypeError, match=r"is a object, expected a larskit\.torch"):
            function(other, tmp_path / "state")


def test_a_failure_while_a_state_is_written_leaves_the_old_one(tmp_path, monkeypatch):
    write_state(state(), tmp_path / "state")

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_state(state(step=8), tmp_path / "state")
    assert read_state(tmp_path / "state").step == 7
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.distributed
def test_a_process_killed_while_a_state_is_written_leaves_the_old(python, tmp_path):
    write_state(state(), tmp_path / "state")
    python(KILLED, "before_a_state_is_on_disk", tmp_path / "state", code=9)
    assert [*read_state(tmp_path / "state").layers] == [*state().layers]


@pytest.mark.parametrize(
    ("package", "user"),
    [("safetensors", "checkpoints need"), ("ml_dtypes", "bfloat16 in NumPy needs")],
)
def test_a_missing_package_is_named(tmp_path, monkeypatch, package, user):
    write_state(state(), tmp_path / "state")
    monkeypatch.setitem(sys.modules, package, None)
    message = re.escape(f"{user} {package}: pip install {package}")
    with pytest.raises(ModuleNotFoundError, match=message):
        read_state(tmp_path / "state")
