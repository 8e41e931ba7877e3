"""TF32 and deterministic algorithms, with stubs where a GPU would be needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from swin_moe import distributed
from swin_moe.checkpoint import Reader
from swin_moe.common.hardware import GPUS
from swin_moe.config import Config
from swin_moe.distributed import Group, World
from swin_moe.models.layers import Fp32Linear
from swin_moe.moe import router
from swin_moe.reporting import profiler, tables
from swin_moe.reporting.metric_log import read_metrics
from swin_moe.training import precision
from tests.parallel import train

CUDA = torch.device("cuda", 0)


@pytest.fixture
def switches(monkeypatch):
    """Restore the global switches after the test."""
    former = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield monkeypatch
    torch.set_float32_matmul_precision(former[0])
    torch.backends.cudnn.allow_tf32 = former[1]
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


class Products(TorchDispatchMode):
    """The dtypes of all matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.append(result.dtype)
        return result


LAYERS = {
    "position bias": lambda: Fp32Linear(4, 3),
    "position bias of bf16": lambda: Fp32Linear(4, 3, bias=False).bfloat16(),
    "linear gate": lambda: router.LinearRouter(4, 3),
    "cosine gate": lambda: router.CosineRouter(4, 3, proj_dim=8),
    "soft gate": lambda: router.SoftRouter(4, 3),
}


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", LAYERS)
def test_position_bias_and_gates_never_compute_in_tf32(switches, name, tf32, device):
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    layer = LAYERS[name]()
    with FakeTensorMode():
        fake = {
            n: torch.empty(p.shape, dtype=p.dtype, device=device, requires_grad=True)
            for n, p in layer.named_parameters()
        }
        x = torch.empty(2, 4, device=device, requires_grad=True)
        with Products() as seen:
            out = torch.func.functional_call(layer, fake, x)  # its gradients have its dtypes
    assert out.dtype == torch.float32
    assert len(seen.dtypes) == (2 if name == "cosine gate" else 1)
    assert set(seen.dtypes) == {torch.float64 if tf32 and device == "cuda" else torch.float32}


@pytest.mark.parametrize(
    ("dtype", "tf32", "used"),
    [("fp32", True, True), ("fp32", False, False), ("bf16", True, False), ("auto", True, False)],
)
def test_tf32_is_for_fp32_runs_on_a_gpu(switches, dtype, tf32, used):
    switches.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    switches.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    config = Config(precision={"dtype": dtype, "tf32": tf32})
    precision.set_numerics(config, CUDA)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == used
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    precision.set_numerics(config, torch.device("cpu"))
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize(
    ("dtype", "chosen", "tf32", "stage", "device", "line"),
    [
        ("auto", "fp16", False, 1, CUDA,
         "fp16 (fp16 weights, fp32 masters, dynamic loss scale); this GPU has no bf16"),
        ("fp16", "fp16", False, 0, CUDA, "fp16 (autocast over fp32 weights, dynamic loss scale)"),
        ("auto", "fp32", False, 1, CUDA, "fp32; this GPU has no bf16"),
        ("fp32", "fp32", True, 1, CUDA, "fp32; TF32 products"),
        ("auto", "fp32", True, 1, torch.device("cpu"), "fp32; no TF32 on a CPU"),
        ("auto", "bf16", True, 1, CUDA, "bf16 (bf16 weights, fp32 masters)"),
        ("auto", "bf16", False, 0, CUDA, "bf16 (autocast over fp32 weights)"),
    ],
)  # fmt: skip
def test_the_header_says_which_precision_and_why(dtype, chosen, tf32, stage, device, line):
    config = Config(precision={"dtype": dtype, "tf32": tf32}, zero={"stage": stage})
    world = World(0, 0, 1, device, Group(), Group())
    assert tables._precision(config, world, precision.DTYPES[chosen]) == line


def test_peaks_follow_the_dtype(monkeypatch):
    gpus = (("A100-SXM4-80GB", 312e12, 19.5e12, 156e12), ("V100-SXM2", 125e12, 15.7e12, 15.7e12))
    for name, half, single, tf32 in gpus:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        for low in (torch.bfloat16, torch.float16):
            assert profiler.peak_flops(CUDA, low, tf32=True) == half
        assert profiler.peak_flops(CUDA, torch.float32) == single
        assert profiler.peak_flops(CUDA, torch.float32, tf32=True) == tf32
    assert [name for name, gpu in GPUS.items() if not gpu.has_bf16] == ["v100"]


def test_deterministic_sets_every_switch(switches):
    environment = {}
    switches.setattr("swin_moe.distributed.world.os.environ", environment)
    switches.setattr(torch.backends.cudnn, "benchmark", True)
    distributed.make_deterministic()
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.backends.cudnn.benchmark


def test_a_deterministic_run_equals_another_on_a_cpu(tmp_path):
    found = []
    for name in ("false", "true"):
        done = train(tmp_path / name, "train.max_steps=3", f"train.deterministic={name}",
                     "log.every_steps=1")  # fmt: skip
        assert done.returncode == 0, done.stderr
        reader = Reader(tmp_path / name / "checkpoints/last")
        losses = [r["train/loss"] for r in read_metrics(tmp_path / name) if "train/loss" in r]
        found.append((losses, {name: reader.tensor(name) for name in reader.names()}))
    assert found[0][0] == found[1][0]
    assert len(found[0][0]) == 3
    for name, value in found[0][1].items():
        assert torch.equal(value, found[1][1][name]), name
