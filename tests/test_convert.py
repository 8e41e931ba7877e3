"""Weights from any dialect into any other, fitted to other images, windows, classes and experts."""

import hashlib
import json
import re

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.swin_transformer_v2 import SwinTransformerV2 as TimmSwinV2

from swin_moe import build_model
from swin_moe.cli.main import main
from swin_moe.config import ModelConfig, MoEConfig
from swin_moe.config.variants import default_moe_blocks
from swin_moe.models import SwinTransformer
from swin_moe.weights.convert import Upcycle, convert
from swin_moe.weights.files import WeightsError, read, write
from swin_moe.weights.pretrained import read_pretrained
from swin_moe.weights.transfer import rows_22k_to_1k, upcycle
from tests.golden import Golden
from tests.parallel import one_error, swin_moe, train

SHAPE = {"patch_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
OURS = {key: list(value) if isinstance(value, tuple) else value for key, value in SHAPE.items()}


def random_timm(version: int, **changes):
    torch.manual_seed(version)
    kind, window = (TimmSwin, 7) if version == 1 else (TimmSwinV2, 8)
    arguments = {"img_size": 8 * window, "window_size": window, "num_classes": 10} | changes
    model = kind(**SHAPE, **arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(source, output, **options):
    """Convert quietly; return the printed table and closing lines."""
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    convert(source, output, console, **options)
    return console.export_text()


@pytest.fixture
def timm_v1(tmp_path):
    model = random_timm(1)
    torch.save({"state_dict": model.state_dict(), "arch": "swin"}, tmp_path / "v1.pth")
    return model, tmp_path / "v1.pth"


@pytest.fixture
def timm_v2(tmp_path):
    model = random_timm(2, num_classes=21841)
    write(tmp_path / "v2.safetensors", model.state_dict())
    return model, tmp_path / "v2.safetensors"


# --------------------------------------------------------------------------------------------
# Round trips


@torch.no_grad()
def test_a_converted_file_knows_its_model(timm_v1, tmp_path):
    theirs, path = timm_v1
    printed = run(path, tmp_path / "ours.safetensors")
    assert "renamed" in printed
    assert "layers.1.downsample.reduction.weight → layers.0.downsample.reduction.weight" in printed
    source = read_pretrained(tmp_path / "ours.safetensors")
    assert source.config.model.window_size == 7
    model = SwinTransformer(source.config.model).eval()
    model.load_state_dict(source.state)
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model(images).predictions, theirs(images), rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "ours.safetensors", "pt") as handle:
        assert json.loads(handle.metadata()["swin_moe"])["model"]["family"] == "swin"


@pytest.mark.parametrize("dialect", ["official", "timm", "huggingface", "torchvision", "mmseg"])
def test_round_trip_through_every_dialect(timm_v1, tmp_path, dialect):
    theirs, path = timm_v1
    run(path, tmp_path / "theirs.safetensors", dialect=dialect)
    run(tmp_path / "theirs.safetensors", tmp_path / "back.pth", dialect="timm")
    back = read(tmp_path / "back.pth").state
    parameters = dict(theirs.named_parameters())
    assert back.keys() == parameters.keys()
    assert all(torch.equal(back[name], parameters[name]) for name in back)


@torch.no_grad()
def test_a_hugging_face_folder_opens_by_itself(timm_v1, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs, path = timm_v1
    run(path, tmp_path / "hf", dialect="huggingface")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "hf").eval()
    images = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model(images).logits, theirs(images), rtol=1e-4, atol=1e-4)
    assert read_pretrained(tmp_path / "hf").config.model.window_size == 7


def test_a_file_of_a_model_that_computes_differently_at_its_size_has_a_note(timm_v1, tmp_path):
    """If windows do not divide the map, the other program pads differently."""
    run(timm_v1[1], tmp_path / "hf", dialect="huggingface")
    assert read_pretrained(tmp_path / "hf").notes == []
    path = tmp_path / "hf/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_size": 60}))
    (note,) = read_pretrained(tmp_path / "hf").notes
    assert "huggingface at img_size=60 would compute something else" in note
    assert "15×15 tokens, which windows of 7 do not divide" in note


