"""Labeled images from scikit-learn's digits, a folder of class folders or an npz."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from larskit.app import InputError

if TYPE_CHECKING:
    from PIL import Image

# A fifth of each class is the test set, independent of `Settings.seed`.
TEST_EVERY, SPLIT_SEED = 5, 0
FOLDER_SIZE = 32


@dataclass(frozen=True)
class Data:
    """Images, their labels, and their split into training and test images.

    Parameters
    ----------
    x : uint8 or float32 array of shape (images, channels, height, width)
        The images, not normalized.
    y : int64 array of shape (images,)
        The class indices, starting at 0.
    classes : tuple of str
        The name of each class.
    """

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]

    @cached_property
    def test(self) -> np.ndarray:
        """Indices of the test images: a fifth of each class, by a fixed seed."""
        order = np.random.default_rng(SPLIT_SEED).permutation(len(self.y))
        by_class = order[np.argsort(self.y[order], kind="stable")]
        return by_class[::TEST_EVERY]

    @cached_property
    def train(self) -> np.ndarray:
        """Indices of the training images, shuffled with a fixed seed."""
        others = np.setdiff1d(np.arange(len(self.y)), self.test)
        return np.random.default_rng(SPLIT_SEED).permutation(others)

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel of the training images.

        Both are float32. A constant channel has the deviation 1.
        """
        x, axes = self.x[self.train], (0, 2, 3)
        mean = x.mean(axes, dtype=np.float64)
        std = x.std(axes, dtype=np.float64)
        std[std == 0] = 1
        return mean.astype(np.float32), std.astype(np.float32)

    @cached_property
    def fingerprint(self) -> str:
        """A SHA-256 hash of the images and labels."""
        digest = hashlib.sha256(repr((self.x.shape, self.x.dtype.str)).encode())
        digest.update(np.ascontiguousarray(self.x).data)
        digest.update(np.ascontiguousarray(self.y).data)
        return digest.hexdigest()


def read(source: str, image_size: int | None = None) -> Data:
    """Read labeled images.

    Parameters
    ----------
    source : str
        ``"digits"``, a folder with one folder of images per class, or an ``.npz`` file
        with ``x`` of shape (images, height, width) or (images, channels, height,
        width) and ``y`` of integers or strings.
    image_size : int, optional
        Height and width in pixels to which every image is resized. None keeps the size
        of digits and arrays, and resizes the images of a folder to 32.

    Returns
    -------
    Data

    Raises
    ------
    InputError
        The source cannot be read, or has too few classes or images.
    """
    path = Path(source)
    if source == "digits":
        data = _digits()
    elif not path.exists():
        raise InputError(
            f"--data {source} does not exist: pass digits, a folder of class folders, "
            "or an .npz file"
        )
    elif path.is_dir():
        return _checked(_folder(path, image_size or FOLDER_SIZE), source)
    elif path.suffix == ".npz":
        data = _npz(path)
    else:
        raise InputError(
            f"--data {source} has an unsupported format: pass digits, a folder of "
            "class folders, or an .npz file"
        )
    _checked(data, source)
    return data if image_size is None else _resized(data, image_size)


def _checked(data: Data, source: str) -> Data:
    if len(data.classes) < 2:
        raise InputError(
            f"--data {source} has only one class, {''.join(data.classes)!r}: add "
            "images of at least one other class"
        )
    for name, count in zip(data.classes, np.bincount(data.y), strict=True):
        if count < TEST_EVERY:
            raise InputError(
                f"--data {source} has {count} images of the class {name!r}, expected "
                f"at least {TEST_EVERY} (a fifth is for testing): add images or remove "
                "the class"
            )
    return data


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = bunch.images[:, None].astype(np.float32)
    return Data(x, bunch.target.astype(np.int64), tuple(map(str, range(10))))


