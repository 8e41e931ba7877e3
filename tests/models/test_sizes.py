"""Image sizes that neither window nor patch divides: padding never enters a result."""

import importlib
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from swin_moe import build_model
from swin_moe.config import MoEConfig
from swin_moe.models.attention import SpatialMlp, WindowAttention
from swin_moe.models.swin import effective_window
from tests.models.test_swin import lively

ATTENTION = ["swin", "swinv2", "swin_moe"]
SIZES = [(32, 32), (32, 48), (30, 41), (41, 30), (6, 64), (2, 2), (1, 37)]
SIDES = [(5, 11), (11, 5), (7, 8), (3, 11), (4, 4)]  # in tokens, of windows of 4


@pytest.mark.parametrize("size", [(30, 41), (41, 30), (10, 41)])
@pytest.mark.parametrize("family", ATTENTION)
def test_the_value_of_padding_does_not_matter(family, size, monkeypatch):
    """This concerns the reference: the kernels do not pad."""
    module = importlib.import_module("swin_moe.ops.window_reference")
    op = importlib.import_module("swin_moe.ops.window_attention")
    monkeypatch.setattr(op, "fits_kernel", lambda qkv, windows: False)
    model, images = lively(family), torch.randn(2, 3, *size)
    expected = model(images).predictions
    calls = []

    def pad(x, sides):
        calls.append(sides)
        return F.pad(x, sides, value=1e4)

    loud = SimpleNamespace(pad=pad, normalize=F.normalize)
    monkeypatch.setattr(module, "F", loud)
    assert torch.equal(model(images).predictions, expected)
    assert calls


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", [*ATTENTION, "swin_mlp", "mixture"])
def test_an_image_does_not_depend_on_its_neighbours(family, size):
    if family == "mixture":
        model = lively("swinv2", MoEConfig(blocks=[[1], [1]], num_experts=4))
    else:
        model = lively(family)

    def logits(images):
        return model(images).predictions

    images = torch.randn(3, 3, *size)
    together = logits(images)
    assert together.shape == (3, 5)
    assert together.isfinite().all()
    alone = torch.cat([logits(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def groups(height, width, window, before, wrapped):
    """Return groups of tokens that mix, as lists of (row, column, position in the window).

    Windows begin ``before`` rows and columns ahead of the image (behind its edge if negative: then
    with ``wrapped`` what precedes them ends the last window, as a region of its own).
    """
    members = defaultdict(list)

    def place(index, length):
        if not wrapped:
            return *divmod(index + before, window), False
        padded = -(-length // window) * window
        return *divmod((index + before) % padded, window), index + before < 0

    for row in range(height):
        for column in range(width):
            i, y, wrapped_i = place(row, height)
            j, x, wrapped_j = place(column, width)
            members[i, j, wrapped_i, wrapped_j].append((row, column, y * window + x))
    return members.values()


def brute_force(attn: WindowAttention, x, window, shift):
    """Compute attention of x [H, W, C] window by window, without padding."""
    height, width, _ = x.shape
    qkv = attn.project_qkv(x).view(height, width, 3, attn.num_heads, -1)
    bias, out = attn.position_bias(window), torch.empty_like(x)
    for members in groups(height, width, window, -shift, wrapped=True):
        rows, columns, positions = map(list, zip(*members, strict=True))
        q, k, v = qkv[rows, columns].permute(1, 2, 0, 3)  # [heads, members, head_dim]
        if attn.cosine:
            logits = F.cosine_similarity(q[:, :, None], k[:, None], dim=-1)
            logits = logits * attn.logit_scale.clamp(max=torch.tensor(100.0).log()).exp()
        else:
            logits = q @ k.mT * attn.scale
        logits = logits + bias[:, positions][:, :, positions]
        out[rows, columns] = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return attn.proj(out)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("family", ATTENTION)
@torch.no_grad()
def test_attention_equals_a_loop_over_windows(family, block, sides):
    attn = lively(family).layers[1].blocks[block].attn
    window, shift = effective_window(*sides, 4, shifted=block == 1)
    assert shift == (2 if block == 1 and min(sides) > 4 else 0)
    x = torch.randn(2, *sides, 16)
    expected = torch.stack([brute_force(attn, image, window, shift) for image in x])
    torch.testing.assert_close(attn(x, window, shift), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("shift", [0, 2])
@torch.no_grad()
def test_spatial_mlp_equals_a_loop_over_windows(shift, sides):
    mixer: SpatialMlp = lively("swin_mlp").layers[1].blocks[0].spatial_mlp
    weight, bias = mixer.weight.view(2, 16, 16), mixer.bias.view(2, 16, 1)  # by head
    x = torch.randn(2, *sides, 16)
    expected = torch.empty_like(x)
    for members in groups(*sides, 4, 4 - shift if shift else 0, wrapped=False):
        rows, columns, positions = map(list, zip(*members, strict=True))
        tokens = x[:, rows, columns].unflatten(-1, (2, 8)).transpose(1, 2)  # [B, 2, members, 8]
        mixed = weight[:, positions][:, :, positions] @ tokens + bias[:, positions]
        expected[:, rows, columns] = mixed.transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer.mix(x, shift), expected, rtol=1e-4, atol=1e-5)


def test_an_image_without_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"shape \(3, 32, 32\), expected \[B, C, H, W\]"):
        lively("swinv2")(torch.randn(3, 32, 32))


def test_a_model_takes_tuples_and_paths(tmp_path):
    shape = {"img_size": (32, 64), "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16}
    moe = {"blocks": ((), (0,)), "num_experts": 2}
    model = build_model("swinv2_moe", moe=moe, **shape)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    again = build_model("swinv2_moe", moe=moe, pretrained=tmp_path / "x.pth", **shape)
    assert again.config.img_size == [32, 64]
    assert torch.equal(again.head.weight, model.head.weight)