@pytest.mark.parametrize("ranks", [1, 2])
def test_official_moe_files_round_trip(tmp_path, ranks):
    golden = Golden("swin_moe_official")
    write(tmp_path / "in.safetensors", golden.weights)
    run(tmp_path / "in.safetensors", tmp_path / "ours.safetensors")
    run(tmp_path / "ours.safetensors", tmp_path / "out.pth", dialect="official", ranks=ranks)
    assert sorted(p.name for p in tmp_path.glob("out.pth*")) == [
        "out.pth.master", *(f"out.pth.rank{rank}" for rank in range(ranks))
    ]  # fmt: skip
    back = read(tmp_path / "out.pth").state
    for name, tensor in golden.weights.items():
        if not name.endswith(("relative_coords_table", "relative_position_index", "attn_mask")):
            assert torch.equal(back[name].to(tensor), tensor), name


@pytest.mark.parametrize(
    "name", ["swinv2_w8", "swinv2_w4", "swinv2_w8_pretrained", "swin_v1_w7", "swin_mlp",
             "swin_moe_official", "swin_moe_official_cosine"],
)  # fmt: skip
@torch.no_grad()
def test_the_model_of_official_files_is_inferred(tmp_path, name):
    """Shapes, windows and pretrained windows follow from the tensors; the logits are right."""
    golden = Golden(name)
    write(tmp_path / "in.safetensors", golden.weights)
    source = read_pretrained(tmp_path / "in.safetensors")
    arguments = golden.config["arguments"]
    for key in ("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "num_classes",
                "qkv_bias", "ape"):  # fmt: skip
        if key in arguments:
            assert getattr(source.config.model, key) == arguments[key], key
    if any(arguments.get("pretrained_window_sizes", [])):
        assert source.config.model.pretrained_window_sizes == arguments["pretrained_window_sizes"]
    if "moe" not in name:
        built = source.config.model.model_copy(update={"img_size": arguments["img_size"]})
        model = SwinTransformer(built).eval()
        model.load_state_dict(source.state)
        golden.check("logits", model(golden.io["input"]).predictions)


# --------------------------------------------------------------------------------------------
# Other classes, images and windows


def test_the_head_map_is_the_official_one():
    rows = rows_22k_to_1k().tolist()
    assert len(set(rows)) == 1000
    # tench, goldfish, great white shark; teddy bear
    assert (rows[:3], rows[850], rows[999]) == ([359, 368, 460], 5564, 21817)
    digest = hashlib.sha256("\n".join(map(str, rows)).encode()).hexdigest()  # of the whole list
    assert digest == "4fff66d6f337db6dd0b41d1b6c863e617f9400d37892df630eecfcfa50131aab"


def test_heads(timm_v2, tmp_path):
    theirs, path = timm_v2
    printed = run(path, tmp_path / "1k.safetensors", overrides={"model": {"num_classes": 1000}})
    assert "21841 → 1000" in printed
    head = load_file(tmp_path / "1k.safetensors")["head.weight"]
    assert torch.equal(head, theirs.head.fc.weight[rows_22k_to_1k()])
    printed = run(path, tmp_path / "7.safetensors", overrides={"model": {"num_classes": 7}})
    assert "re-initialised for 7 classes (the file's is for 21841 of width 32)" in printed
    head = load_file(tmp_path / "7.safetensors")["head.weight"]
    assert head.shape == (7, 32)
    assert 0.01 < head.std() < 0.03


def test_v1_tables_are_resized_as_the_official_loader_does(timm_v1, tmp_path):
    theirs, path = timm_v1
    larger = {"model": {"img_size": 96, "window_size": 12}}
    printed = run(path, tmp_path / "w12.safetensors", overrides=larger)
    assert "attn.relative_position_bias_table 169×2 → 529×2" in printed
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    table = theirs.state_dict()[name]
    image = table.t().view(1, 2, 13, 13)
    expected = torch.nn.functional.interpolate(image, (23, 23), mode="bicubic")
    found = load_file(tmp_path / "w12.safetensors")[name]
    torch.testing.assert_close(found, expected.view(2, 529).t())


