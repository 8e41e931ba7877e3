"""Window attention as an op: arguments, layouts, autograd, compilation, saved tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from swin_moe import ops
from swin_moe.ops import choice
from swin_moe.ops.window_attention import fits_kernel
from tests.ops.test_window_attention import DEVICES, DTYPES, Case, needs_library, run


def numbers(case: Case) -> tuple[int | float, ...]:
    return (*case.window, *case.shift, case.cosine, case.dropout)


def seed_of(case: Case) -> Tensor | None:
    return torch.tensor([2**40 + 3]) if case.dropout else None


@pytest.fixture
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_expanded_tensors(dtype, device):
    case = Case((4, 4), (2, 2), (8, 10))
    qkv, bias, scale = case.inputs(dtype, device)
    expected = run(case.fused, [qkv, bias, scale])
    apart = qkv.permute(3, 0, 4, 1, 2, 5).contiguous().permute(1, 3, 4, 0, 2, 5)
    wide = torch.full((2, 12, 14, 3, 5, 35), float("nan")).to(qkv)
    sliced = wide[:, 2:10, 1:11, :, 1:4, 3:]
    sliced.copy_(qkv)
    odd = torch.cat([qkv.new_zeros(1), qkv.flatten()])[1:].view(qkv.shape)  # off its alignment
    turned = bias.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (apart, sliced, odd):
        assert torch.equal(layout, qkv)
        for mine, theirs in zip(run(case.fused, [layout, turned, scale]), expected, strict=True):
            assert torch.equal(mine, theirs)

    one_bias, one_scale = bias[:1].clone(), scale[:1].clone()
    expanded = [one_bias.expand(3, -1, -1), one_scale.expand(3, 1, 1)]
    whole = [x.contiguous() for x in expanded]
    for mine, theirs in zip(
        run(case.fused, [qkv, *expanded]), run(case.fused, [qkv, *whole]), strict=True
    ):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_expanded_gradients(dtype, device):
    case = Case((4, 4), (2, 2), (8, 10))
    inputs = [x.requires_grad_() for x in case.inputs(dtype, device)]
    out = case.fused(*inputs)
    weight = torch.randn(2, 96, 8, 10, generator=torch.Generator().manual_seed(0)).to(out)
    for strided in (
        torch.ones((), device=device).to(out).expand_as(out),
        weight[:, :, :1, :1].expand(-1, -1, 8, 10).permute(0, 2, 3, 1),
        weight.permute(0, 2, 3, 1),
    ):
        assert not strided.is_contiguous()
        mine = torch.autograd.grad(out, inputs, strided, retain_graph=True)
        theirs = torch.autograd.grad(out, inputs, strided.contiguous(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_only_the_required_gradients():
    case = Case((4, 4), (2, 2))
    inputs = case.inputs()
    expected = run(case.fused, inputs)
    for i in range(3):
        some = [x.detach().requires_grad_(j == i) for j, x in enumerate(inputs)]
        (grad,) = torch.autograd.grad(case.fused(*some).sum(), some[i])
        assert grad.shape == expected[i + 1].shape
    with torch.inference_mode():
        assert torch.equal(case.fused(*inputs), expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_and_scale_may_have_the_dtype_of_qkv(dtype):
    case = Case((4, 4), (2, 2))
    qkv, bias, scale = case.inputs(dtype)
    bias, scale = bias.to(dtype), scale.to(dtype)
    mine = run(case.fused, [qkv, bias, scale])
    theirs = run(case.fused, [qkv, bias.float(), scale.float()])
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b.to(a.dtype))
    assert mine[2].dtype == mine[3].dtype == dtype


# A case of the kernels, and one of the reference.
BAD = [
    (lambda q, b, s: (q[0], b, s), {}, "qkv has shape"),
    (lambda q, b, s: (q[:, :, :, :2], b, s), {}, "qkv has shape"),
    (lambda q, b, s: (q.int(), b, s), {}, "qkv must be of a float dtype, not torch.int32"),
    (lambda q, b, s: (q.to(torch.complex64), b, s), {}, "qkv must be of a float dtype"),
    (lambda q, b, s: (q, b[:, :9, :9], s), {}, "bias has shape"),
    (lambda q, b, s: (q, b[:2], s), {}, "bias has shape"),
    (lambda q, b, s: (q, b[:1], s), {}, "bias has shape"),
    (lambda q, b, s: (q, b.half(), s), {}, "bias must be float32 or, like qkv, torch.float32"),
    (lambda q, b, s: (q, b.double(), s), {}, "bias must be float32"),
    (lambda q, b, s: (q, b.to("meta"), s), {}, "bias is on meta, but qkv on cpu"),
    (lambda q, b, s: (q, b, s.flatten()), {}, "scale has shape"),
    (lambda q, b, s: (q, b, s[:1]), {}, "scale has shape"),
    (lambda q, b, s: (q, b, s.bfloat16()), {}, "scale must be float32"),
    (lambda q, b, s: (q, b, s.to("meta")), {}, "scale is on meta, but qkv on cpu"),
    (lambda q, b, s: (q, b, s), {"window_size": 0}, "window_size must be at least 1"),
    (lambda q, b, s: (q, b, s), {"window_size": (4, -4)}, "window_size must be at least 1"),
    (lambda q, b, s: (q, b, s), {"window_size": 5}, "bias has shape"),
    (lambda q, b, s: (q, b, s), {"shift_size": 4}, "shift_size must be .* below window_size"),
    (lambda q, b, s: (q, b, s), {"shift_size": (0, 4)}, "shift_size must be"),
    (lambda q, b, s: (q, b, s), {"shift_size": -1}, "shift_size must be at least 0"),
    (lambda q, b, s: (q, b, s), {"dropout_p": -0.1}, "dropout_p must be between 0 and 1"),
    (lambda q, b, s: (q, b, s), {"dropout_p": 1.5}, "dropout_p must be between 0 and 1"),
    (lambda q, b, s: (q, b, s), {"dropout_p": float("nan")}, "dropout_p must be"),
]


@pytest.mark.parametrize("head_dim", [16, 20], ids=["kernel", "reference"])
@pytest.mark.parametrize(("spoil", "options", "message"), BAD)
def test_errors_name_the_wrong_argument(spoil, options, message, head_dim):
    inputs = Case(head_dim=head_dim).inputs()
    with pytest.raises(ValueError, match=message):
        ops.window_attention(*spoil(*inputs), **{"window_size": 4} | options)


@needs_library
def test_the_kernels_check_for_themselves():
    case = Case()
    qkv, bias, scale = case.inputs()
    scale = scale.flatten()
    op, backward = (
        torch.ops.swin_moe.window_attention,
        torch.ops.swin_moe.window_attention_backward,
    )
    plain = numbers(case)
    out, lse = op(qkv, bias, scale, None, *plain)
    tail = (qkv, bias, scale, None)
    for call, message in [
        (lambda: op(qkv.half(), bias, scale, None, *plain), "no kernel for dtype"),
        (lambda: op(qkv[0], bias, scale, None, *plain), "qkv must have 6 dimensions"),
        (lambda: op(qkv[:, :, :, :2], bias, scale, None, *plain), "qkv must have size 3"),
        (lambda: op(qkv[..., :20], bias, scale, None, *plain), "no attention kernel for head"),
        (lambda: op(qkv, bias.half(), scale, None, *plain), "bias must be Float"),
        (lambda: op(qkv, bias[:, :9], scale, None, *plain), "bias must have size 16"),
        (lambda: op(qkv, bias[:2], scale, None, *plain), "bias must have size 3"),
        (lambda: op(qkv, bias, scale[:2], None, *plain), "scale must have size 3"),
        (lambda: op(*tail, 0, 4, 0, 0, True, 0.0), "windows must have a size"),
        (lambda: op(*tail, 4, 4, 4, 0, True, 0.0), "shifts be smaller"),
        (lambda: op(*tail, 4, 4, 0, 0, True, 0.5), "dropout needs a seed"),
        (lambda: op(qkv, bias, scale, lse, 4, 4, 0, 0, True, 0.5), "seed must"),
        (lambda: backward(out[:1], *tail, out, lse, *plain), "grad_out must have size 2"),
        (lambda: backward(out.half(), *tail, out, lse, *plain), "grad_out must be Float"),
        (lambda: backward(out, *tail, out[:, :3], lse, *plain), "out must have size 8"),
        (lambda: backward(out, *tail, out, lse[1:], *plain), "lse must have size 8"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float64, 32), (torch.float16, 32), (torch.float32, 20), (torch.bfloat16, 128)],
    ids=str,
)
def test_calls_without_a_kernel_use_the_reference(dtype, head_dim):
    case = Case((4, 4), (2, 2), (10, 8), head_dim=head_dim, dropout=0.2)
    inputs = case.inputs(dtype)
    assert not fits_kernel(inputs[0], case.windows)
    ours, reference = run(case.fused, inputs), run(case.reference, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


def test_windows_too_large_for_the_kernels_use_the_reference():
    qkv = torch.empty(1, 8, 8, 3, 1, 16)
    assert fits_kernel(qkv, Case((32, 32)).windows) == (choice.uses_kernel("window_attention", qkv))
    assert not fits_kernel(qkv, Case((32, 33)).windows)


def test_autocast():
    case = Case((4, 4), (2, 2), dropout=0.2)
    inputs = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        mine = run(case.fused, inputs)
        exact = case.fused(*(x.double() for x in inputs))
        one_dtype = case.fused(inputs[0].bfloat16(), inputs[1].bfloat16(), inputs[2])
    assert mine[0].dtype == one_dtype.dtype == torch.bfloat16
    assert exact.dtype == torch.float64
    assert all(x.dtype == torch.float32 for x in mine[1:])
    theirs = run(case.fused, [inputs[0].bfloat16(), *inputs[1:]])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(mine, theirs, strict=True))


OP_CASES = [
    Case((4, 4), (2, 2), (6, 8), head_dim=16),
    Case((2, 4), (1, 0), (6, 8), head_dim=16, cosine=False, dropout=0.3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck(case, dtype):
    """Schema, fake shapes, autograd and tracing are checked, for the op and its backward."""
    qkv, bias, scale = case.inputs(dtype)
    scale = scale.flatten()
    seed = seed_of(case)
    forward, backward = (
        torch.ops.swin_moe.window_attention,
        torch.ops.swin_moe.window_attention_backward,
    )
    out, lse = forward(qkv, bias, scale, seed, *numbers(case))
    grad = torch.ones((), dtype=dtype).expand_as(out)
    torch.library.opcheck(backward, (grad, qkv, bias, scale, seed, out, lse, *numbers(case)))
    for tensor in (qkv, bias, scale):
        tensor.requires_grad_()
    torch.library.opcheck(forward, (qkv, bias, scale, seed, *numbers(case)))


@pytest.mark.parametrize("case", [*OP_CASES, Case((7, 7), (3, 3), (10, 15), 0)], ids=str)
def test_fake_tensors_have_the_shapes_of_real_ones(case):
    qkv, bias, scale = case.inputs(torch.bfloat16)
    scale, seed = scale.flatten(), seed_of(case)
    real = torch.ops.swin_moe.window_attention(qkv, bias, scale, seed, *numbers(case))
    real += torch.ops.swin_moe.window_attention_backward(
        real[0], qkv, bias, scale, seed, *real, *numbers(case)
    )
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        qkv, bias, scale, grad = (mode.from_tensor(x) for x in (qkv, bias, scale, real[0]))
        seed = seed if seed is None else mode.from_tensor(seed)
        fake = torch.ops.swin_moe.window_attention(qkv, bias, scale, seed, *numbers(case))
        fake += torch.ops.swin_moe.window_attention_backward(
            grad, qkv, bias, scale, seed, *fake, *numbers(case)
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.usefixtures("_forget_graphs")
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        ("inductor", Case((4, 4), (2, 2), (10, 8))),
        ("aot_eager", Case((4, 4), (2, 2), (10, 8), dropout=0.3)),
        ("aot_eager", Case((4, 2), (0, 1), (8, 8), cosine=False)),
        ("aot_eager", Case((4, 4), (2, 2), (10, 8), head_dim=20, dropout=0.3)),  # the reference
    ],
    ids=str,
)
def test_compiles_as_one_graph(backend, case):
    def layer(qkv, bias, scale):
        out = ops.window_attention(
            qkv * 2,
            bias.sigmoid(),
            scale,
            window_size=case.window,
            shift_size=case.shift,
            cosine=case.cosine,
            dropout_p=case.dropout,
        )
        return out.square()

    def seeded(function):
        torch.manual_seed(7)
        return run(function, case.inputs())

    expected = seeded(layer)
    actual = seeded(torch.compile(layer, fullgraph=True, backend=backend))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_forget_graphs")
def test_one_graph_for_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(
        lambda *x: ops.window_attention(*x, window_size=4, shift_size=2),
        fullgraph=True,
        dynamic=True,
        backend=counter,
    )
    frames = 0
    for size in ((8, 12), (10, 9), (16, 20), (30, 7)):
        case = Case((4, 4), (2, 2), size)
        inputs = case.inputs()
        assert torch.equal(layer(*inputs), case.fused(*inputs))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpointing_draws_the_same_dropout(dropout):
    case = Case((4, 4), (2, 2), (10, 8), dropout=dropout)

    def layer(qkv, bias, scale):
        return ops.window_attention(
            qkv.tanh(), bias, scale, window_size=4, shift_size=2, dropout_p=dropout
        )

    def seeded(function):
        torch.manual_seed(7)
        return run(function, case.inputs())

    expected = seeded(layer)
    actual = seeded(lambda *x: checkpoint(layer, *x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_keeps_no_attention_matrix(dtype):
    """Only qkv, the output and one number per query are saved, a tenth of the probabilities."""
    case = Case((16, 16), (8, 8), (96, 96), 1, 3, 32, dropout=0.1)
    inputs = [x.requires_grad_() for x in case.inputs(dtype)]
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = case.fused(*inputs)
    matrix = 36 * case.heads * case.tokens**2  # 36 windows
    assert all(x.numel() < matrix for x in saved.values())
    size = sum(x.untyped_storage().nbytes() for x in saved.values())
    qkv, bias, _ = inputs
    assert size < 1.2 * (qkv.nbytes + out.nbytes) + bias.nbytes + 4096
    out.sum().backward()


def test_a_second_derivative_is_an_error():
    """The backward op has none; a silent zero would be worse."""
    case = Case()
    inputs = [x.requires_grad_() for x in case.inputs()]
    (grad,) = torch.autograd.grad(case.fused(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), inputs[0])
