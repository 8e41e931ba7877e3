"""Other implementations' weights compute the same here, and ours the same in them."""

import json

import pytest
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2
from torch import nn
from torchvision.models import swin_transformer as torchvision_swin

from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.models import Outputs, SwinTransformer
from swin_moe.models.layers import PatchMerging
from swin_moe.weights.adapters import (
    DIALECTS,
    DialectError,
    detect,
    from_swin_moe,
    huggingface_config,
    to_swin_moe,
)
from tests.golden import Golden
from tests.models.test_golden import configs

# Three stages: shifted windows, then a stage that is one window.
SHAPE = {"embed_dim": 24, "depths": [2, 1, 2], "num_heads": [2, 4, 4], "window_size": 4,
         "drop_path_rate": 0.0, "num_classes": 5}  # fmt: skip
FAMILIES = {
    "swin_moe": ["swin", "swinv2", "swin_mlp", "swin_moe"],
    "official": ["swin", "swinv2", "swin_mlp", "swin_moe"],
    **{name: ["swin", "swinv2"] for name in ("timm", "huggingface", "torchvision", "mmseg")},
}
PAIRS = [(dialect, family) for dialect in DIALECTS for family in FAMILIES[dialect]]
PEERS = [pair for pair in PAIRS if pair[0] in ("timm", "huggingface", "torchvision")]
PRETRAINED = {"pretrained_window_sizes": [3, 3, 2]}
GOLDEN = ["swin_v1_w7", "swinv2_w4", "swinv2_w8", "swinv2_w8_pretrained", "swin_mlp",
          "swin_moe_official", "swin_moe_official_cosine"]  # fmt: skip
TARGET_BUFFERS = ("relative_position_index", "relative_coords_table", "attn_mask", "_experts")


def config(family, **changes):
    return ModelConfig(**{"family": family, "img_size": 64, **SHAPE, **changes})


