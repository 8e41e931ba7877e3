"""Sequential attention: windows a few at a time, the same result, and fewer matrices alive."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from swin_moe.ops.window_reference import Windows, attention_reference
from tests.parallel import MICRO

CASES = {
    "plain": ((8, 8), Windows((4, 4), (0, 0))),
    "shifted": ((8, 8), Windows((4, 4), (2, 2))),
    "padded": ((9, 6), Windows((4, 4), (2, 2))),
    "dot product": ((8, 8), Windows((4, 4), (2, 2), cosine=False)),
    "dropout": ((8, 12), Windows((4, 4), (2, 2), dropout_p=0.3)),
}


def run(case, chunk, dtype=torch.float32):
    (height, width), windows = CASES[case]
    torch.manual_seed(0)
    tokens = windows.size[0] * windows.size[1]
    inputs = [
        torch.randn(3, height, width, 3, 2, 16, dtype=dtype),
        torch.randn(2, tokens, tokens, dtype=dtype),
        torch.rand(2, 1, 1, dtype=dtype),
    ]
    for tensor in inputs:
        tensor.requires_grad_()
    out = attention_reference(*inputs, torch.tensor(5), windows, chunk)
    return [out, *torch.autograd.grad(out, inputs, torch.randn_like(out))]


@pytest.mark.parametrize("chunk", [1, 5, 1000])  # 5 divides no number of windows here
@pytest.mark.parametrize("case", CASES)
def test_equals_all_windows_at_once(case, chunk):
    whole, parts = run(case, 0), run(case, chunk)
    assert whole[0].equal(parts[0])
    assert whole[1].equal(parts[1])
    # Sums over all windows, in another order.
    for one, other in zip(whole[2:], parts[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_only_a_chunk_of_matrices_is_kept_for_the_backward_pass():
    kept = []

    def pack(tensor):
        kept.append(tensor.untyped_storage())
        return tensor

    figures = []
    for chunk in (0, 1):
        kept.clear()
        (height, width), windows = (32, 32), Windows((8, 8), (4, 4))
        qkv = torch.randn(2, height, width, 3, 2, 16, requires_grad=True)
        bias = torch.randn(2, 64, 64)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            attention_reference(qkv, bias, torch.ones(2, 1, 1), None, windows, chunk)
        figures.append(sum({s.data_ptr(): s.nbytes() for s in kept}.values()))
    matrices = 2 * 16 * 2 * 64 * 64 * 4
    assert figures[0] - figures[1] > matrices


def test_the_key_reaches_the_op(monkeypatch):
    for package in ("pydantic", "fairscale"):  # the other tests of this folder run without them
        pytest.importorskip(package)
    from swin_moe import build_model
    from swin_moe.config import load_config
    from swin_moe.models import attention

    seen = []
    original = attention.window_attention

    def watched(*args, **options):
        seen.append(options["chunk"])
        return original(*args, **options)

    monkeypatch.setattr(attention, "window_attention", watched)
    sizes = {"img_size": 32, "embed_dim": 8, "num_heads": [1, 2], "depths": [1, 2]}
    build_model("swinv2", attention_chunk=3, **sizes)(torch.randn(1, 3, 32, 32))
    assert seen == [3, 3, 3]
    with pytest.raises(ValueError, match="attention_chunk has no meaning in family=swin_mlp"):
        load_config(MICRO, ["model.name=swin_mlp", "moe.blocks=[]", "model.attention_chunk=2"])
