"""The processes that train together: those of torchrun, or this one alone."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from datetime import timedelta
from threading import Event, Thread
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from larskit.app import InputError
from larskit.cores import usable_cores

Shard = Literal["fsdp2"]
TIMEOUT = timedelta(minutes=10)
GRACE = 20.0  # seconds; torchrun kills 30 s after the signal that it passes on


@dataclass
class Ranks:
    """The processes that train together, as one of them sees them.

    Where there is one process only, nothing is communicated.

    Parameters
    ----------
    rank, size : int
        Which of how many this is. Rank 0 alone prints and writes.
    local_rank, local_size : int
        The same among those of this machine.
    store : torch.distributed.Store, optional
        Where they leave word to each other.

    Attributes
    ----------
    advice : str
        What the user should do if a rank is lost now: the end of a sentence.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: Any = None
    advice: str = "nothing has been saved yet, so start again"
    _heard: Event = field(default_factory=Event)
    _asked: tuple[Any, Tensor] | None = None

    @property
    def launched(self) -> bool:
        """Whether torchrun started them."""
        return self.store is not None

    @property
    def command(self) -> str:
        """What to call larskit by, to have as many processes again."""
        if not self.launched:
            return "larskit"
        return f"torchrun --nproc-per-node {self.local_size} -m larskit"

    @property
    def threads(self) -> int | None:
        """How many cores this process may use; None if it has all for itself."""
        if self.local_size == 1:
            return None
        return max(1, usable_cores() // self.local_size)

    def share(self, images: Tensor, parts: int = 1) -> tuple[Tensor, ...]:
        """Split images into parts, and return what this rank has of each."""
        return images.tensor_split(parts * self.size)[self.rank :: self.size]

    def sum(self, x: Tensor) -> Tensor:
        """Add up a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def gather(self, x: Tensor) -> Tensor:
        """Return a tensor as it is, of several ranks stacked."""
        if self.size == 1:
            return x
        rows = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(rows, x)
        return torch.stack(rows)

    def own(self, gathered: Tensor) -> Tensor:
        """Return this rank's part of 1-d sums that as many ranks or others gathered."""
        rows = torch.atleast_2d(gathered)
        if len(rows) == self.size:
            return rows[self.rank]
        return rows.sum(0) * (self.rank == 0)

    def signalled(self, signals: list[int]) -> int:
        """Return a signal that any rank has caught, the same on all; else 0.

        Several ranks learn of it one call later, so that none waits for the others.
        """
        number, known = max(signals, default=0), 0
        if self.size == 1:
            return number
        if self._asked is not None:
            work, greatest = self._asked
            work.wait()
            known = int(greatest)
        greatest = torch.tensor(number)
        self._asked = (
            dist.all_reduce(greatest, dist.ReduceOp.MAX, async_op=True),
            greatest,
        )
        if known:
            self._heard.set()
        return known

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Raise an `InputError` of the block on all ranks, whichever has it."""
        if self.size == 1:
            yield
            return
        found: list[str | None] = [None] * self.size
        try:
            yield
        except InputError as why:
            dist.all_gather_object(found, str(why))
        else:
            dist.all_gather_object(found, None)
        for sentence in filter(None, found):
            raise InputError(sentence)

    def spread(
        self, model: nn.Module, shard: Shard | None
    ) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
        """Have the backward pass average the gradients over the ranks.

        Parameters
        ----------
        model : torch.nn.Module
            On its device; `shard` replaces its parameters by sharded ones.
        shard : {"fsdp2"}, optional
            Spread weights, gradients and state over the ranks; None: copy them (DDP).

        Returns
        -------
        torch.nn.Module
            To be called in place of the model.
        callable
            Makes a context in which the gradients are not communicated.
        """
        if shard is not None:
            return _sharded(model, self.size)
        if self.size == 1:
            return model, nullcontext
        # it warns about the stride of an axis of size 1, as in kernels for grey images
        warnings.filterwarnings("ignore", "Grad strides do not match")
        copied = DistributedDataParallel(model)
        return copied, copied.no_sync

    def whole(self, state: Any) -> Any:
        """Return a state dict with whole tensors; rank 0 alone gets the sharded ones.

        All ranks must ask.
        """
        if isinstance(state, dict):
            found = copy(state)
            found.update((name, self.whole(x)) for name, x in state.items())
            return found
        if _is_sharded(state):
            full = state.full_tensor()
            return full.cpu() if self.rank == 0 else None
        return state

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Say so, and end, if another rank is lost while this one trains.

        A dead rank ends a collective of gloo with an error. One of NCCL can wait for
        it for ever, and for signals a waiting process is deaf: then a thread says so,
        before torchrun, whose signal it was, kills what is left.
        """
        if self.size == 1:
            yield
            return
        ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        before = signal.set_wakeup_fd(mouth)
        watch = Thread(target=self._watch, args=(ear,), daemon=True)
        watch.start()
        try:
            yield
        except RuntimeError as why:
            self.end_if_lost(why)
            raise
        finally:
            signal.set_wakeup_fd(before)
            self._heard.set()
            os.close(mouth)
            watch.join()
            os.close(ear)

    def _watch(self, ear: int) -> None:
        if os.read(ear, 1) and not self._heard.wait(GRACE):
            self._say(
                f"the step at hand has not ended {GRACE:g} s after a signal, perhaps "
                f"as one of the {self.size} processes has died or does not answer"
            )

    def end_if_lost(self, why: Exception) -> None:
        """End at once, if an error says so: tidying up may wait for ever."""
        if isinstance(why, dist.DistError) or "gloo/" in str(why):
            self._say(
                f"one of the {self.size} processes has died or does not answer, so the "
                "others end too"
            )
            sys.stdout.flush()
            os._exit(1)

    def _say(self, what: str) -> None:
        if self._is_first():
            print(f"larskit: {what}: {self.advice}", file=sys.stderr, flush=True)

    def _is_first(self) -> bool:
        """Whether no other rank has been here, as far as can be known."""
        try:
            self.store.set_timeout(timedelta(seconds=2))
            return self.store.add("larskit/lost", 1) == 1
        except RuntimeError:  # the store was lost as well
            return True


_here = Ranks()


def here() -> Ranks:
    """Return the ranks that this process has joined; itself alone if none."""
    return _here


@contextmanager
def joined() -> Iterator[None]:
    """Be one of the processes that torchrun has started."""
    global _here
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    local = [int(os.environ[f"LOCAL_{what}"]) for what in ("RANK", "WORLD_SIZE")]
    _here = Ranks(rank, size, local[0], local[1], store)
    try:
        yield
        # torchrun ends those that are still there when one has ended with an error
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as why:
        _here.end_if_lost(why)
        raise


def place(tensor: Any, like: Any) -> Any:
    """Return a whole tensor placed as `like` is, if that is sharded and so shaped."""
    if not (_is_sharded(like) and tensor.shape == like.shape):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    whole = tensor.to(like.device)
    return distribute_tensor(whole, like.device_mesh, like.placements)


def _sharded(
    model: nn.Module, size: int
) -> tuple[nn.Module, Callable[[], AbstractContextManager[Any]]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from larskit.app.models import Residual

    mesh = init_device_mesh(next(model.parameters()).device.type, (size,))
    for module in model.modules():
        if isinstance(module, Residual):
            fully_shard(module, mesh=mesh)
    sharded: Any = fully_shard(model, mesh=mesh)

    @contextmanager
    def apart() -> Iterator[None]:
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    return sharded, apart


def _is_sharded(x: Any) -> bool:
    return type(x).__name__ == "DTensor"