def redraw(model):
    """Draw every parameter from a normal distribution: norms of zero would hide blocks."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def ours(family, moe=None, **changes):
    return redraw(SwinTransformer(config(family, **changes), MoEConfig(**moe or {})))


def build_peer(dialect, family, **changes):
    model = config(family, **changes)
    if dialect == "timm":
        names = ("img_size", "embed_dim", "depths", "num_heads", "window_size", "num_classes")
        arguments = {name: getattr(model, name) for name in names}
        if family == "swin":
            return TimmSwin(**arguments, qkv_bias=model.qkv_bias)
        pretrained = model.pretrained_window_sizes or [0, 0, 0]
        return TimmSwinV2(**arguments, qkv_bias=model.qkv_bias, pretrained_window_sizes=pretrained)
    if dialect == "torchvision":
        names = ("embed_dim", "depths", "num_heads", "num_classes")
        arguments = {name: getattr(model, name) for name in names}
        arguments |= {"patch_size": [4, 4], "window_size": [model.window_size] * 2}
        if family == "swinv2":
            arguments["block"] = torchvision_swin.SwinTransformerBlockV2
            arguments["downsample_layer"] = torchvision_swin.PatchMergingV2
        return torchvision_swin.SwinTransformer(**arguments)
    transformers = import_transformers()
    settings = transformers.AutoConfig.for_model(**huggingface_config(model))
    return transformers.AutoModelForImageClassification.from_config(settings)


def import_transformers():
    reason = "transformers, which tests alone use, is not installed"
    return pytest.importorskip("transformers", reason=reason)


def logits(model, images):
    with torch.no_grad():
        output = model(images)
    if isinstance(output, Outputs):
        return output.predictions
    return output if isinstance(output, torch.Tensor) else output.logits


def load_into_peer(dialect, family, state, folder, **changes):
    """Load a written state strictly into a new peer, by its own loader if it has one."""
    if dialect != "huggingface":
        peer = build_peer(dialect, family, **changes)
        peer.load_state_dict(state, strict=True)
        return peer.eval()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(huggingface_config(config(family, **changes))))
    auto = import_transformers().AutoModelForImageClassification
    peer, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return peer.eval()


@pytest.mark.parametrize(
    ("dialect", "family", "changes"),
    [
        *((dialect, family, {}) for dialect, family in PEERS),
        *((dialect, family, {"qkv_bias": False}) for dialect, family in PEERS[:4]),
        *((dialect, "swinv2", PRETRAINED) for dialect in ("timm", "huggingface")),
    ],
    ids=str,
)
def test_peer_computes_the_same(dialect, family, changes, tmp_path):
    peer = redraw(build_peer(dialect, family, **changes))
    theirs = peer.state_dict()
    assert detect(theirs) == dialect
    translation = to_swin_moe(theirs, dialect)
    assert translation.unknown == []
    model = SwinTransformer(config(family, **changes)).eval()
    model.load_state_dict(translation.state, strict=True)
    images = torch.randn(2, 3, 64, 64)
    expected = logits(peer, images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits(model, images), expected, atol=1e-5, rtol=1e-5)

    written = from_swin_moe(model.state_dict(), dialect, model.config)
    again = load_into_peer(dialect, family, written, tmp_path, **changes)
    torch.testing.assert_close(logits(again, images), expected, atol=1e-6, rtol=1e-5)
    for name, tensor in again.state_dict().items():
        if name.endswith("qkv.bias") and dialect == "torchvision" and family == "swinv2":
            theirs[name].view(3, -1)[1] = 0  # of k, which torchvision sets to zero at each call
        if name.endswith("relative_coords_table"):
            torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=0)
        else:
            assert torch.equal(tensor, theirs[name]), name


def test_torchvision_follows_the_pretrained_window_by_its_buffer():
    model = ours("swinv2", **PRETRAINED)
    state = from_swin_moe(model.state_dict(), "torchvision", model.config)
    peer = load_into_peer("torchvision", "swinv2", state, None)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(logits(peer, images), logits(model, images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES["huggingface"])
def test_other_huggingface_heads(family):
    """SwinModel has neither prefix nor head; masked image modelling has a decoder."""
    transformers = import_transformers()
    settings = transformers.AutoConfig.for_model(**huggingface_config(config(family)))
    masked = transformers.AutoModelForMaskedImageModeling.from_config(settings)
    translation = to_swin_moe(masked.state_dict(), "huggingface")
    mask_token = f"{family}.embeddings.mask_token"
    assert set(translation.dropped) == {"decoder.0.weight", "decoder.0.bias", mask_token}
    assert translation.unknown == []
    bare = to_swin_moe(getattr(masked, family).state_dict(), "huggingface")
    model = SwinTransformer(config(family, num_classes=0))
    for state in (translation.state, bare.state):
        model.load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", [*GOLDEN, "simmim_swinv2"])
def test_official_round_trip(name):
    golden = Golden(name)
    if name == "simmim_swinv2":
        arguments = golden.config["arguments"]["encoder"]
        names = ModelConfig.model_fields.keys() & arguments
        model, moe = ModelConfig(**{key: arguments[key] for key in names}), MoEConfig()
        model.num_classes = 0
    else:
        model, moe = configs(golden)
    assert detect(golden.weights) == "official"
    translation = to_swin_moe(golden.weights, "official")
    assert translation.unknown == []
    SwinTransformer(model, moe).load_state_dict(translation.state, strict=True)
    written = from_swin_moe(translation.state, "official", model)
    lost = ("decoder.", "encoder.mask_token")
    expected = {k.removeprefix("encoder."): v for k, v in golden.weights.items()
                if not k.startswith(lost)}  # fmt: skip
    assert written.keys() == expected.keys()
    for key, tensor in written.items():
        assert tensor.dtype == expected[key].dtype
        if key.endswith("relative_coords_table"):
            torch.testing.assert_close(tensor, expected[key], atol=1e-6, rtol=0)
        else:
            assert torch.equal(tensor, expected[key]), key


def test_a_missing_fc2_bias_of_experts():
    """A zero bias means none only if dense blocks have none."""
    weights = Golden("swin_moe_official_cosine").weights
    biases = {name for name in weights if name.endswith("batched_fc2_bias")}
    translation = to_swin_moe(weights, "official")
    assert biases <= translation.dropped.keys()
    assert not any(name.endswith("fc2.bias") for name in translation.state)

    dense = {"layers.0.blocks.0.mlp.fc2.bias": torch.zeros(12)}
    kept = to_swin_moe({**weights, **dense}, "official")
    assert sum(name.endswith("experts.fc2.bias") for name in kept.state) == len(biases)
    drawn = {**weights, min(biases): torch.ones_like(weights[min(biases)])}
    assert biases.isdisjoint(to_swin_moe(drawn, "official").dropped)


def test_old_simmim_names():
    weights = Golden("simmim_swinv2").weights
    old = {name.replace("cpb_mlp", "rpe_mlp"): tensor for name, tensor in weights.items()}
    translation = to_swin_moe(old, "official")
    assert translation.unknown == []
    assert translation.state.keys() == to_swin_moe(weights, "official").state.keys()
    source = ("encoder.layers.0.blocks.0.attn.rpe_mlp.0.weight",)
    assert translation.sources["layers.0.blocks.0.attn.cpb_mlp.0.weight"] == source


def test_the_backbone_of_an_official_detector():
    """Microsoft's detection and segmentation files: a norm per output, necks and heads."""
    weights = {k: v for k, v in Golden("swinv2_w8").weights.items() if not k.startswith("head.")}
    wanted = to_swin_moe(weights, "official").state
    detector = {
        "backbone."
        + (name.replace("norm.", "norm3.") if name.startswith("norm.") else name): tensor
        for name, tensor in weights.items()
    }
    detector |= {"backbone.norm0.weight": torch.ones(16), "neck.convs.0.weight": torch.ones(1)}
    detector |= {"rpn_head.conv.weight": torch.ones(1), "roi_head.bbox_head.fc.bias": torch.ones(1)}
    assert detect(detector) == "official"
    translation = to_swin_moe(detector, "official")
    assert translation.unknown == []
    assert translation.state.keys() == wanted.keys()
    assert torch.equal(translation.state["norm.weight"], wanted["norm.weight"])


