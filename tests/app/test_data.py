from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from larskit.app import InputError
from larskit.app.data import Data, read


def test_each_class_of_digits_is_split(digits):
    assert digits.x.shape == (1797, 1, 8, 8)
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert sorted([*digits.train, *digits.test]) == list(range(1797))
    total, test = np.bincount(digits.y), np.bincount(digits.y[digits.test])
    assert np.abs(test - total / 5).max() < 1
    np.testing.assert_array_equal(read("digits").test, digits.test)


def test_training_images_are_shuffled(digits):
    first = np.bincount(digits.y[digits.train[:200]], minlength=10)
    assert first.min() > 5


def test_moments_are_those_of_the_training_images(digits):
    x = digits.x.copy()
    x[digits.test] = 1e6
    mean, std = replace(digits, x=x).moments
    train = digits.x[digits.train]
    np.testing.assert_allclose(mean, [train.mean()], rtol=1e-5)
    np.testing.assert_allclose(std, [train.std()], rtol=1e-5)


def test_a_constant_channel_is_not_divided_by_zero():
    data = Data(np.ones((10, 2, 4, 4), np.float32), np.arange(10) % 2, ("a", "b"))
    np.testing.assert_array_equal(data.moments[1], [1, 1])


def test_the_fingerprint_depends_on_images_labels_and_shape(digits):
    x, y = digits.x.copy(), digits.y.copy()
    x[5, 0, 0, 0] += 1
    y[5] += 1
    flat = digits.x.reshape(1797, 1, 4, 16)
    others = [replace(digits, **change) for change in ({"x": x}, {"y": y}, {"x": flat})]
    fingerprints = {data.fingerprint for data in (digits, *others)}
    assert len(fingerprints) == 4
    assert read("digits").fingerprint in fingerprints


def folder(path: Path, per_class: int = 6, mode: str = "L", size=(9, 5)) -> Path:
    for label, name in enumerate(("cat", "dog")):
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            image = Image.new(mode, size, 100 * label if mode == "L" else (label, 7, 9))
            image.save(path / name / f"{i}.png")
    return path


def test_folder_of_grayscale_images(tmp_path):
    data = read(str(folder(tmp_path / "images")), 12)
    assert data.classes == ("cat", "dog")
    assert data.x.shape == (12, 1, 12, 12)
    assert data.x.dtype == np.uint8
    np.testing.assert_array_equal(data.y, [0] * 6 + [1] * 6)
    np.testing.assert_array_equal(data.x[:, 0, 0, 0], 100 * data.y)


def test_folder_of_mixed_images_becomes_rgb_of_32_pixels(tmp_path):
    root = folder(tmp_path / "images", mode="RGB")
    Image.new("L", (40, 30), 50).save(root / "cat" / "0.png")
    Image.new("P", (40, 30)).save(root / "cat" / "1.png")
    (root / "cat" / ".hidden").write_text("not an image")
    (root / ".DS_Store").write_text("not an image")
    data = read(str(root))
    assert data.x.shape == (12, 3, 32, 32)
    assert data.x[0, :, 0, 0].tolist() == [50, 50, 50]
    assert data.x[-1, :, 0, 0].tolist() == [1, 7, 9]


def test_exif_orientation_is_applied(tmp_path):
    root = folder(tmp_path / "images", size=(4, 4))
    exif = Image.Exif()
    exif[0x0112] = 3  # rotated by 180 degrees
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    image.save(root / "cat" / "0.png", exif=exif)
    x = read(str(root), 4).x[0, 0]
    np.testing.assert_array_equal(x.ravel(), np.arange(16)[::-1])


@pytest.mark.parametrize(
    ("shape", "dtype", "image_size", "expected"),
    [
        ((20, 6, 5), np.uint8, None, (20, 1, 6, 5)),
        ((20, 4, 6, 5), np.float64, None, (20, 4, 6, 5)),
        ((20, 6, 6), np.int64, 12, (20, 1, 12, 12)),
        ((20, 7, 16, 16), bool, 8, (20, 7, 8, 8)),
    ],
)
def test_npz(tmp_path, shape, dtype, image_size, expected):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    y = np.array(["yes", "no"] * 10)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    data = read(str(tmp_path / "data.npz"), image_size)
    assert data.x.shape == expected
    assert data.x.dtype == (np.uint8 if dtype == np.uint8 else np.float32)
    assert data.classes == ("no", "yes")
    np.testing.assert_array_equal(data.y, [1, 0] * 10)
    if image_size is None:
        np.testing.assert_array_equal(data.x.ravel(), x.ravel())


