"""The experts: the kernels against the reference in fp64, by every method of multiplying."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swin_moe import ops
from swin_moe.ops import choice
from swin_moe.ops.dropout import keep_mask
from tests.ops import devices

needs_library = devices.needs_library("moe_experts")
DEVICES = devices.devices("moe_experts")
DTYPES = [torch.float32, torch.bfloat16]
# Largest error, relative to the largest number of the tensor.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
CHOOSE, EACH, BATCHED, GROUPED = range(4)
METHODS = [CHOOSE, EACH, BATCHED]


@dataclass(frozen=True)
class Case:
    used: tuple[int, ...] = (7, 0, 12)
    width: int = 16
    hidden: int = 32
    stride: int = 0
    spare: int = 0  # rows after the last expert's
    bias: bool = True
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32

    @property
    def rows(self) -> int:
        return (len(self.used) * self.stride if self.stride else sum(self.used)) + self.spare

    @property
    def filled(self) -> Tensor:
        """Return whether each row is used."""
        filled = torch.zeros(self.rows, dtype=torch.bool)
        row = 0
        for count in self.used:
            filled[row : row + count] = True
            row += self.stride or count
        return filled


CASES = [
    Case(),
    Case(used=(5,), width=13, hidden=29),
    Case(used=(3, 4), width=17, hidden=7, bias=False),
    Case(used=(0, 0, 150, 0), spare=3),
    Case(used=(0, 0, 0)),
    Case(used=(0, 0), spare=5),
    Case(used=(64, 64, 64, 64), stride=64),
    Case(used=(70, 1, 65, 128, 0, 9, 33, 2), width=24, hidden=40),
    Case(used=(5, 0, 8, 2), stride=8),
    Case(used=(5, 12, 8, 0), stride=12, spare=7, width=9, hidden=33),
    Case(used=(300, 20), width=64, hidden=256),
]


@dataclass
class Inputs:
    rows: Tensor
    used: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    grad: Tensor

    def differentiable(self) -> dict[str, Tensor]:
        every = {name: value for name, value in vars(self).items() if name not in ("used", "grad")}
        return {name: value for name, value in every.items() if value is not None}

    def to(self, *where: object) -> Inputs:
        moved = {k: v if v is None or k == "used" else v.to(*where) for k, v in vars(self).items()}
        return Inputs(**moved)


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    generator = torch.Generator().manual_seed(1)
    E, D, H = len(case.used), case.width, case.hidden

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator)).to(device, case.dtype)

    inputs = Inputs(
        rows=normal(case.rows, D),
        used=torch.tensor(case.used, device=device),
        fc1_weight=normal(E, H, D, std=1.5 * D**-0.5),
        fc1_bias=normal(E, H),
        fc2_weight=normal(E, D, H, std=H**-0.5),
        fc2_bias=normal(E, D) if case.bias else None,
        grad=normal(case.rows, D),
    )
    inputs.rows[~case.filled] = torch.nan
    inputs.grad[~case.filled] = torch.nan
    return inputs


SEED = torch.tensor([-(2**40) - 12345])


def numbers(case: Case) -> tuple[Tensor | None, int, float]:
    return SEED if case.dropout else None, case.stride, case.dropout


def run(case: Case, inputs: Inputs, method: int = CHOOSE) -> dict[str, Tensor]:
    """Return the op's output and all gradients, without the empty rows."""
    weights = {name: t.detach().requires_grad_() for name, t in inputs.differentiable().items()}
    arguments = {"fc2_bias": None, **weights}
    rows = arguments.pop("rows")
    seed, *rest = numbers(case)
    if seed is not None:
        seed = seed.to(rows.device)
    out, _ = torch.ops.swin_moe.moe_experts(
        rows, inputs.used, **arguments, seed=seed, stride=rest[0], dropout_p=rest[1],
        keep=True, method=method,
    )  # fmt: skip
    out.backward(inputs.grad)
    return results(case, out, weights)


