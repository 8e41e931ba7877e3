"""AdamW with bf16 moments follows AdamW with fp32 moments."""

import pytest
import torch
import torch.nn.functional as F

from swin_moe.training.adamw import PairedAdamW, moment_views
from tests.parallel import run_worker

RATES = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05}


def both(size=70_000):  # more than one piece
    torch.manual_seed(0)
    start = torch.randn(size)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    return [
        (weights[0], torch.optim.AdamW([weights[0]], **RATES)),
        (weights[1], PairedAdamW([{"params": [weights[1]]}], **RATES)),
    ]


def test_one_update_is_adamw_and_the_moments_are_its_own_rounded():
    (exact, adamw), (weight, paired) = both()
    weight.grad = exact.grad = torch.randn_like(exact)
    adamw.step()
    paired.step()
    torch.testing.assert_close(weight, exact, rtol=1e-6, atol=1e-7)
    for kind, values in moment_views(paired.state[weight]).items():
        assert values.dtype == torch.bfloat16
        torch.testing.assert_close(values.float(), adamw.state[exact][kind], rtol=2**-7, atol=0)


def test_the_second_moment_follows_where_the_nearest_number_would_stand_still():
    (exact, adamw), (weight, paired) = both(1 << 12)
    nearest = torch.ones(1).bfloat16()
    for step in range(3000):
        weight.grad = exact.grad = torch.full_like(exact, 0.5)
        adamw.step()
        paired.step()
        if step == 0:
            adamw.state[exact]["exp_avg_sq"].fill_(1.0)
            moment_views(paired.state[weight])["exp_avg_sq"].fill_(1.0)
        nearest = (0.999 * nearest.float() + 0.001 * 0.25).bfloat16()
    expected = float(adamw.state[exact]["exp_avg_sq"].mean())
    found = float(moment_views(paired.state[weight])["exp_avg_sq"].float().mean())
    assert found == pytest.approx(expected, rel=0.005)
    assert nearest > 0.9  # the exact value is 0.29


def test_training_follows():
    """A small network learns equally well, with nearly equal weights."""
    losses, ends = [], []
    for kind in (torch.optim.AdamW, PairedAdamW):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.GELU(), torch.nn.Linear(64, 1))
        begin = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
        optimizer = kind([{"params": list(net.parameters())}], **{**RATES, "lr": 1e-3})
        run = []
        for step in range(400):
            x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
            loss = F.mse_loss(net(x), x.square().sum(1, keepdim=True).sin())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(float(loss.detach()))
        losses.append(sum(run[-50:]) / 50)
        ends.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (ends[1] - ends[0]).norm() < 0.1 * (ends[0] - begin).norm()


def test_the_same_updates_again_from_a_copy_of_the_state():
    (_, _), (weight, paired) = both()
    gradients = [torch.randn_like(weight) for _ in range(4)]
    ends = []
    for first in (0, 2):
        for gradient in gradients[first:]:
            weight.grad = gradient
            paired.step()
            if gradient is gradients[1]:
                kept = weight.detach().clone(), paired.state[weight]["moments"].clone()
        ends.append(weight.detach().clone())
        weight.data.copy_(kept[0])
        paired.state[weight]["moments"].copy_(kept[1])
        paired.state[weight]["step"] = torch.tensor(2.0)
    assert ends[0].equal(ends[1])


@pytest.mark.parametrize("processes", [1, 2])
def test_at_every_stage_saved_and_loaded(tmp_path, processes):
    """Takes 20 s on two processes: six cells, each trained in several ways."""
    run_worker("moments", tmp_path, processes)
    assert (tmp_path / "passed").exists()