def test_labels_need_not_be_consecutive(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.zeros((10, 4, 4)), y=[-3, 8] * 5)
    data = read(str(tmp_path / "data.npz"))
    assert data.classes == ("-3", "8")
    np.testing.assert_array_equal(data.y, [0, 1] * 5)


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path / "data.npz", **arrays)
    return path / "data.npz"


def changed_folder(change: Callable[[Path], Any]) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        root = folder(path / "images")
        change(root)
        return root

    return make


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def truncated_npz(path: Path) -> Path:
    file = npz(path, x=X, y=Y)
    truncate(file)
    return file


def plain_array(path: Path) -> Path:
    with (path / "data.npz").open("wb") as file:
        np.save(file, X)
    return path / "data.npz"


def corrupt_npz(path: Path) -> Path:
    file = path / "data.npz"
    np.savez_compressed(file, x=np.random.default_rng(0).normal(size=(10, 9, 9)), y=Y)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 255
    file.write_bytes(data)
    return file


def text_file(name: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / name).write_text("a,b")
        return path / name

    return make


X, Y = np.zeros((10, 4, 4)), np.arange(10) % 2
NAN = np.where(np.arange(160).reshape(X.shape) == 7, np.nan, X)

BAD = {
    "missing": (lambda p: p / "none", "none does not exist: pass digits"),
    "extension": (
        text_file("data.csv"),
        "data.csv has an unsupported format: pass digits",
    ),
    "not an npz": (text_file("data.npz"), "data.npz cannot be read as an .npz"),
    "truncated npz": (truncated_npz, "data.npz cannot be read as an .npz"),
    "flipped byte": (corrupt_npz, "data.npz cannot be read as an .npz"),
    "npy": (plain_array, "data.npz cannot be read as an .npz"),
    "no x": (lambda p: npz(p, y=Y), "no array 'x'"),
    "no y": (lambda p: npz(p, x=X), "no array 'y'"),
    "objects": (lambda p: npz(p, x=X, y=np.array([{}] * 10)), "cannot be read"),
    "nan": (lambda p: npz(p, x=NAN, y=Y), "1 values that are not finite"),
    "too large": (lambda p: npz(p, x=X + 1e300, y=Y), "160 values that are not finite"),
    "label count": (lambda p: npz(p, x=X, y=Y[1:]), "10 images in x but 9 labels in y"),
    "table": (lambda p: npz(p, x=X[0], y=Y[:4]), r"shape \(4, 4\), expected"),
    "empty": (lambda p: npz(p, x=X[:0], y=Y[:0]), r"shape \(0, 1, 4, 4\), expected"),
    "text": (lambda p: npz(p, x=X.astype(str), y=Y), "dtype <U32, expected numbers"),
    "channels last": (
        lambda p: npz(p, x=np.zeros((10, 8, 8, 3)), y=Y),
        r"channels last: save x.transpose\(0, 3, 1, 2\)",
    ),
    "float labels": (lambda p: npz(p, x=X, y=Y / 1), "dtype float64, expected one"),
    "two labels": (lambda p: npz(p, x=X, y=Y[:, None]), r"shape \(10, 1\)"),
    "one class": (lambda p: npz(p, x=X, y=0 * Y), "has only one class, '0'"),
    "rare class": (
        lambda p: npz(p, x=X, y=np.arange(10) // 6),
        "4 images of the class '1', expected at least 5",
    ),
    "no class folder": (lambda p: p, "contains no class folder"),
    "one class folder": (
        changed_folder(lambda p: (p / "dog").rename(p.parent / "dog")),
        "has only one class, 'cat'",
    ),
    "empty class folder": (
        changed_folder(lambda p: (p / "cow").mkdir()),
        "cow contains no image",
    ),
    "file among folders": (
        changed_folder(lambda p: (p / "labels.txt").write_text("")),
        "labels.txt is a file among the class folders",
    ),
    "truncated image": (
        changed_folder(lambda p: truncate(p / "dog" / "3.png")),
        r"dog/3.png cannot be read as an image",
    ),
    "no image": (
        changed_folder(lambda p: (p / "dog" / "a.png").write_text("text")),
        r"dog/a.png cannot be read as an image",
    ),
    "nested folder": (
        changed_folder(lambda p: (p / "dog" / "more").mkdir()),
        "dog/more cannot be read as an image",
    ),
    "16 bits": (
        changed_folder(lambda p: Image.new("I;16", (4, 4)).save(p / "dog" / "0.png")),
        "0.png has more than 8 bits per channel",
    ),
    "few images": (
        lambda p: folder(p / "images", per_class=4),
        "4 images of the class 'cat'",
    ),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_invalid_data_is_an_error_of_one_line(tmp_path, make, message):
    with pytest.raises(InputError, match=message) as caught:
        read(str(make(tmp_path)))
    assert "\n" not in str(caught.value)
