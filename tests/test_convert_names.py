"""Class names and the preparation of images travel with weights into every format."""

import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file

from swin_moe.config import dump_config, load_config
from swin_moe.data.transforms import EvalTransform
from swin_moe.models import SwinTransformer
from swin_moe.weights.adapters import Images
from swin_moe.weights.convert import convert
from swin_moe.weights.described import Described
from swin_moe.weights.files import WeightsError, write
from swin_moe.weights.pretrained import load_pretrained, read_pretrained
from tests.golden import Golden
from tests.parallel import MICRO
from tests.saving import save, states_of

NAMES = ["cat", "großer dog", "鳥"]
IMAGES = Images([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], 0.875)
SMALL = ["model.name=swinv2", "model.in_chans=3", "model.img_size=64", "model.window_size=8",
         "model.depths=[1, 1]", "model.num_heads=[1, 2]", "model.embed_dim=16", "moe.blocks=[]",
         "model.num_classes=3", "augment.eval_crop=0.875", "data.mean=[0.1, 0.2, 0.3]",
         "data.std=[0.5, 0.6, 0.7]"]  # fmt: skip


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = load_config(MICRO, SMALL)
    built = SwinTransformer(config.model).eval()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return built


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    text = dump_config(load_config(MICRO, SMALL))
    save(folder / "checkpoints", 1, states_of(model), config_text=text, class_names=NAMES)
    return folder


def converted(source, output, **options):
    console = Console(width=500, record=True, file=io.StringIO())
    convert(source, output, console, **options)
    return console.export_text()


@pytest.mark.parametrize(
    ("dialect", "name"),
    [("swin_moe", "x.safetensors"), ("swin_moe", "x.pth"), ("official", "x.pth"),
     ("official", "x.safetensors"), ("timm", "x.pth"), ("timm", "folder"),
     ("huggingface", "folder"), ("huggingface", "x.safetensors"), ("mmseg", "x.pth")],
)  # fmt: skip
def test_names_travel(run, model, tmp_path, dialect, name):
    converted(run, tmp_path / name, dialect=dialect)
    found = read_pretrained(tmp_path / name)
    back = "official" if found.window_known else "timm"
    assert (found.class_names, found.images) == (NAMES, IMAGES)
    assert found.notes == []
    for key, tensor in model.state_dict().items():
        assert torch.equal(found.state[key], tensor)
    converted(tmp_path / name, tmp_path / "back.safetensors", dialect=back)
    assert read_pretrained(tmp_path / "back.safetensors").class_names == NAMES


def test_names_travel_with_the_files_of_ranks(tmp_path):
    golden = Golden("swin_moe_official")
    names = [f"class {number}" for number in range(golden.config["arguments"]["num_classes"])]
    write(tmp_path / "in.safetensors", golden.weights, about=Described(classes=names))
    converted(tmp_path / "in.safetensors", tmp_path / "x.pth", dialect="official", ranks=2)
    assert read_pretrained(tmp_path / "x.pth").class_names == names


