"""larskit.GradientLARS in the place of Chainer's own; runs where Chainer is."""

import chainer  # pyright: ignore[reportMissingImports]
import chainer.functions as F  # pyright: ignore[reportMissingImports]
import chainer.links as L  # pyright: ignore[reportMissingImports]
import implementations
import numpy as np
import pytest

from larskit import GradientLARS, functional

STEPS = 20
THEIRS = chainer.optimizer_hooks.GradientLARS
OPTIMIZERS = {
    "SGD": lambda: chainer.optimizers.SGD(lr=0.02),
    "MomentumSGD": lambda: chainer.optimizers.MomentumSGD(lr=0.005),
    "NesterovAG": lambda: chainer.optimizers.NesterovAG(lr=0.005),
    "Adam": lambda: chainer.optimizers.Adam(alpha=0.003),
}
HOOKS = [
    {},
    {"weight_decay": 0.05},
    {"threshold": 2.0, "weight_decay": 0.01, "eps": 1e-3},
]


class Net(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.conv = L.Convolution2D(2, 4, 3, nobias=True)
            self.norm = L.BatchNormalization(4)
            self.last = L.Linear(144, 3)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.conv(x))))


@pytest.fixture
def data():
    rng = np.random.RandomState(0)
    x = rng.normal(size=(16, 2, 8, 8)).astype(np.float32)
    return x, rng.randint(3, size=16).astype(np.int32)


def fit(data, make, add_hooks):
    """Train for some steps, and return the weights."""
    np.random.seed(0)
    net = Net()
    optimizer = make().setup(net)
    add_hooks(optimizer, net)
    for _ in range(STEPS):
        loss = F.softmax_cross_entropy(net(data[0]), data[1])
        net.cleargrads()
        loss.backward()
        optimizer.update()
    return {name: param.array for name, param in net.namedparams()}


def assert_near(ours, theirs):
    assert list(ours) == list(theirs)
    for name, expected in theirs.items():
        atol = 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(ours[name], expected, 0, atol, err_msg=name)
        assert ours[name].dtype == np.float32


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_on_an_optimizer(data, make, hook):
    ours, theirs, plain = (
        fit(data, make, add)
        for add in (
            lambda optimizer, net: optimizer.add_hook(GradientLARS(**hook)),
            lambda optimizer, net: optimizer.add_hook(THEIRS(**hook)),
            lambda optimizer, net: None,
        )
    )
    assert_near(ours, theirs)
    with pytest.raises(AssertionError):
        assert_near(ours, plain)


def test_on_the_update_rule_of_one_parameter(data):
    make = OPTIMIZERS["MomentumSGD"]
    ours, theirs, everywhere = (
        fit(data, make, add)
        for add in (
            lambda _, net: net.conv.W.update_rule.add_hook(GradientLARS()),
            lambda _, net: net.conv.W.update_rule.add_hook(THEIRS()),
            lambda optimizer, _: optimizer.add_hook(GradientLARS()),
        )
    )
    assert_near(ours, theirs)
    with pytest.raises(AssertionError):
        assert_near(ours, everywhere)


def test_in_the_order_of_the_hooks(data):
    def clipped(hook):
        def add(optimizer, net):
            optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
            optimizer.add_hook(hook)
            optimizer.add_hook(chainer.optimizer_hooks.GradientClipping(0.5))

        return add

    make = OPTIMIZERS["SGD"]
    ours, theirs = (fit(data, make, clipped(hook())) for hook in (GradientLARS, THEIRS))
    assert_near(ours, theirs)


def test_attributes_are_the_same():
    ours, theirs = GradientLARS(), THEIRS()
    assert vars(ours) == vars(theirs)
    for name in ("name", "timing", "call_for_each_param"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert type(ours).__eq__ is type(theirs).__eq__
    assert type(ours).__hash__ is type(theirs).__hash__


def test_is_registered_once_and_removed_by_name():
    optimizer = chainer.optimizers.SGD().setup(Net())
    optimizer.add_hook(GradientLARS())
    with pytest.raises(KeyError, match="GradientLARS"):
        optimizer.add_hook(GradientLARS())
    optimizer.remove_hook("GradientLARS")
    optimizer.add_hook(GradientLARS())


def test_skips_unset_parameters():
    uninitialized = chainer.Parameter(chainer.initializers.One())
    without_gradient = chainer.Parameter(chainer.initializers.One(), (2,))
    without_gradient.cleargrad()
    for param in (uninitialized, without_gradient):
        GradientLARS(weight_decay=0.1)(None, param)
    assert uninitialized.array is None
    assert without_gradient.grad is None
    np.testing.assert_array_equal(without_gradient.array, 1)


NAME = "Chainer GradientLARS, MomentumSGD"


def optimized(weights, **hook):
    """Return Chainer's optimizer with its own hook, and its parameters."""
    params = {name: chainer.Parameter(np.array(w)) for name, w in weights.items()}
    link = chainer.Link()
    with link.init_scope():
        for name, param in params.items():
            setattr(link, name.replace(".", "_"), param)
    momentum = implementations.HYPERPARAMETERS["momentum"]
    optimizer = chainer.optimizers.MomentumSGD(1.0, momentum).setup(link)
    optimizer.add_hook(THEIRS(**hook))
    return optimizer, params


def test_the_configuration_of_the_page_is_chainers_under_a_changing_rate():
    def theirs():
        decay = implementations.HYPERPARAMETERS["weight_decay"]
        optimizer, params = optimized(implementations.WEIGHTS, weight_decay=decay)
        for gradients, optimizer.lr in implementations.steps():
            for name, param in params.items():
                param.grad = gradients[name].copy()
            optimizer.update()
            yield {name: param.array.copy() for name, param in params.items()}

    implementations.assert_same(
        implementations.larskit_run(**implementations.configurations()[NAME]), theirs()
    )


def test_without_gradient_chainer_forgets_the_decay():
    """A layer without gradient shrinks by `lr`, whatever the decay is."""
    w = np.array([[3.0, 4.0]])
    optimizer, params = optimized({"w": w}, weight_decay=0.01)
    params["w"].grad = np.zeros_like(w)
    optimizer.lr = 0.5
    optimizer.update()
    np.testing.assert_allclose(params["w"].array, w - 0.5 * w)
    configuration = {**implementations.configurations()[NAME], "weight_decay": 0.01}
    state = functional.init(w)
    ours, _ = functional.update(w, np.zeros_like(w), state, 0.5, **configuration)
    np.testing.assert_allclose(ours, w - 0.5 * 0.01 * w)