@pytest.mark.parametrize(("dialect", "family"), PAIRS)
def test_round_trip_from_ours(dialect, family):
    """Every name is written, read back and unchanged; nothing is left over but buffers."""
    moe = {"blocks": [[], [], [1]], "num_experts": 2, "router": "cosine"}
    has_moe = dialect == "swin_moe" or (dialect, family) == ("official", "swin_moe")
    model = ours(family, moe if has_moe else None)
    state = model.state_dict()
    written = from_swin_moe(state, dialect, model.config)
    assert detect(written) == (dialect if dialect != "swin_moe" or has_moe else "official")
    storages = [tensor.untyped_storage().data_ptr() for tensor in written.values()]
    assert len(set(storages)) == len(storages), "safetensors refuses tensors that share memory"
    for prefix in ("", "module."):
        translation = to_swin_moe({prefix + k: v for k, v in written.items()}, dialect)
        assert translation.unknown == []
        assert translation.state.keys() == state.keys() == translation.sources.keys()
        assert all(torch.equal(translation.state[name], state[name]) for name in state)
        assert all(name.endswith(TARGET_BUFFERS) for name in translation.dropped)
        used = {name for names in translation.sources.values() for name in names}
        assert used | translation.dropped.keys() == {prefix + name for name in written}


def test_dense_names_without_buffers_are_both_official_and_ours():
    state = ours("swin_mlp").state_dict()
    assert detect(state) == "official"
    assert to_swin_moe(state, "swin_moe").state.keys() == state.keys()