def test_our_own_files_know_their_model(run, tmp_path):
    converted(run, tmp_path / "x.pth")
    assert read_pretrained(tmp_path / "x.pth").own
    converted(run, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as handle:
        assert json.loads(handle.metadata()["classes"]) == NAMES


@torch.no_grad()
def test_timm_opens_the_folder(run, model, tmp_path):
    converted(run, tmp_path / "folder", dialect="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs(images), model(images).predictions, rtol=1e-4, atol=1e-5)
    assert theirs.pretrained_cfg["label_names"] == NAMES
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
    torch.testing.assert_close(prepare(photo()), prepared(), rtol=0, atol=1e-6)


def photo():
    pixels = np.random.default_rng(0).integers(0, 255, (20, 26, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize((208, 160))


def prepared():
    """Return the photo as our evaluation prepares it."""
    file = io.BytesIO()
    photo().save(file, "png")
    pixels = EvalTransform(IMAGES.crop, (64, 64), "RGB")(file.getvalue())
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGES[:2])
    return (image - mean) / std


@torch.no_grad()
def test_transformers_opens_the_folder(run, model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    converted(run, tmp_path / "folder", dialect="huggingface")
    opened = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "folder")
    assert opened.config.id2label == dict(enumerate(NAMES))
    assert opened.config.label2id["鳥"] == 2
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "folder")
    found = processor(photo(), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found[0], prepared(), rtol=0, atol=0.02)  # two levels of pixels
    torch.testing.assert_close(
        opened.eval()(found).logits, model(found).predictions, rtol=1e-4, atol=1e-4
    )


def test_names_that_cannot_be_kept_are_reported(run, tmp_path):
    text = converted(run, tmp_path / "x.bin", dialect="huggingface")
    assert "class names are not in" in text
    assert "an OUT without a suffix becomes a folder that huggingface opens" in text
    text = converted(run, tmp_path / "5.safetensors", overrides={"model": {"num_classes": 5}})
    assert "the class names are not kept: the head is another one" in text
    assert read_pretrained(tmp_path / "5.safetensors").class_names is None
    text = converted(run, tmp_path / "r", dialect="huggingface",
                overrides={"model": {"img_size": [64, 128]}})  # fmt: skip
    assert "no preprocessor_config.json" in text
    assert not (tmp_path / "r/preprocessor_config.json").exists()
    with pytest.raises(WeightsError, match=r"hf.onnx: the name must end in .*; \.onnx is not"):
        converted(run, tmp_path / "hf.onnx", dialect="huggingface")


def test_nothing_is_invented(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "bare.pth")
    stated = {"model": {"window_size": 8, "img_size": 64}}
    text = converted(
        tmp_path / "bare.pth", tmp_path / "hf", dialect="huggingface", overrides=stated
    )
    assert "does not state how its images were prepared: ImageNet's mean and std" in text
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert "id2label" not in config
    assert config["num_labels"] == 3
    assert read_pretrained(tmp_path / "hf").class_names is None


@pytest.mark.parametrize(
    ("content", "names", "note"),
    [
        ({"id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}}, None, ""),
        ({"id2label": {"2": "c", "0": "a", "1": "b"}}, ["a", "b", "c"], ""),
        ({"id2label": {"0": "a", "2": "c"}}, None, "not a list of names by label"),
        ({"id2label": {"0": "a", "1": 3, "2": "c"}}, None, "not a list of names by label"),
        ({"id2label": {"0": "a"}}, None, "are not used: 1 names, and a head for 3 classes"),
        ({"label_names": ["a", "b", "c"]}, ["a", "b", "c"], ""),
        ({"pretrained_cfg": {"label_names": ["a", "b", "c"]}}, ["a", "b", "c"], ""),
        ({"architecture": "x", "labels": ["a", "b", "c"]}, ["a", "b", "c"], ""),
        ({"label_names": {"a": 1}}, None, "not a list of names by label"),
        ([], None, "config.json is not used: it is not a JSON object"),
        ("{", None, "config.json is not used: "),
    ],
)
def test_names_in_other_programs_configs(model, tmp_path, content, names, note):
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "config.json").write_text(text)
    found = read_pretrained(tmp_path)
    assert found.class_names == names
    assert len(found.notes) == bool(note)
    assert note in "".join(found.notes)


def test_converted_files_keep_their_precision(model, tmp_path):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        torch.save(state, tmp_path / "x.pth")
        for dialect in ("swin_moe", "timm", "huggingface"):
            converted(
                tmp_path / "x.pth", tmp_path / "y.safetensors", dialect=dialect, overwrite=True,
                overrides={"model": {"window_size": 8, "img_size": 64}},
            )  # fmt: skip
            found = read_pretrained(tmp_path / "y.safetensors").state
            assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
            assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_timm_states_its_window_by_its_architecture_or_the_variants_is_assumed(tmp_path, caplog):
    torch.manual_seed(0)
    name = "swinv2_tiny_window8_256"
    path = tmp_path / "model.safetensors"
    with torch.device("meta"):
        shapes = timm.create_model(name).state_dict()
    state = {key: torch.zeros(tensor.shape) for key, tensor in shapes.items()}
    save_file(state, path)
    wide = {"model": {"window_size": 16, "img_size": 512}}
    converted(path, tmp_path / "wide.safetensors", model_name=name, overrides=wide)
    assert f"{path} does not state its window: 8 is assumed, {name}'s" in caplog.text
    sizes = read_pretrained(tmp_path / "wide.safetensors").config.model.pretrained_window_sizes
    assert sizes == [8, 8, 8, 8]
    caplog.clear()
    (tmp_path / "config.json").write_text(json.dumps({"architecture": f"{name}.ms_in1k"}))
    found = read_pretrained(path)
    assert found.window_known
    assert (found.config.model.window_size, found.config.model.img_size) == (8, 256)
    assert not caplog.text


def test_misfits_name_file_and_model(run):
    source = read_pretrained(run)
    other = SwinTransformer(load_config(MICRO, [*SMALL, "model.embed_dim=32"]).model)
    with pytest.raises(WeightsError) as error:
        load_pretrained(other, source)
    line = str(error.value)
    assert line.startswith(f"{run} does not fit swinv2: patch_embed.proj.weight has shape")
    assert line.endswith("cannot be mapped; the file's model has embed_dim=16")
