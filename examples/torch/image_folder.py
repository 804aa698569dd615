"""Load images from one folder per class, in batches for each of several processes."""

from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed as dist
from torch.utils.data import DataLoader, DistributedSampler


def loader(folder, batch, classes, size, workers, *, augment) -> Any:
    """Return batches of bytes (images, size, size, 3) and labels for this process.

    Augmentation shuffles, crops and mirrors. If the images cannot be divided equally,
    training drops a few; validation adds copies with the label -100, which is ignored.
    """
    files: Any = sorted(folder.glob("*/*"))
    files = [(file, classes.index(file.parent.name)) for file in files]
    if not augment:
        files += [(files[0][0], -100)] * (-len(files) % dist.get_world_size())
    return DataLoader(
        files,
        batch,
        sampler=DistributedSampler(files, shuffle=augment, drop_last=augment),
        collate_fn=partial(load, size=size, augment=augment),
        drop_last=augment,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def load(files, size, augment):
    """Read images, and crop them to squares."""
    images = []
    for file, _ in files:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
        if augment:
            image = image.resize((size, size), box=random_box(*image.size))
            images.append(ImageOps.mirror(image) if torch.rand(()) < 0.5 else image)
        else:
            images.append(ImageOps.fit(image, (size, size), bleed=1 / 16))
    return torch.from_numpy(np.stack(images)), torch.tensor([y for _, y in files])


def random_box(width, height):
    """Choose a box of 8 to 100 % of the area, with an aspect between 3:4 and 4:3."""
    area, aspect, x, y = torch.rand(4).tolist()
    area, aspect = width * height * (0.08 + 0.92 * area), (4 / 3) ** (2 * aspect - 1)
    w, h = min(width, (area * aspect) ** 0.5), min(height, (area / aspect) ** 0.5)
    x, y = x * (width - w), y * (height - h)
    return x, y, x + w, y + h
