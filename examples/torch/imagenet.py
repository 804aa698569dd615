"""Train a ResNet-50 with LARS on ImageNet, or on any other folder of images.

    torchrun --nproc-per-node 8 examples/torch/imagenet.py IMAGENET --batch 8192 --bf16

needs `pip install 'larskit[app]'`; under plain python it is one process. The recipes
are reference points of MLPerf Training (mlcommons/logging, rcps_resnet.json: 75.9 %),
with the label smoothing of NVIDIA's runs, and epochs to spare. As there, biases and
norms are neither adapted nor decayed, and step at the raw rate. Ours is the rate below
1,632 images. Crops and first weights differ: measure before you claim that accuracy.
"""

import argparse
from pathlib import Path

import torch
from image_folder import loader
from torch import distributed as dist
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from larskit.app import models
from larskit.state import atomic
from larskit.torch import LARS, param_groups

# From this batch on, of all processes: peak rate, warm-up, epochs, decay, momentum.
RECIPES = {
    1632: (7.4, 2, 37, 5e-5, 0.9),
    4096: (10.0, 5, 42, 2e-4, 0.9),
    8192: (17.0, 5, 44, 2e-4, 0.9),
    32768: (21.2, 16, 58, 2.5e-5, 0.94),
    65536: (24.699, 31, 89, 1e-4, 0.951807),
}
WHOLE = states.StateDictOptions(full_state_dict=True, cpu_offload=True)


def arguments():
    parser = argparse.ArgumentParser(description="ResNet-50 on ImageNet with LARS")
    add = parser.add_argument
    add("data", type=Path, help="folder of train/CLASS/IMAGE and val/CLASS/IMAGE")
    add("--batch", type=int, default=4096, help="images a step, of all processes")
    add("--accumulate", type=int, default=1, help="parts of a batch, to save memory")
    add("--epochs", type=int, help="default of this and the next four: see RECIPES")
    for name in ("--lr", "--warmup", "--decay", "--momentum"):
        add(name, type=float)
    add("--model", choices=("resnet18", "resnet50"), default="resnet50")
    add("--image-size", type=int, default=224)
    add("--shard", choices=("ddp", "fsdp2"), default="ddp")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    add("--workers", type=int, default=8, help="of each process, to load images")
    add("--checkpoint", type=Path, default="imagenet.pt", help="resumed if there")
    batch = parser.parse_args().batch
    least = max((n for n in RECIPES if n <= batch), default=min(RECIPES))
    lr, warmup, epochs, decay, momentum = RECIPES[least]
    parser.set_defaults(warmup=warmup, epochs=epochs, decay=decay, momentum=momentum)
    parser.set_defaults(lr=lr * min(1, batch / least))
    return parser.parse_args()


def forward(model, batch, args, smoothing=0.0):
    """Return the mean loss, and the sums of losses, hits and images."""
    images, labels = (x.to(args.device, non_blocking=True) for x in batch)
    with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
        logits = model(images.permute(0, 3, 1, 2) / 127.5 - 1).float()
    loss = cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    hits, seen = (logits.argmax(1) == labels).sum(), (labels >= 0).sum()
    return loss / len(labels), torch.stack([loss.detach(), hits, seen])


def train(model, optimizer, images, epoch, args):
    model.train()
    steps, batches, sums = len(images) // args.accumulate, iter(images), 0
    warmup, end = max(args.warmup * steps, 1), args.epochs * steps
    for step in range(epoch * steps, (epoch + 1) * steps):
        falling = ((end - step) / max(end - warmup, 1)) ** 2
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min((step + 1) / warmup, falling)
        for _ in range(args.accumulate):
            loss, found = forward(model, next(batches), args, smoothing=0.1)
            (loss / args.accumulate).backward()
            sums += found
        optimizer.step()
        optimizer.zero_grad()
    return averages(sums)


@torch.no_grad()
def validate(model, images, args):
    model.eval()
    for buffer in filter(torch.is_floating_point, model.buffers()):
        dist.all_reduce(buffer, dist.ReduceOp.AVG)  # the statistics of batch norm
    return averages(sum(forward(model, batch, args)[1] for batch in images))


def averages(sums):
    dist.all_reduce(sums)
    return (sums[:2] / sums[2]).tolist()


def parallelize(model, how):
    if how == "ddp":
        return DistributedDataParallel(model.to(memory_format=torch.channels_last))
    for module in (*model, model):
        fully_shard(module)
    return model


def main():
    args = arguments()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank(0))
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(**{} if dist.is_torchelastic_launched() else alone)
    part, rest = divmod(args.batch, args.accumulate * dist.get_world_size())
    classes = sorted(folder.name for folder in (args.data / "train").iterdir())
    options = part, classes, args.image_size, args.workers
    images = loader(args.data / "train", *options, augment=True)
    others = loader(args.data / "val", *options, augment=False)
    if rest or len(images) < args.accumulate:
        raise SystemExit("--batch: too large, or no multiple of processes x accumulate")
    torch.manual_seed(0)
    model = models.build(args.model, 3, len(classes), args.image_size)
    parallel = parallelize(model.to(args.device), args.shard)
    optimizer = LARS(param_groups(model), args.lr, args.momentum, args.decay)
    first = 0
    if args.checkpoint.exists():
        first, weights, state = torch.load(args.checkpoint, map_location="cpu")
        states.set_model_state_dict(model, weights, options=WHOLE)
        states.set_optimizer_state_dict(model, optimizer, state, options=WHOLE)
    for epoch in range(first, args.epochs):
        images.sampler.set_epoch(epoch)
        torch.manual_seed(epoch * dist.get_world_size() + dist.get_rank())
        loss, _ = train(parallel, optimizer, images, epoch, args)
        val_loss, accuracy = validate(parallel, others, args)
        weights, state = states.get_state_dict(model, optimizer, options=WHOLE)
        if dist.get_rank() == 0:
            with atomic(args.checkpoint) as file:
                torch.save((epoch + 1, weights, state), file)
            stats = optimizer.layer_stats().values()
            ratios = [x.ratio for x in stats if x.ratio != 1]
            told = f"epoch {epoch + 1}: loss {loss:.4f}, validation {val_loss:.4f} and "
            told += f"{accuracy:.2%}, ratios {min(ratios):.2g} to {max(ratios):.2g}"
            print(told, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
