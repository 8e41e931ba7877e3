"""torch.export and ONNX: the exported graph computes what the model does."""

import pytest
import torch

from tests.models.test_swin import lively

FAMILIES = ["swin", "swinv2", "swin_mlp", "swin_moe"]
BATCH = ({0: torch.export.Dim("batch")},)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_exported_equals_eager(family):
    model = lively(family)
    program = torch.export.export(model, (torch.randn(2, 3, 30, 41),), dynamic_shapes=BATCH)
    images = torch.randn(5, 3, 30, 41)
    torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_onnx_equals_eager(family, tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, path = lively(family), tmp_path / "model.onnx"
    example = (torch.randn(2, 3, 30, 41),)
    torch.onnx.export(model, example, path, dynamo=True, dynamic_shapes=BATCH, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = torch.randn(5, 3, 30, 41)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)