@torch.no_grad()
def test_position_embedding_of_another_image(tmp_path):
    golden = Golden("swinv2_w4")
    write(tmp_path / "in.safetensors", golden.weights)
    model = build_model("swinv2", pretrained=str(tmp_path / "in.safetensors"), img_size=[96, 64],
                        **{k: v for k, v in golden.config["arguments"].items()
                           if k not in ("img_size", "pretrained_window_sizes")})  # fmt: skip
    image = golden.weights["absolute_pos_embed"].view(1, 16, 16, 24).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(image, (24, 16), mode="bicubic")
    torch.testing.assert_close(model.absolute_pos_embed, expected.flatten(2).transpose(1, 2))


def test_v2_keeps_the_coordinates_of_the_pretrained_window(tmp_path):
    small = SwinTransformer(ModelConfig(img_size=32, window_size=4, num_classes=5, **OURS))
    overrides = {"model": {"img_size": 64, "window_size": 8}}
    path = tmp_path / "w4.safetensors"
    write(path, small.state_dict(), read_config(small))
    printed = run(path, tmp_path / "w8.safetensors", overrides=overrides)
    assert "position coordinates are computed for windows trained at [4, 4]" in printed
    source = read_pretrained(tmp_path / "w8.safetensors")
    assert source.config.model.pretrained_window_sizes == [4, 4]
    direct = build_model("swinv2", pretrained=str(path), num_classes=5, **OURS,
                         **overrides["model"])  # fmt: skip
    attention = direct.layers[0].blocks[0].attn
    assert (attention.window_size, attention.pretrained_window_size) == (8, 4)
    # Offsets within the small window keep their bias.
    known = attention.cpb_mlp(attention.coords).view(15, 15, -1)[4:11, 4:11].flatten(0, 1)
    theirs = small.layers[0].blocks[0].attn
    torch.testing.assert_close(known, theirs.cpb_mlp(theirs.coords))


def read_config(model):
    from swin_moe.config import Architecture

    return Architecture(model=model.config, moe=model.moe)


@pytest.mark.parametrize("family", ["swinv2", "swin_moe", "swin"])
@pytest.mark.parametrize("pixels", [32, 48, 96])
@torch.no_grad()
def test_another_image_is_the_same_by_call_and_by_load(tmp_path, family, pixels):
    torch.manual_seed(0)
    config = ModelConfig(family=family, img_size=64, window_size=16, num_classes=5, **OURS)
    model = SwinTransformer(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    path = tmp_path / "x.safetensors"
    write(path, model.state_dict(), read_config(model))
    name = "swin_moe_small_dense_window12_192_22k" if family == "swin_moe" else family
    built = build_model(name, pretrained=str(path), img_size=pixels, window_size=16,
                        num_classes=5, mlp_fc2_bias=True, **OURS).eval()  # fmt: skip
    images = torch.randn(2, 3, pixels, pixels)
    torch.testing.assert_close(built(images)[0], model(images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1), (4, 3), (2, 5)])
@torch.no_grad()
def test_other_channels(tmp_path, theirs, ours):
    model = SwinTransformer(ModelConfig(img_size=32, window_size=4, in_chans=theirs, **OURS))
    path = tmp_path / "x.safetensors"
    write(path, model.state_dict(), read_config(model))
    run(path, tmp_path / "y.safetensors", overrides={"model": {"in_chans": ours}})
    weight = load_file(tmp_path / "y.safetensors")["patch_embed.proj.weight"]
    assert weight.shape[1] == ours
    if 1 in (theirs, ours):  # a grey image in all channels gives the same
        torch.testing.assert_close(weight.sum(1), model.patch_embed.proj.weight.sum(1))


