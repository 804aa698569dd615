"""The examples run as a user runs them, learn, and warn of nothing of their own."""

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "torch"
VARIABLES = {"PYTHONWARNINGS": "always", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
COLOURS = {"red": (200, 60, 60), "green": (60, 200, 60), "blue": (60, 60, 200)}
FEW = {"train": 12, "val": 3}
SMALL = ("--model", "resnet18", "--image-size", "64", "--batch", "12", "--workers", "1")
FAST = ("--lr", "1", "--warmup", "1")
LINE = re.compile(
    r"epoch (\d+): loss (\S+), validation (\S+) and (\S+)%, ratios (\S+) to (\S+)"
)


def start(script, *options, processes=1):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
    several = ["-m", *torchrun, str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *several, EXAMPLES / script, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | VARIABLES,
    )


def run(script, *options, processes=1):
    with start(script, *options, processes=processes) as process:
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-3000:]
    warnings = [line for line in err.splitlines() if "Warning:" in line]
    ours = (f"{ROOT / 'src'}", f"{EXAMPLES}")
    assert not [line for line in warnings if line.startswith(ours)]
    return out


def imagenet(*options, processes=1):
    """Return (epoch, loss, validation loss, accuracy, two ratios) of each epoch."""
    out = run("imagenet.py", *SMALL, *FAST, *options, processes=processes)
    return [tuple(map(float, row)) for row in LINE.findall(out)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Make a folder of noisy images of three colours."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, number in FEW.items():
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.normal(colour, 60, (40, 44, 3)).clip(0, 255)
                image = Image.fromarray(pixels.astype(np.uint8))
                image.save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """Train without interruption."""
    checkpoint = tmp_path_factory.mktemp("whole") / "imagenet.pt"
    return imagenet(images, "--checkpoint", checkpoint, "--epochs", 3)


@pytest.fixture(scope="module")
def parallel(images, tmp_path_factory):
    """Train in two processes, with whole and with sharded parameters."""
    folder, found = tmp_path_factory.mktemp("parallel"), {}
    for shard in ("ddp", "fsdp2"):
        checkpoint = folder / f"{shard}.pt"
        options = ("--checkpoint", checkpoint, "--epochs", 2, "--shard", shard)
        found[shard] = imagenet(images, *options, processes=2), checkpoint
    return found


def test_imagenet_learns(whole):
    epochs, losses, _, accuracies, low, high = zip(*whole, strict=True)
    assert epochs == (1, 2, 3)
    assert losses[-1] < 0.6 * losses[0]
    assert max(accuracies) > 50
    assert all(0 < least < most < 1 for least, most in zip(low, high, strict=True))


@pytest.mark.distributed
def test_imagenet_goes_on_after_a_kill(images, whole, tmp_path):
    options = (images, "--checkpoint", tmp_path / "imagenet.pt", "--epochs", 3)
    with start("imagenet.py", *SMALL, *FAST, *options) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("epoch 1")
        process.kill()
    rest = imagenet(*options)
    assert 1 <= len(rest) <= 2
    expected = [pytest.approx(row[:3], rel=1e-2) for row in whole[-len(rest) :]]
    assert [row[:3] for row in rest] == expected


@pytest.mark.distributed
def test_imagenet_is_the_same_with_ddp_and_fsdp2(parallel):
    (ddp, whole), (fsdp2, sharded) = parallel.values()
    assert [row[:2] for row in ddp] == [pytest.approx(row[:2]) for row in fsdp2]
    (epoch, weights, _), (_, others, _) = map(torch.load, (whole, sharded))
    assert epoch == 2
    assert weights.keys() == others.keys()
    for name, w in weights.items():
        if "running" not in name:  # statistics: DDP hands round those of one process
            torch.testing.assert_close(w, others[name], rtol=1e-3, atol=1e-4)


@pytest.mark.distributed
def test_imagenet_validates_each_image_once(parallel):
    for rows, _ in parallel.values():
        hits = np.array([row[3] for row in rows]) / 100 * len(COLOURS) * FEW["val"]
        np.testing.assert_allclose(hits, hits.round(), atol=0.01)


@pytest.mark.distributed
def test_imagenet_goes_on_otherwise_than_it_began(images, parallel):
    """A checkpoint of sharded parameters, alone, in bfloat16 and parts of batches."""
    rows, checkpoint = parallel["fsdp2"]
    options = ("--checkpoint", checkpoint, "--epochs", 3, "--bf16", "--accumulate", 2)
    ((epoch, loss, *_),) = imagenet(images, *options)
    assert epoch == 3
    assert loss < rows[0][1]


@pytest.mark.parametrize(
    ("options", "lr", "warmup", "epochs", "decay"),
    [
        ("--batch 816", 3.7, 2, 37, 5e-5),
        ("--batch 4096", 10, 5, 42, 2e-4),
        ("--batch 10000", 17, 5, 44, 2e-4),
        ("--batch 65536 --lr 20 --epochs 90", 20, 31, 90, 1e-4),
    ],
)
def test_imagenet_takes_the_recipe_of_the_batch(
    options, lr, warmup, epochs, decay, monkeypatch
):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["imagenet.py", "IMAGENET", *options.split()])
    args = import_module("imagenet").arguments()
    assert (args.lr, args.warmup) == (lr, warmup)
    assert (args.epochs, args.decay) == (epochs, decay)


def test_random_boxes_lie_inside_and_differ(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    random_box = import_module("image_folder").random_box
    torch.manual_seed(0)
    x, y, right, below = np.array([random_box(400, 300) for _ in range(1000)]).T
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert right.max() <= 400 + 1e-9
    assert below.max() <= 300 + 1e-9
    areas = (right - x) * (below - y) / (400 * 300)
    assert 0.08 <= areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    aspects = (right - x) / (below - y)
    assert 3 / 4 - 1e-9 <= aspects.min() < 0.8 < 1.2 < aspects.max() <= 16 / 9


@pytest.mark.parametrize(
    ("script", "options", "processes"),
    [
        ("lightning_digits.py", (), 1),
        ("accelerate_digits.py", (), 1),
        pytest.param("accelerate_digits.py", ["--bf16"], 2, marks=pytest.mark.slow),
    ],
)
def test_digits(script, options, processes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run(script, *options, processes=processes)
    *_, accuracy = re.findall(r"accuracy\D*([\d.]+)", out)
    assert float(accuracy) > (97 if "%" in out else 0.97)
    assert not list(tmp_path.iterdir())
