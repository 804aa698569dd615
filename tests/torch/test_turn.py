"""Steps that several threads ask for at once follow each other."""

import os
import threading

import pytest
import torch

from larskit import GradientLARS
from larskit.torch import LARS
from larskit.torch.turn import Turn

THREADS, STEPS = 8, 10


def lars(params):
    return LARS(params, lr=0.1)


def hooked(params):
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    GradientLARS().attach(optimizer)
    return optimizer


def run(make, threads):
    """Take steps, as many on each thread; return the weights."""
    params = [torch.nn.Parameter(torch.ones(n)) for n in (300_000, 7)]
    optimizer = make(params)
    for p in params:
        p.grad = torch.ones_like(p)

    def work():
        for _ in range(THREADS * STEPS // threads):
            optimizer.step()

    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return params


@pytest.mark.parametrize("make", [lars, hooked])
def test_no_step_is_lost_or_mixed_with_another(make):
    many, one = run(make, THREADS), run(make, 1)
    assert all(map(torch.equal, many, one))


def test_gradients_may_be_replaced_while_another_thread_steps():
    p = torch.nn.Parameter(torch.ones(300_000))
    optimizer = LARS([p], lr=0.01)
    failed = []

    def work():
        try:
            for _ in range(50):
                p.grad = torch.ones(300_000)
                optimizer.step()
        except BaseException as why:
            failed.append(why)
            raise

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not failed
    assert (p == p[0]).all()


def test_a_step_inside_a_step_may_pass():
    turn = Turn()
    with turn, turn:
        assert True


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_forked_child_does_not_wait_for_a_thread_that_is_not_there():
    turn, inside, leave = Turn(), threading.Event(), threading.Event()

    def hold():
        with turn:
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(30)
    pid = os.fork()
    if pid == 0:
        with turn:
            os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    leave.set()
    thread.join(30)