def test_a_file_of_unknown_window_claims_none(timm_v2, tmp_path):
    _, path = timm_v2
    for dialect in ("official", "mmseg", "huggingface", "torchvision"):
        with pytest.raises(WeightsError, match="does not state its window"):
            run(path, tmp_path / "out.pth", dialect=dialect)
    stated = {"model": {"window_size": 8, "img_size": 64}}
    run(path, tmp_path / "out.pth", dialect="official", overrides=stated)
    assert read_pretrained(tmp_path / "out.pth").config.model.window_size == 8


def test_windows_that_differ_by_stage_are_refused(tmp_path):
    theirs = random_timm(1, img_size=56, window_size=7)
    state = theirs.state_dict()
    for block in (0, 1):
        state[f"layers.1.blocks.{block}.attn.relative_position_bias_table"] = torch.ones(27**2, 4)
    write(tmp_path / "s3.safetensors", state)
    with pytest.raises(WeightsError, match=r"windows \[7, 14\]: no single window_size"):
        run(tmp_path / "s3.safetensors", tmp_path / "x.safetensors")


@pytest.mark.parametrize(("dim", "ratio"), [(12, 1.3), (14, 61 / 14), (352, 4.0), (10, 0.55)])
def test_the_feed_forward_ratio_is_read_off_all_stages(tmp_path, dim, ratio):
    shape = {**OURS, "embed_dim": dim, "mlp_ratio": ratio, "num_heads": [2, 2]}
    model = SwinTransformer(ModelConfig(family="swin", img_size=56, window_size=7, **shape))
    write(tmp_path / "x.safetensors", model.state_dict())
    found = read_pretrained(tmp_path / "x.safetensors").config.model
    SwinTransformer(found).load_state_dict(model.state_dict())


# --------------------------------------------------------------------------------------------
# Dense to mixture of experts


@pytest.mark.parametrize("family", ["swinv2", "swin", "swin_mlp"])
@pytest.mark.parametrize(("top_k", "gate"), [(1, "zero"), (1, "random"), (2, "random")])
@torch.no_grad()
def test_upcycling_leaves_the_function_unchanged(tmp_path, family, top_k, gate):
    torch.manual_seed(0)
    config = ModelConfig(family=family, img_size=32, window_size=4, num_classes=5, **OURS)
    dense = SwinTransformer(config).eval()
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    write(tmp_path / "dense.safetensors", dense.state_dict(), read_config(dense))
    run(tmp_path / "dense.safetensors", tmp_path / "moe.safetensors",
        upcycling=Upcycle(experts=4, top_k=top_k, gate=gate))  # fmt: skip
    source = read_pretrained(tmp_path / "moe.safetensors")
    assert source.config.moe.blocks == [[1], [1]]
    model = SwinTransformer(source.config.model, source.config.moe).eval()
    model.load_state_dict(source.state)
    images = torch.randn(3, 3, 32, 32)
    output = model(images)
    assert output.routing.dropped.sum() == 0
    torch.testing.assert_close(output.predictions, dense(images).predictions, rtol=1e-4, atol=1e-4)


def test_upcycling_noise_and_mistakes():
    model = ModelConfig(img_size=32, window_size=4, num_classes=5, **OURS)
    moe = MoEConfig(blocks=default_moe_blocks(model.depths), num_experts=4)
    state = SwinTransformer(model).state_dict()
    made = upcycle(state, model, moe, noise=0.1)
    experts = made["layers.1.blocks.1.mlp.experts.fc1.weight"]
    dense = state["layers.1.blocks.1.mlp.fc1.weight"]
    assert (experts - dense).std() == pytest.approx(0.1 * dense.std().item(), rel=0.1)
    assert not torch.equal(experts[0], experts[1])
    assert default_moe_blocks([2, 2, 18, 2]) == [[], [], list(range(1, 18, 2)), [1]]
    with pytest.raises(WeightsError, match="no dense feed-forward"):
        upcycle(made, model, moe)
    with pytest.raises(ValueError, match="--upcycle expert=8: expected experts=8"):
        Upcycle.parse(["expert=8"])
    with pytest.raises(ValueError, match="needs experts=NUMBER"):
        Upcycle.parse(["top_k=1"])


