"""The ranks of a training run: the processes of torchrun, or this process alone."""

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
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from larskit.app import InputError
from larskit.cores import usable_cores

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Shard = Literal["fsdp2"]
NoSync = Callable[[], AbstractContextManager[object]]
TIMEOUT = timedelta(minutes=10)
# Seconds. torchrun kills its processes 30 s after forwarding a signal to them, so the
# message must come earlier.
GRACE = 20.0


@dataclass
class Ranks:
    """The position of this process among the processes of a training run.

    With a single process, no method communicates.

    Parameters
    ----------
    rank, size : int
        Rank and number of all processes. Only rank 0 prints and writes files.
    local_rank, local_size : int
        Rank and number of the processes of this machine.
    store : torch.distributed.Store, optional
        The key-value store of the process group; None outside torchrun.

    Attributes
    ----------
    recovery_hint : str
        What the user should do if a rank is lost now. It completes the error message.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    store: "dist.Store | None" = None
    recovery_hint: str = "nothing has been saved yet, so start again"
    _signal_agreed: Event = field(default_factory=Event)
    _pending_signal: tuple[Any, Tensor] | None = None

    @property
    def launched(self) -> bool:
        """Whether torchrun started the processes."""
        return self.store is not None

    @property
    def launch_command(self) -> str:
        """The command that starts larskit with the same number of processes."""
        if not self.launched:
            return "larskit"
        return f"torchrun --nproc-per-node {self.local_size} -m larskit"

    @property
    def threads(self) -> int | None:
        """Cores that this process may use; None if it is alone on its machine."""
        if self.local_size == 1:
            return None
        return max(1, usable_cores() // self.local_size)

    def local_parts(self, images: Tensor, parts: int = 1) -> tuple[Tensor, ...]:
        """Split images into parts, and return this rank's share of each part."""
        return images.tensor_split(parts * self.size)[self.rank :: self.size]

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Stack the tensors of all ranks; a single rank returns its own unchanged."""
        if self.size == 1:
            return x
        rows = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(rows, x)
        return torch.stack(rows)

    def local_sums(self, gathered: Tensor) -> Tensor:
        """Return this rank's row of the 1-d sums that `all_gather` stacked.

        If another number of ranks gathered them, rank 0 gets the total and the other
        ranks get zeros: the sum over all ranks stays the same.
        """
        rows = torch.atleast_2d(gathered)
        if len(rows) == self.size:
            return rows[self.rank]
        return rows.sum(0) * (self.rank == 0)

    def agreed_signal(self, signals: list[int]) -> int:
        """Return a signal that any rank has caught, or 0; the same on all ranks.

        With several ranks, a call returns the result of the all-reduce that the
        previous call started. No rank waits for the others.
        """
        number, agreed = max(signals, default=0), 0
        if self.size == 1:
            return number
        if self._pending_signal is not None:
            work, maximum = self._pending_signal
            work.wait()
            agreed = int(maximum)
        maximum = torch.tensor(number)
        work = dist.all_reduce(maximum, dist.ReduceOp.MAX, async_op=True)
        self._pending_signal = work, maximum
        if agreed:
            self._signal_agreed.set()
        return agreed

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Raise an `InputError` of the block on all ranks if it occurs on any."""
        if self.size == 1:
            yield
            return
        messages: list[str | None] = [None] * self.size
        try:
            yield
        except InputError as error:
            dist.all_gather_object(messages, str(error))
        else:
            dist.all_gather_object(messages, None)
        for message in filter(None, messages):
            raise InputError(message)

    def distribute(
        self, model: nn.Module, shard: Shard | None
    ) -> tuple[nn.Module, NoSync]:
        """Wrap a model so that its backward pass averages gradients over the ranks.

        Parameters
        ----------
        model : torch.nn.Module
            A model on its device. With `shard`, its parameters become sharded in place.
        shard : {"fsdp2"}, optional
            Shard weights, gradients and optimizer state over the ranks (FSDP2). None
            replicates them (DDP).

        Returns
        -------
        torch.nn.Module
            The module to call instead of the model.
        callable
            Returns a context manager that disables gradient communication.
        """
        if shard is not None:
            return _fully_sharded(model, self.size)
        if self.size == 1:
            return model, nullcontext
        # DDP warns about the stride of an axis of size 1, which has no effect. The
        # first kernel of a grayscale model has such an axis.
        warnings.filterwarnings("ignore", "Grad strides do not match")
        replicated = DistributedDataParallel(model)
        return replicated, replicated.no_sync

    def full_state(self, state: Any) -> Any:
        """Return a state dict with sharded tensors gathered.

        This is a collective: all ranks must call it. Rank 0 gets the full tensors, the
        others get None in their place.
        """
        if isinstance(state, dict):
            full = copy(state)
            full.update((name, self.full_state(x)) for name, x in state.items())
            return full
        if _is_sharded(state):
            tensor = state.full_tensor()
            return tensor.cpu() if self.rank == 0 else None
        return state

    @contextmanager
    def detect_lost_ranks(self) -> Iterator[None]:
        """Report the loss of another rank during the block, and exit.

        With gloo, a collective raises an error when a rank has died. With NCCL, it can
        block forever, and a blocked process runs no Python signal handler. In that case
        a thread prints the message after a signal, before torchrun kills the process.
        """
        if self.size == 1:
            yield
            return
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        previous_fd = signal.set_wakeup_fd(write_fd)
        thread = Thread(target=self._report_hang, args=(read_fd,), daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:
            self.exit_if_rank_lost(error)
            raise
        finally:
            signal.set_wakeup_fd(previous_fd)
            self._signal_agreed.set()
            os.close(write_fd)
            thread.join()
            os.close(read_fd)

    def _report_hang(self, read_fd: int) -> None:
        """Wait for a signal, then report if the ranks do not agree on it in time."""
        if os.read(read_fd, 1) and not self._signal_agreed.wait(GRACE):
            self._report(
                f"the current step has not finished {GRACE:g} s after a signal; one of "
                f"the {self.size} processes may have died or stopped responding"
            )

    def exit_if_rank_lost(self, error: Exception) -> None:
        """Exit immediately if an error means a lost rank: cleanup could block."""
        if isinstance(error, dist.DistError) or "gloo/" in str(error):
            self._report(
                f"one of the {self.size} processes has died or stopped responding, so "
                "the others exit"
            )
            sys.stdout.flush()
            os._exit(1)

    def _report(self, problem: str) -> None:
        if self._is_first_report():
            message = f"larskit: {problem}: {self.recovery_hint}"
            print(message, file=sys.stderr, flush=True)

    def _is_first_report(self) -> bool:
        """Whether no other rank has reported yet; True if the store is lost too."""
        assert self.store is not None
        try:
            self.store.set_timeout(timedelta(seconds=2))
            return self.store.add("larskit/lost", 1) == 1
        except RuntimeError:
            return True


_current = Ranks()


def current_ranks() -> Ranks:
    """Return the ranks of the process group; a single rank if there is none."""
    return _current


@contextmanager
def process_group() -> Iterator[None]:
    """Initialize the process group of torchrun, and destroy it after the block."""
    global _current
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT
    )
    local = [int(os.environ[f"LOCAL_{what}"]) for what in ("RANK", "WORLD_SIZE")]
    _current = Ranks(rank, size, local[0], local[1], store)
    try:
        yield
        # Once a process exits with an error, torchrun sends SIGTERM to the others. They
        # must reach the barrier and exit with their own code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        _current.exit_if_rank_lost(error)
        raise


def shard_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Shard a full tensor as `like` is sharded.

    The tensor is returned unchanged if `like` is not sharded or has another shape.
    """
    if not (_is_sharded(like) and tensor.shape == like.shape):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements)


def _fully_sharded(model: nn.Module, size: int) -> tuple[nn.Module, NoSync]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from larskit.app.models import Residual

    mesh = init_device_mesh(next(model.parameters()).device.type, (size,))
    for module in model.modules():
        if isinstance(module, Residual):
            fully_shard(module, mesh=mesh)
    sharded: Any = fully_shard(model, mesh=mesh)

    @contextmanager
    def no_sync() -> Iterator[None]:
        sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            sharded.set_requires_gradient_sync(True)

    return sharded, no_sync


def _is_sharded(x: object) -> "TypeGuard[DTensor]":
    # By name, so that a run without sharding does not import torch.distributed.tensor.
    return type(x).__name__ == "DTensor"
