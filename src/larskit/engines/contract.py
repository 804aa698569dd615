"""What an engine is: typed Protocols, which all four engines implement.

An engine is a module with two functions: `Engine.unavailable` says why it cannot run at
all, `Engine.bind` ties the arrays of some layers to it. What `bind` returns is a
`Group`, which steps these layers as often as they stay where they are.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from larskit.arrays import Array, Scalar
from larskit.config import Config
from larskit.rule import LayerStats, Norms

Arrays = Sequence[Array]
Buffers = Sequence[Array | None]


class Unsupported(RuntimeError):
    """An engine, or none of them, can process these layers; the message says why.

    Attributes
    ----------
    reasons : dict of str to str
        For each engine that was tried, why it cannot.
    """

    def __init__(self, why: str, reasons: dict[str, str] | None = None) -> None:
        """Keep the reasons."""
        super().__init__(why)
        self.reasons = reasons or {}


class Switches(NamedTuple):
    """Which engine is asked for, and how it must work; see `larskit.torch.LARS`."""

    foreach: bool | None = None
    fused: bool | None = None
    carry_norms: bool = False
    capturable: bool = False
    differentiable: bool = False


DEFAULT = Switches()


class Layers(NamedTuple):
    """The arrays of layers that one engine processes together, one row for each layer.

    All weights share framework, device and dtype, and so do all gradients.

    Attributes
    ----------
    weights, gradients : sequence of array
        Of the same shape in each row.
    buffers : sequence of array or None
        The momentum buffers; None for a layer that has none yet.
    adapt, decay : sequence of bool
        Which layers have a trust ratio, and which are decayed. They take the place of
        the two fields of `Config`.
    out : sequence of array or None, optional
        Receive the results: the new weights, or the scaled gradients. None in a row: a
        new array. None at all: the weights (or the gradients) themselves are written,
        and the buffers too.
    """

    weights: Arrays
    gradients: Arrays
    buffers: Buffers
    adapt: Sequence[bool]
    decay: Sequence[bool]
    out: Buffers | None = None


class Group(Protocol):
    """Layers that are bound to an engine."""

    @property
    def engine(self) -> str:
        """The name of the engine."""
        ...

    @property
    def weights(self) -> Arrays:
        """After a step, the new weights: where these are written, the bound arrays."""
        ...

    @property
    def buffers(self) -> Buffers:
        """The momentum buffers; None for a layer that has none yet."""
        ...

    @property
    def captured(self) -> bool:
        """Whether a CUDA graph uses what this group holds, so that it must be kept."""
        ...

    def rebind(self, gradients: Arrays) -> bool:
        """Use other gradients from now on, if nothing else has changed.

        Returns
        -------
        bool
            False where these gradients do not fit, or an array that was bound is no
            longer where it was. The group must then not be used again.
        """
        ...

    def check(self, lr: Scalar, config: Config) -> None:
        """Refuse a step that cannot be taken as the switches say, before any begins.

        Raises
        ------
        RuntimeError
            A CUDA graph is captured that could not repeat the step.
        """
        ...

    def norms(self, config: Config, grad_scale: Array | None = None) -> Norms:
        """Return ``(|w|, q)`` of each layer, as two vectors; nothing is written.

        Of the gradients divided by `grad_scale`.
        """
        ...

    def step_(
        self,
        lr: Scalar,
        config: Config,
        norms: Norms | None = None,
        *,
        grad_scale: Array | None = None,
        apply_if: bool | Array = True,
        full_stats: bool = False,
    ) -> None:
        """Move the layers along the gradients that were bound last, once.

        Parameters
        ----------
        lr : float, or array of one element
            The learning rate.
        config : Config
            The hyper-parameters.
        norms : pair of vectors, optional
            What `norms` returned, or other norms to take the ratio of.
        grad_scale : array of one element, optional
            What the gradients were multiplied by; they are divided by it, and stay as
            they are.
        apply_if : bool, or array of one bool, default=True
            Where it is false, weights and buffers stay; the statistics are computed all
            the same. A layer that has no buffer yet gets one of zeros where a device
            decides.
        full_stats : bool, default=False
            Also compute the norm of the update, in the same loop; of a skipped step,
            that of the update it would have applied.
        """
        ...

    @property
    def stats(self) -> LayerStats:
        """The statistics of the last step, as vectors in the order of the layers."""
        ...

    def scale_gradients(
        self,
        config: Config,
        norms: Norms | None = None,
        grad_scale: Array | None = None,
    ) -> Arrays:
        """Return ``r*u`` for each layer, see `larskit.rule.scaled_gradient`.

        Parameters
        ----------
        config, norms
            As in `step_`; the norms are those of the gradients as they are.
        grad_scale : array of one element, optional
            What the gradients, and hence the results, were multiplied by.

        Returns
        -------
        sequence of array
            `Layers.out`, or what takes its place. A later call may write the same
            arrays again.
        """
        ...


class Engine(Protocol):
    """A module of this package that processes layers."""

    def unavailable(self) -> str | None:
        """Say why this engine cannot run at all; None where it can."""
        ...

    def facts(self) -> dict[str, str]:
        """Return what this engine uses of the machine, for ``larskit doctor``."""
        ...

    def bind(
        self,
        layers: Layers,
        config: Config,
        switches: Switches = DEFAULT,
        *,
        scales_gradients: bool = False,
        former: Iterable[Group] = (),
    ) -> Group:
        """Bind layers to this engine.

        Parameters
        ----------
        layers : Layers
            The arrays. Nothing is written.
        config : Config
            Says whether momentum buffers are kept; the groups take the hyper-parameters
            at each call.
        switches : Switches
            How the engine must work.
        scales_gradients : bool, default=False
            Whether `Group.scale_gradients` will be called, not `Group.step_`.
        former : iterable of Group
            Of the last step. With ``carry_norms`` the norms that they carry for these
            weights are adopted.

        Raises
        ------
        Unsupported
            Naming an array or a switch, and what is wrong with it.
        """
        ...