def _folder(path: Path, size: int) -> Data:
    folders = list(_visible(path))
    for entry in folders:
        if not entry.is_dir():
            raise InputError(
                f"{entry} is a file among the class folders: move it into one of them "
                "or delete it"
            )
    if not folders:
        raise InputError(
            f"--data {path} contains no class folder: create one folder of images per "
            "class"
        )
    files, y = [], []
    for label, folder in enumerate(folders):
        images = list(_visible(folder))
        if not images:
            raise InputError(
                f"{folder} contains no image: add images or delete the folder"
            )
        files += images
        y += [label] * len(images)
    x = _images(files, size)
    return Data(x, np.array(y), tuple(folder.name for folder in folders))


def _visible(path: Path) -> Iterator[Path]:
    yield from sorted(p for p in path.iterdir() if not p.name.startswith("."))


def _images(files: list[Path], size: int) -> np.ndarray:
    """Decode every file to one size: grayscale if all files are, else RGB."""
    images = [_image(file, size) for file in files]
    gray = all(image.mode == "L" for image in images)
    arrays = [np.asarray(image if gray else image.convert("RGB")) for image in images]
    x = np.stack(arrays)
    return x[:, None] if gray else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _image(file: Path, size: int) -> "Image.Image":
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
    except Exception as why:  # decoders raise any exception on corrupt files
        raise InputError(
            f"{file} cannot be read as an image: {_one_line(why)}; replace or delete it"
        ) from why
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"{file} has more than 8 bits per channel (mode {image.mode}): convert it "
            "to 8 bits, or pass an .npz file"
        )
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)


def _npz(path: Path) -> Data:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("x", "y") if name in file.files}
    except Exception as why:  # NumPy raises any exception on corrupt files
        raise InputError(
            f"{path} cannot be read as an .npz file: {_one_line(why)}; save it again "
            "with numpy.savez"
        ) from why
    for name in ("x", "y"):
        if name not in arrays:
            raise InputError(
                f"{path} has no array {name!r}: save it with numpy.savez(file, x=..., "
                "y=...)"
            )
    x, y = _npz_images(path, arrays["x"]), arrays["y"]
    if y.ndim != 1 or y.dtype.kind not in "iuUS":
        raise InputError(
            f"y in {path} has the shape {y.shape} and the dtype {y.dtype}, expected "
            "one integer or string per image: save the labels as a 1-d array"
        )
    if len(x) != len(y):
        raise InputError(
            f"{path} has {len(x)} images in x but {len(y)} labels in y: save one label "
            "per image"
        )
    classes, labels = np.unique(y, return_inverse=True)
    return Data(x, labels.astype(np.int64), tuple(map(str, classes.tolist())))


def _npz_images(path: Path, x: np.ndarray) -> np.ndarray:
    if x.dtype.kind not in "biuf":
        raise InputError(
            f"x in {path} has the dtype {x.dtype}, expected numbers: save uint8 or "
            "float32"
        )
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim != 4 or 0 in x.shape:
        raise InputError(
            f"x in {path} has the shape {x.shape}, expected (images, height, width) or "
            "(images, channels, height, width) without empty axes: reshape it"
        )
    if x.shape[3] in (1, 3, 4) and x.shape[1] not in (1, 3, 4):
        raise InputError(
            f"x in {path} has the shape {x.shape}, which looks like channels last: "
            "save x.transpose(0, 3, 1, 2)"
        )
    if x.dtype == np.uint8:
        return x
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    if bad := np.count_nonzero(~np.isfinite(x)):
        raise InputError(
            f"x in {path} has {bad} values that are not finite in float32: remove or "
            "rescale them"
        )
    return x


def _resized(data: Data, size: int) -> Data:
    import torch
    from torch.nn.functional import interpolate

    x = torch.from_numpy(data.x.astype(np.float32))
    x = interpolate(x, (size, size), mode="bilinear", antialias=True)
    return Data(x.numpy(), data.y, data.classes)


def _one_line(error: Exception) -> str:
    """Return an exception's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__
