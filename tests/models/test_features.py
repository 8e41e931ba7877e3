"""Feature maps for detection and segmentation, and the examples of docs/dense_prediction.md."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from swin_moe import build_features, build_model

DOC = Path(__file__).parents[2] / "docs" / "dense_prediction.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
SMALL = {"embed_dim": 8, "depths": [2, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4,
         "img_size": 64, "drop_path_rate": 0.0}  # fmt: skip
MOE = {"blocks": [[1], [], [0], [0]], "num_experts": 4}
FAMILIES = ["swin", "swinv2", "swin_mlp", "swin_moe_small_dense_window12_192_22k"]


def step(features, images):
    """One optimizer step; the parameters that it changed."""
    before = {name: p.detach().clone() for name, p in features.named_parameters()}
    maps, aux_loss, _ = features(images)
    loss = sum((x * torch.randn_like(x)).sum() for x in maps)
    loss = loss if aux_loss is None else loss + aux_loss
    loss.backward()
    parameters = [p for p in features.parameters() if p.requires_grad]
    torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5).step()
    return {name for name, p in features.named_parameters() if not torch.equal(p, before[name])}


def wake(features):
    """Block norms of V2 start at zero, which leaves what precedes them without a gradient."""
    for parameter in features.parameters():
        if parameter.ndim == 1:
            torch.nn.init.ones_(parameter)
    return features


@pytest.mark.parametrize("size", [(64, 64), (64, 96), (61, 90), (90, 61), (7, 40)])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_maps_of_any_image_size(family, size):
    features = build_features(family, **SMALL).eval()
    assert features.num_features == features.channels == [8, 16, 32, 64]
    assert features.strides == [4, 8, 16, 32]
    maps = features(torch.randn(2, 3, *size)).predictions
    for x, channels, stride in zip(maps, features.channels, features.strides, strict=True):
        assert x.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))
        assert x.is_contiguous()
        torch.testing.assert_close(x.mean(1), torch.zeros_like(x[:, 0]), rtol=0, atol=1e-5)
        assert x.isfinite().all()


@torch.no_grad()
def test_maps_are_taken_before_patch_merging():
    model = build_model("swin", num_classes=0, **SMALL).eval()
    features = build_features("swin", out_indices=(1, 3), output_format="NHWC", **SMALL).eval()
    features.backbone.load_state_dict(model.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    second, last = features(images).predictions
    x = model.layers[1].forward_blocks(model.layers[0](model.embed(images))[0])[0]
    torch.testing.assert_close(second, torch.nn.functional.layer_norm(x, (16,)))
    torch.testing.assert_close(last, model.forward_features(images)[0])
    assert features.strides == [8, 32]
    assert {name for name, _ in features.named_children()} == {"backbone", "norm1", "norm3"}


@pytest.mark.parametrize("moe", [{}, MOE])
def test_every_parameter_has_a_gradient(moe):
    """Also where stages are cut off: DDP waits for all of them."""
    features = build_features("swinv2", out_indices=(0, 2), moe=moe, **SMALL).train()
    assert len(features.backbone.layers) == 3
    maps, aux_loss, _ = features(torch.randn(2, 3, 64, 64))
    assert (aux_loss is not None) == bool(moe)
    loss = sum(x.sum() for x in maps)
    (loss if aux_loss is None else loss + aux_loss).backward()
    assert [name for name, p in features.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 4])
def test_frozen_stages(frozen_stages):
    features = wake(build_features("swinv2", ape=True, frozen_stages=frozen_stages, **SMALL))
    features.eval().train()
    stem = ["patch_embed", "pos_drop", "absolute_pos_embed"] if frozen_stages >= 0 else []
    frozen = tuple(f"backbone.{name}" for name in stem) + tuple(
        f"backbone.layers.{stage}" for stage in range(frozen_stages)
    )
    for name, module in features.named_modules():
        assert module.training != name.startswith(frozen or "nothing"), name
    changed = step(features, torch.randn(2, 3, 64, 64))
    names = {name for name, _ in features.named_parameters()}
    assert changed == {name for name in names if not name.startswith(frozen or "nothing")}


def test_frozen_mixtures():
    features = wake(build_features("swinv2", moe=MOE, freeze_moe=True, **SMALL)).train()
    frozen = tuple(f"backbone.layers.{name}.mlp" for name in ("0.blocks.1", "2.blocks.0"))
    frozen = (*frozen, "backbone.layers.3.blocks.0.mlp")
    for name, module in features.named_modules():
        assert module.training != name.startswith(frozen), name
    images = torch.randn(2, 3, 64, 64)
    assert all(map(torch.equal, features(images)[0], features(images)[0]))  # no gate noise
    changed = step(features, images)
    names = {name for name, _ in features.named_parameters()}
    assert changed == {name for name in names if not name.startswith(frozen)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"out_indices": (0, 4)}, r"out_indices=\(0, 4\) must be ascending stages from 0 to 3"),
        ({"out_indices": (-1, 2)}, "out_indices="),
        ({"out_indices": (2, 1)}, "out_indices="),
        ({"out_indices": (1, 1)}, "out_indices="),
        ({"out_indices": ()}, "out_indices="),
        ({"output_format": "nchw"}, "output_format='nchw' must be 'NCHW' or 'NHWC'"),
        ({"frozen_stages": -2}, "frozen_stages=-2 must be from -1 to 4"),
        ({"frozen_stages": 3, "out_indices": (0, 1)}, "frozen_stages=3 must be from -1 to 2"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        build_features("swinv2", **arguments, **SMALL)
    assert "\n" not in str(error.value)


def test_weights_of_a_file(tmp_path):
    model = build_model("swin", num_classes=10, **SMALL)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    path = str(tmp_path / "model.safetensors")
    features = build_features("swin", pretrained=path, **SMALL)
    expected = model.state_dict()
    for name, tensor in features.backbone.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def run(*numbers):
    """Execute the document's first block and others in one namespace."""
    torch.manual_seed(0)
    namespace = {}
    for number in (0, *numbers):
        exec(compile(BLOCKS[number], f"{DOC.name}, block {number}", "exec"), namespace)
    return namespace


def patch_gradient(features):
    return features.backbone.patch_embed.proj.weight.grad.abs().sum()


def test_mask_rcnn_example():
    example = run(1)
    assert len(example["losses"]) == 5
    assert all(loss.isfinite() for loss in example["losses"].values())
    assert patch_gradient(example["features"]) > 0


def test_upernet_example():
    pytest.importorskip("transformers")
    example = run(2)
    assert example["output"].loss.isfinite()
    assert example["output"].logits.shape == (2, 5, 96, 128)
    assert example["segmenter"].decode_head.in_channels == example["features"].channels
    assert patch_gradient(example["features"]) > 0


def test_mixture_and_weights_examples():
    example = run(3, 4, 5)
    assert len(BLOCKS) == 6
    frozen = example["frozen"].backbone.layers[3].blocks[0].mlp
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not frozen.training
    assert example["loss"].isfinite()
    trained = example["trained"].backbone.layers[3].blocks[0].mlp
    assert trained.router.weight.grad.abs().sum() > 0