# --------------------------------------------------------------------------------------------
# What does not fit


def test_left_over_and_missing_tensors(timm_v1, tmp_path):
    _, path = timm_v1
    state = torch.load(path, weights_only=True)["state_dict"]
    state["layers.0.blocks.0.attn.extra.weight"] = torch.ones(3)
    del state["norm.weight"]
    write(tmp_path / "odd.safetensors", state)
    message = r"1 tensors of the model are not in the file.*1 tensors of the file are not"
    with pytest.raises(WeightsError, match=message):
        run(tmp_path / "odd.safetensors", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    printed = run(tmp_path / "odd.safetensors", tmp_path / "out.safetensors", allow_missing=True)
    assert "attn.extra.weight" in printed
    assert torch.equal(load_file(tmp_path / "out.safetensors")["norm.weight"], torch.ones(32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_dialect": "torchvision"}, "use --from timm or auto"),
        ({"model_name": "swin_tiny_patch4_window7_224"}, "cannot be mapped"),
        ({"model_name": "swin_tinny_patch4_window7_224"}, "did you mean swin_tiny_patch4"),
        ({"overrides": {"moe": {"blocks": [[1], [1]]}}}, "swin-moe convert --upcycle"),
        ({"overrides": {"model": {"windw_size": 3}}}, "unknown key 'model.windw_size'"),
        ({"overrides": {"window_size": 3}}, "only keys of model and moe count here"),
        ({"overrides": {"model": 3}}, "only keys of model and moe count here"),
    ],
)
def test_mistakes_are_one_line(timm_v1, tmp_path, options, message):
    _, path = timm_v1
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(path, tmp_path / "out.safetensors", **options)
    assert "\n" not in str(error.value)


def test_swin_mlp_belongs_to_its_window(tmp_path):
    write(tmp_path / "mlp.safetensors", Golden("swin_mlp").weights)
    with pytest.raises(WeightsError, match="belong to one window size"):
        run(tmp_path / "mlp.safetensors", tmp_path / "x.safetensors",
            overrides={"model": {"window_size": 4}})  # fmt: skip


def test_rank_files_are_not_overwritten_either(tmp_path):
    write(tmp_path / "in.safetensors", Golden("swin_moe_official").weights)
    run(tmp_path / "in.safetensors", tmp_path / "c.pth", dialect="official", ranks=4)
    with pytest.raises(ValueError, match="exists: choose another name"):
        run(tmp_path / "c.pth", tmp_path / "c.pth", dialect="official")
    run(tmp_path / "c.pth", tmp_path / "c.pth", dialect="official", ranks=2, overwrite=True)
    assert len(list(tmp_path.glob("c.pth.rank*"))) == 2
    assert read_pretrained(tmp_path / "c.pth").config.moe.num_experts == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"layers.0.blocks.999.norm1.weight": torch.ones(16)}), "without gaps"),
        (lambda s: s.pop("head.fc.bias"), "other half of the head"),
        (lambda s: [s.pop(n) for n in list(s) if ".mlp." in n], "has a feed-forward"),
        (
            lambda s: s.update({"layers.0.blocks.0.mlp.fc1.weight": torch.tensor(1.0)}),
            "shapes are not",
        ),
        (lambda s: s.update({"patch_embed.proj.weight": torch.ones(4)}), "shapes are not"),
        (lambda s: s.update({"a\nb": torch.ones(4)}), "no name of a tensor"),
        (lambda s: s.update({"a[/b]c": torch.ones(4)}), "are not in the model"),
    ],
)
def test_odd_files_are_reported_in_one_line(timm_v1, tmp_path, change, message):
    theirs, _ = timm_v1
    state = dict(theirs.state_dict())
    change(state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        run(tmp_path / "odd.pth", tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)


def test_nothing_is_overwritten_by_default(timm_v1, tmp_path):
    _, path = timm_v1
    run(path, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="exists: choose another name, or add --overwrite"):
        run(path, tmp_path / "x.safetensors")
    run(path, tmp_path / "x.safetensors", overwrite=True)


def test_experts_must_agree(tmp_path):
    write(tmp_path / "moe.safetensors", Golden("swin_moe_official").weights)
    arguments = Golden("swin_moe_official").config["arguments"]
    shape = {key: arguments[key] for key in ("img_size", "embed_dim", "depths", "num_heads",
             "window_size", "num_classes", "mlp_ratio")}  # fmt: skip
    for experts, message in ((8, "has 4 experts, moe.num_experts is 8"), (4, None)):
        moe = {"blocks": [[], [], [1], [1]], "num_experts": experts}
        options = {"pretrained": str(tmp_path / "moe.safetensors"), "moe": moe, **shape}
        if message is None:
            assert build_model("swin_moe", **options).moe.num_experts == 4
            continue
        with pytest.raises(WeightsError, match=message):
            build_model("swin_moe", **options)


# --------------------------------------------------------------------------------------------
# Train dense, upcycle the run, train on as a mixture, resume


def test_a_dense_run_becomes_a_mixture(tmp_path):
    done = train(tmp_path / "dense", "moe.blocks=[]", "train.max_steps=2", "precision.dtype=fp32")
    assert done.returncode == 0, done.stderr
    output = tmp_path / "moe.safetensors"
    printed = run(tmp_path / "dense", output, overrides={"moe": {"blocks": [[], [1]]}},
               upcycling=Upcycle(experts=4))  # fmt: skip
    assert "moe.num_experts=4 moe.top_k=1 moe.normalize_gate=true" in printed
    assert "moe.gate_after_norm=true" in printed
    start = [f"model.pretrained={output}", "moe.normalize_gate=true"]
    done = train(tmp_path / "moe", *start, "train.max_steps=2", processes=2)
    assert done.returncode == 0, done.stderr
    assert "started from" in done.stdout
    done = train(tmp_path / "moe", *start, "train.max_steps=3", processes=2)
    assert "resumed from" in done.stdout
    assert "started from" not in done.stdout


@pytest.mark.parametrize("command", ["evaluate", "inspect"])
def test_a_file_of_weights_is_no_run(timm_v1, tmp_path, capsys, command):
    _, path = timm_v1
    (tmp_path / "config.json").write_text("{}")  # Hugging Face's folder
    for weights, what in ((path, "is a file"), (tmp_path, "is a folder of weights alone")):
        assert main([command, str(weights)]) == 2
        printed = capsys.readouterr().err
        assert f"{weights} {what}" in printed
        assert f"`swin-moe train CONFIG model.pretrained={weights} train.output=FOLDER" in printed
        assert len(printed.splitlines()) == 1


def test_one_of_two_networks_is_chosen_by_command(timm_v1, tmp_path, capsys):
    theirs, path = timm_v1
    average = {f"module.{name}": tensor + 1 for name, tensor in theirs.state_dict().items()}
    torch.save({"state_dict": theirs.state_dict(), "state_dict_ema": average}, path)
    words = ["convert", str(path), str(tmp_path / "x.pth"), "--to=timm", "--overwrite"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "'state_dict' is taken, not 'state_dict_ema.module'" in printed
    assert torch.equal(read(tmp_path / "x.pth").state["norm.bias"], theirs.norm.bias)
    assert main([*words, "--take", "state_dict_ema"]) == 0
    assert torch.equal(read(tmp_path / "x.pth").state["norm.bias"], theirs.norm.bias + 1)


def test_the_command(tmp_path, timm_v1):
    _, path = timm_v1
    done = swin_moe("convert", str(path), str(tmp_path / "x.safetensors"), "--to", "timm",
                    "model.num_classes=7", "--upcycle", "experts=2")  # fmt: skip
    assert done.returncode == 2
    assert "timm has no mixtures of experts" in one_error(done)
    done = swin_moe("convert", str(path), str(tmp_path / "x.safetensors"), "--to", "timm")
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