class UnfoldMerging(nn.Module):
    """OpenMMLab's patch merging: nn.Unfold over [B, C, H, W]."""

    def __init__(self, dim, post_norm):
        super().__init__()
        self.post_norm = post_norm
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim if post_norm else 4 * dim)

    def forward(self, x):
        height, width = x.shape[1:3]
        x = nn.functional.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
        x = self.norm(self.reduction(x)) if self.post_norm else self.reduction(self.norm(x))
        return x.unflatten(1, (height // 2, width // 2))


@pytest.mark.parametrize(("family", "stage"), [("swin", 0), ("swinv2", 1)])
def test_mmseg_merges_as_unfold_does(family, stage):
    peer = redraw(UnfoldMerging(24, post_norm=family == "swinv2"))
    model = ours(family)
    state = from_swin_moe(model.state_dict(), "mmseg", model.config)
    place = f"backbone.stages.{stage}.downsample."
    state |= {place + name: tensor for name, tensor in peer.state_dict().items()}
    translation = to_swin_moe(state, "mmseg")
    place = "layers.0.downsample."
    merging = PatchMerging(24, post_norm=family == "swinv2")
    merging.load_state_dict({name.removeprefix(place): tensor
                             for name, tensor in translation.state.items()
                             if name.startswith(place)})  # fmt: skip
    x = torch.randn(2, 6, 4, 24)
    torch.testing.assert_close(merging(x), peer(x), atol=1e-5, rtol=1e-5)


def both(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


BLOCK = "backbone.stages.0.blocks.0."
MMSEG_COMMON = [
    *both("backbone.patch_embed.projection", "backbone.patch_embed.norm"),
    *both(*(BLOCK + part for part in ("norm1", "norm2", "ffn.layers.0.0", "ffn.layers.1"))),
    *both(BLOCK + "attn.w_msa.proj"), BLOCK + "attn.w_msa.qkv.weight",
    *both("backbone.stages.1.blocks.0.norm1"), "backbone.absolute_pos_embed",
]  # fmt: skip
MMSEG_V1 = [
    *MMSEG_COMMON, BLOCK + "attn.w_msa.qkv.bias", BLOCK + "attn.w_msa.relative_position_bias_table",
    *both("backbone.stages.0.downsample.norm"), "backbone.stages.0.downsample.reduction.weight",
]  # fmt: skip
MMSEG_V2 = [
    *MMSEG_COMMON,
    *(BLOCK + "attn.w_msa." + name for name in ("q_bias", "v_bias", "logit_scale")),
    *both(BLOCK + "attn.w_msa.cpb_mlp.0"), BLOCK + "attn.w_msa.cpb_mlp.2.weight",
    *both(BLOCK + "norm3", "backbone.stages.1.downsample.norm", "backbone.norm1", "head.fc"),
    "backbone.stages.1.downsample.reduction.weight",
]  # fmt: skip
MMSEG_DROPPED = [
    BLOCK + "attn.w_msa.relative_position_index", *both("backbone.norm0"),
    "decode_head.psp_modules.0.1.conv.weight", "auxiliary_head.convs.0.bn.running_mean",
    "neck.lateral_convs.0.conv.weight", "rpn_head.rpn_conv.weight",
    "roi_head.bbox_head.0.fc_cls.weight",
]  # fmt: skip
V2_DROPPED = [BLOCK + "attn.w_msa.relative_position_index",
              BLOCK + "attn.w_msa.relative_coords_table", "backbone.mask_token"]  # fmt: skip
CONVERTED = [name.removeprefix("backbone.") for name in MMSEG_V1]  # mmseg's ImageNet files


@pytest.mark.parametrize(
    ("known", "dropped"),
    [
        ([*MMSEG_V1, *both("backbone.norm1")], MMSEG_DROPPED),
        ([*MMSEG_V1, *both("backbone.norm1", "head.fc")], []),
        ([*CONVERTED, *both("norm", "head.fc")], ["stages.0.blocks.1.attn_mask"]),
        (MMSEG_V2, V2_DROPPED),
    ],
    ids=["mmseg", "mmpretrain", "converted", "mmpretrain_v2"],
)
def test_names_of_openmmlab(known, dropped):
    state = {name: torch.zeros(8, 16) if "reduction" in name else torch.zeros(16)
             for name in (*known, *dropped)}  # fmt: skip
    assert detect(state) == "mmseg"
    translation = to_swin_moe(state, "mmseg")
    assert translation.unknown == []
    assert translation.dropped.keys() == set(dropped)
    assert {"norm.weight", "layers.0.downsample.norm.weight"} <= translation.state.keys()
    assert len(translation.state) == len(known)


def test_unknown_names_are_reported():
    state = from_swin_moe(ours("swin").state_dict(), "huggingface", config("swin"))
    del state["swin.encoder.layers.0.blocks.0.attention.self.key.weight"]
    state["swin.encoder.layers.0.blocks.0.adapter.weight"] = torch.zeros(1)
    translation = to_swin_moe(state, "huggingface")
    block = "swin.encoder.layers.0.blocks.0."
    assert set(translation.unknown) == {
        block + "adapter.weight",
        block + "attention.self.query.weight",  # useless without the key's
        block + "attention.self.value.weight",
    }
    assert "layers.0.blocks.0.attn.qkv.weight" not in translation.state


@pytest.mark.parametrize("actual", ["official", "timm", "huggingface", "torchvision", "mmseg"])
@pytest.mark.parametrize("named", DIALECTS)
def test_wrong_dialect(actual, named):
    state = from_swin_moe(ours("swin").state_dict(), actual, config("swin"))
    if named == actual or {named, actual} == {"official", "swin_moe"}:
        return
    with pytest.raises(
        DialectError, match=f"these look like {actual} names; use --from {actual} or"
    ):
        to_swin_moe(state, named)


def test_experts_distinguish_official_files_from_ours():
    model = ours("swin_moe", {"blocks": [[1]], "num_experts": 2})
    state = model.state_dict()
    with pytest.raises(DialectError, match="look like swin_moe names"):
        to_swin_moe(state, "official")
    with pytest.raises(DialectError, match="look like official names"):
        to_swin_moe(from_swin_moe(state, "official", model.config), "swin_moe")


@pytest.mark.parametrize("state", [{}, {"conv1.weight": torch.zeros(1)}], ids=["empty", "other"])
def test_no_dialect(state):
    with pytest.raises(
        DialectError, match=r"no Swin state dict: .*(is empty|'conv1.weight').*timm"
    ):
        to_swin_moe(state, "timm")
    with pytest.raises(DialectError, match="unknown dialect 'keras': one of swin_moe, official"):
        to_swin_moe(state, "keras")


@pytest.mark.parametrize(
    ("dialect", "family", "changes", "message"),
    [
        ("timm", "swin_mlp", {}, "timm has no family swin_mlp; it has swin, swinv2"),
        ("huggingface", "swin_moe", {}, "huggingface has no family swin_moe"),
        ("timm", "swin", {"ape": True}, "timm has no ape=True"),
        ("huggingface", "swinv2", {"ape": True}, "huggingface has no ape=True"),
        ("torchvision", "swin", {"in_chans": 1}, "torchvision has no in_chans=1"),
        ("official", "swinv2", {"extra_norm_every_n_blocks": 2}, "no extra_norm_every_n_blocks=2"),
        ("mmseg", "swin", {"mlp_fc2_bias": False}, "mmseg has no mlp_fc2_bias=False"),
        ("torchvision", "swinv2", {"window_size": 8}, "stage 2 has windows of 8×8 .* 4×4"),
        ("huggingface", "swin", {"window_size": 8}, "stage 2 has windows of 8×8 .* 4×4"),
        ("timm", "swin", {"img_size": [64, 128]}, "stage 2 has .*unshifted/shifted"),
        ("official", "swin", {"img_size": 36, "window_size": 3}, "cannot merge the 9×9 tokens"),
        ("mmseg", "swinv2", {"img_size": 72}, "18×18 tokens, which windows of 4 do not divide"),
        ("huggingface", "swinv2", {"img_size": 62}, "multiple of patch_size=4"),
    ],
)
def test_options_that_a_target_lacks(dialect, family, changes, message):
    with torch.device("meta"):
        model = SwinTransformer(config(family, **changes))
    with pytest.raises(DialectError, match=message):
        from_swin_moe(model.state_dict(), dialect, model.config)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", ["swin", "swinv2", "swin_moe"])
def test_experts_only_where_there_are_experts(dialect, family):
    model = ours(family, {"blocks": [[1]], "num_experts": 2})
    if dialect == "swin_moe" or (dialect, family) == ("official", "swin_moe"):
        from_swin_moe(model.state_dict(), dialect, model.config)
        return
    with pytest.raises(DialectError, match=f"{dialect} has no (mixtures of experts|family)"):
        from_swin_moe(model.state_dict(), dialect, model.config)


def test_states_that_cannot_be_written_or_read():
    state = {**ours("swin").state_dict(), "layers.0.blocks.0.adapter.weight": torch.zeros(1)}
    with pytest.raises(DialectError, match=r"adapter.weight' \(1 such names\) has no counterpart"):
        from_swin_moe(state, "timm", config("swin"))
    state = from_swin_moe(ours("swin").state_dict(), "mmseg", config("swin"))
    state["backbone.stages.0.downsample.norm.weight"] = torch.zeros(7)
    with pytest.raises(DialectError, match=r"downsample.norm.weight: shape \(7,\) does not fit"):
        to_swin_moe(state, "mmseg")