def results(case: Case, out: Tensor, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {"out": out.detach(), **{name: tensor.grad for name, tensor in weights.items()}}
    for name in ("out", "rows"):
        found[name] = found[name][case.filled.to(out.device)]
    return found


def expected(case: Case, inputs: Inputs, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    wide = inputs.to("cpu").to(dtype)
    weights = {name: t.detach().requires_grad_() for name, t in wide.differentiable().items()}
    arguments = {"fc2_bias": None, **weights}
    seed, stride, dropout = numbers(case)
    out = ops.moe_experts_reference(
        arguments.pop("rows"), inputs.used.cpu(), **arguments, stride=stride, dropout_p=dropout,
        seed=seed,
    )  # fmt: skip
    out.backward(wide.grad.nan_to_num(0))
    return results(case, out, weights)


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert value.dtype == dtype
        assert value.shape == wanted[name].shape, name
        if value.numel():
            error = (value.cpu().double() - wanted[name]).abs().max()
            assert error <= TOLERANCE[dtype] * wanted[name].abs().max(), (name, float(error))


def test_reference_equals_a_plain_loop():
    case = Case(used=(2, 0, 3), width=4, hidden=6, stride=4, dtype=torch.float64)
    inputs = make_inputs(case)
    weights = {k: v for k, v in vars(inputs).items() if k not in ("grad",)}
    out = ops.moe_experts_reference(**weights, stride=4)
    for row in range(12):
        e, i = divmod(row, 4)
        wanted = torch.zeros(4, dtype=torch.float64)
        if i < case.used[e]:
            hidden = F.gelu(inputs.fc1_weight[e] @ inputs.rows[row] + inputs.fc1_bias[e])
            wanted = inputs.fc2_weight[e] @ hidden + inputs.fc2_bias[e]
        torch.testing.assert_close(out[row], wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_reference_gradcheck(dropout):
    case = Case(used=(2, 0, 3), width=3, hidden=4, stride=4, dtype=torch.float64, dropout=dropout)
    inputs = make_inputs(case)
    tensors = {name: t.requires_grad_() for name, t in inputs.differentiable().items()}

    def reference(rows: Tensor, *weights: Tensor) -> Tensor:
        return ops.moe_experts_reference(
            rows, inputs.used, *weights, stride=4, dropout_p=dropout, seed=SEED
        )

    with torch.no_grad():
        inputs.rows.nan_to_num_(0)
    assert torch.autograd.gradcheck(reference, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(reference, tuple(tensors.values()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", [*METHODS, GROUPED])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.used}-{case.stride}")
def test_parity_forward_and_backward(case, dtype, method, device):
    """Empty rows and their gradients are NaN. Without the library, the op's formulas run."""
    case = replace(case, dtype=dtype)
    if method == GROUPED and (case.stride or case.width % 8 or case.hidden % 8):
        pytest.skip("torch's grouped product takes packed rows of whole 16 bytes")
    inputs = make_inputs(case, device)
    found = run(case, inputs, method)
    check(found, expected(case, inputs), dtype)
    for name, value in found.items():
        if name not in ("out", "rows"):
            assert not value[inputs.used == 0].any(), name  # exactly zero


@needs_library
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", [0, 16])
def test_dropout_drops_the_same_everywhere(stride, dtype, method, device):
    case = Case(used=(9, 16, 0, 3), stride=stride, width=11, hidden=45, dropout=0.3, dtype=dtype)
    inputs = make_inputs(case, device)
    check(run(case, inputs, method), expected(case, inputs), dtype)


@needs_library
def test_dropout_rate_and_seed():
    """Seeds come from torch's generator: repeatable, and different in each call."""
    case = Case(used=(500, 500), width=1, hidden=64)
    inputs = make_inputs(case)
    weights = {k: v for k, v in vars(inputs).items() if k not in ("grad",)}
    torch.manual_seed(3)
    first, second = (ops.moe_experts(**weights, dropout_p=0.25) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ops.moe_experts(**weights, dropout_p=0.25), first)
    assert not torch.equal(first, second)
    kept = keep_mask(SEED, torch.arange(1000), 64, 0.25)
    assert sorted(kept.unique().tolist()) == [0, pytest.approx(4 / 3)]
    assert float((kept > 0).double().mean()) == pytest.approx(0.75, abs=0.01)
    out = ops.moe_experts(**weights, dropout_p=1.0)
    torch.testing.assert_close(out, inputs.fc2_bias.repeat_interleave(500, 0))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activation_of_every_size(dtype):
    """Each value is compared with fp64: tails, zero, and non-finite numbers."""
    x = torch.cat(
        [torch.linspace(-12, 12, 4999), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e30])]
    )
    x = x.to(dtype)[:, None]
    one, zero = torch.ones(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=dtype)
    leaf = x.clone().requires_grad_()
    used = torch.tensor([len(x)])
    out = ops.moe_experts(leaf, used, one, zero, one, None)
    out.sum().backward()
    wide = x.double().requires_grad_()
    # 1 + erf has no digits left in the lower tail.
    wanted = wide * torch.special.erfc(-wide * 0.5**0.5) / 2
    wanted.sum().backward()
    tolerance = {torch.float32: 3e-5, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=tolerance, atol=1e-36)
    torch.testing.assert_close(leaf.grad.double(), wide.grad, rtol=tolerance, atol=3e-7)

    special = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)[:, None]
    found = ops.moe_experts(special, torch.tensor([3]), one, zero, one, None)[:, 0]
    assert found.isnan().tolist() == [True, False, True]  # −inf · 0, as in torch's formula
    assert found[1] == torch.inf


@needs_library
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_that_is_not_finite_spoils_no_other(dtype, method):
    case = Case(used=(40, 30), width=16, hidden=64, dtype=dtype)
    inputs = make_inputs(case)
    clean = run(case, inputs, method)["out"]
    inputs.rows[17, 3] = torch.nan
    spoilt = run(case, inputs, method)["out"]
    others = torch.arange(70) != 17
    assert spoilt[17].isnan().all()
    assert torch.equal(spoilt[others], clean[others])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_steps_between_the_products_do_not_depend_on_threads(dropout, dtype):
    """The widths are such that torch's products do not depend on threads either."""
    case = Case(used=(700, 3, 0, 290), width=32, hidden=128, dropout=dropout, dtype=dtype)
    inputs = make_inputs(case)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(run(case, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, value in other.items():
            assert torch.equal(value, found[0][name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_strided_and_expanded_tensors(device):
    case = Case(used=(20, 12), width=16, hidden=24)
    inputs = make_inputs(case, device)
    wanted = run(case, inputs)
    strided = {
        name: t if t is None or name == "used" else t.transpose(0, 1).contiguous().transpose(0, 1)
        for name, t in vars(inputs).items()
    }
    for name, value in run(case, Inputs(**strided)).items():
        assert torch.equal(value, wanted[name]), name

    inputs.grad = torch.ones((), device=device).expand(32, 16)
    found = run(case, inputs)
    check(found, expected(case, inputs), torch.float32)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_rows_and_hidden_rows_only(dtype):
    case = Case(used=(100, 28), width=16, hidden=64, dtype=dtype)
    inputs = make_inputs(case)
    weights = {name: tensor.requires_grad_() for name, tensor in inputs.differentiable().items()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = ops.moe_experts(used=inputs.used, **weights)
    own = {tensor.data_ptr() for tensor in (*weights.values(), inputs.used)}
    (pre,) = (tensor for pointer, tensor in saved.items() if pointer not in own)
    assert pre.shape == (128, 64)
    assert pre.dtype == dtype
    with torch.no_grad():
        assert torch.equal(ops.moe_experts(used=inputs.used, **weights), out)


def test_errors_name_the_wrong_argument():
    case = Case(used=(3, 5))
    good = {k: v for k, v in vars(make_inputs(case)).items() if k != "grad"}
    for change, message in [
        ({"rows": good["rows"][0]}, "rows must be"),
        ({"rows": good["rows"].long()}, "rows must be"),
        ({"used": good["used"].int()}, "used must be"),
        ({"used": good["used"][:1]}, "fc1_weight must be"),
        ({"fc1_weight": good["fc1_weight"].double()}, "fc1_weight must be"),
        ({"fc1_bias": good["fc1_bias"][:, :0]}, "fc1_bias must be"),
        ({"fc2_weight": good["fc1_weight"]}, "fc2_weight must be"),
        ({"fc2_bias": good["fc2_bias"].bfloat16()}, "fc2_bias must be"),
        ({"stride": 5}, "stride is 5"),
        ({"dropout_p": 1.5}, "dropout_p must be"),
        ({"fc1_weight": good["fc1_weight"].to("meta")}, "fc1_weight is on meta"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.moe_experts(**{**good, **change})
    for used, stride in (([3, 6], 0), ([-1, 5], 0), ([3, 5], 4)):
        wrong = {**good, "used": torch.tensor(used), "stride": stride}
        with pytest.raises(RuntimeError, match="used"):
            ops.moe_experts(**wrong)
        with pytest.raises(RuntimeError, match="used"):
            ops.moe_experts_reference(**wrong)


def test_dtypes_without_a_kernel_use_the_reference():
    for dtype in (torch.float64, torch.float16):
        inputs = make_inputs(Case(dtype=dtype))
        assert not choice.uses_kernel("moe_experts", inputs.rows)
        weights = {k: v for k, v in vars(inputs).items() if k != "grad"}
        assert torch.equal(ops.moe_experts(**weights), ops.moe_experts_reference(**weights))


def test_autocast_changes_nothing():
    case = Case()
    weights = {k: v for k, v in vars(make_inputs(case)).items() if k != "grad"}
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.moe_experts(**weights)
    assert torch.equal(out, ops.moe_experts(**weights))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(), Case(used=(5, 5), stride=5, bias=False, dropout=0.2)])
def test_opcheck(case, dtype):
    case = replace(case, dtype=dtype)
    inputs = make_inputs(case)
    for tensor in inputs.differentiable().values():
        tensor.requires_grad_()
    weights = (inputs.fc1_weight, inputs.fc1_bias, inputs.fc2_weight)
    compiled = torch.ops.swin_moe
    arguments = (inputs.rows, inputs.used, *weights, inputs.fc2_bias)
    torch.library.opcheck(compiled.moe_experts, (*arguments, *numbers(case), True, CHOOSE))
    with torch.no_grad():
        _, pre = compiled.moe_experts(*arguments, *numbers(case), True, CHOOSE)
        assert compiled.moe_experts(*arguments, *numbers(case), False, CHOOSE)[1].shape == (0, 32)
    tensors = [t.detach() for t in (inputs.grad, inputs.rows, inputs.used, *weights)]
    seed, *rest = numbers(case)
    torch.library.opcheck(
        compiled.moe_experts_backward, (*tensors, seed, pre, *rest, case.bias, CHOOSE)
    )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiles_as_one_graph(dropout):
    case = Case()
    inputs = make_inputs(case)
    weights = {name: tensor.requires_grad_() for name, tensor in inputs.differentiable().items()}

    def layer(used: Tensor, **weights: Tensor) -> Tensor:
        return 2 * ops.moe_experts(used=used, **weights, dropout_p=dropout)

    torch.manual_seed(0)
    wanted = layer(inputs.used, **weights)
    grads = torch.autograd.grad(wanted, list(weights.values()), inputs.grad)
    torch.manual_seed(0)
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(inputs.used, **weights)
    torch.testing.assert_close(out, wanted)
    found = torch.autograd.grad(out, list(weights.values()), inputs.grad)
    torch.testing.assert_close(found, grads)


@needs_library
def test_a_second_derivative_is_an_error():
    inputs = make_inputs(Case())
    weights = {name: tensor.requires_grad_() for name, tensor in inputs.differentiable().items()}
    out = ops.moe_experts(used=inputs.used, **weights)
    (grad,) = torch.autograd.grad(out.sum(), inputs.rows, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
