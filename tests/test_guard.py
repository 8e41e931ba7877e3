"""The agreement of ranks, and loss spikes, in one process."""

import math
import signal

import pytest
import torch

from swin_moe.common.signals import StopSignal
from swin_moe.training.guard import Guard, SpikeDetector
from tests.saving import ALONE


def test_verdict_names_the_first_layer_and_the_factor_spoils_the_update():
    guard = Guard(["a", "b"], ALONE, lambda: False)
    guard.see(torch.tensor(2.0), torch.tensor([0, 0]))
    guard.see(torch.tensor(4.0), torch.tensor([0, 0]))
    assert guard.agree() == 1
    assert guard.read() == ("", False, 3.0)
    guard.see(torch.tensor(torch.nan), torch.tensor([0, 3]))
    assert math.isnan(guard.agree())
    assert guard.read().bad == "tokens at b on rank 0"
    guard.see(torch.tensor(torch.inf), None)
    assert math.isnan(guard.agree())
    assert guard.read().bad == "loss on rank 0"
    guard.see(torch.tensor(1.0), torch.tensor([0, 0]))
    assert guard.agree() == 1  # it has been reset
    assert guard.read() == ("", False, 1.0)


@pytest.mark.parametrize(("number", "verdict"), [(signal.SIGUSR1, 2), (signal.SIGINT, 1)])
def test_a_signal_is_remembered_and_passed_to_the_verdict(number, verdict):
    with StopSignal() as stop:
        stop.defer()
        guard = Guard([], ALONE, stop)
        guard.see(torch.tensor(1.0), None)
        signal.raise_signal(number)
        guard.agree()
        assert guard.read().stop == verdict
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_spikes_are_found_among_noise_and_do_not_become_usual():
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(300, generator=generator)
    losses = (2.0 - 0.001 * torch.arange(300) + noise).tolist()
    detector = SpikeDetector(6.0)
    assert not any(detector.check(loss) for loss in losses)
    assert detector.check(3.0)
    assert detector.check(3.0)
    assert not detector.check(losses[-1])
    assert not any(SpikeDetector(0.0).check(10.0**n) for n in range(100))
