"""Damaged and foreign files as weights: one line names each one's format before it is read."""

import errno
import gzip
import io
import json
import os
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from swin_moe.models import SwinTransformer
from swin_moe.weights import file_kind, files
from swin_moe.weights.adapters import from_swin_moe
from swin_moe.weights.adapters.huggingface import huggingface_config
from swin_moe.weights.files import WeightsError, read
from swin_moe.weights.pretrained import load_pretrained, read_pretrained
from swin_moe.weights.safe_pickle import load_pickled
from tests.models.test_dialects import config

torch.manual_seed(0)
STATE = SwinTransformer(config("swin", depths=[1], num_heads=[2])).state_dict()


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(members, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def edited(change, compression=zipfile.ZIP_STORED):
    """Write a ``.pth`` of the weights whose records are changed by ``change(name, data)``."""
    with zipfile.ZipFile(io.BytesIO(saved(STATE))) as archive:
        members = {name: change(name, archive.read(name)) for name in archive.namelist()}
    return zipped(members, compression)


def array(what):
    file = io.BytesIO()
    what(file)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.pth"))
    return file.getvalue()


def claiming(size):
    """Write a zip whose list of entries claims this many bytes for one entry."""
    data = bytearray(saved(STATE))
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = size.to_bytes(4, "little") * 2
    return bytes(data)


WHOLE = saved(STATE)
TENSORS = save(STATE)
FILES = {
    "empty.pth": (b"", "is empty"),
    "empty.safetensors": (b"", "is empty"),
    "page.pth": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "page.safetensors": (b"\n <html lang='en'>", "is a web page"),
    "commented.bin": (b"<!-- sign in --><html>", "is a web page"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    "annex.pth": (b"/annex/objects/SHA256E-s1--00.pth\n", "git-annex pointer"),
    "denied.xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "is XML text"),
    "error.json": (b'{"error": "Repository not found"}', "is JSON text that begins"),
    "entry.pth": (b"Entry not found", "is text that begins 'Entry not found'"),
    "x.yaml": ("größe: 3\n".encode(), "is text that begins 'größe: 3'"),
    "x.pth.gz": (gzip.compress(WHOLE), "gzip archive"),
    "x.tar": (tarred(), "is a tar archive"),
    "x.h5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "x.keras": (zipped({"config.json": "{}", "model.weights.h5": ""}), "Keras model"),
    "x.npz": (array(lambda file: np.savez(file, a=np.ones(2))), "NumPy archive"),
    "x.npy": (array(lambda file: np.save(file, np.ones(2))), "NumPy array"),
    "x.msgpack": (b"\x81\xa6params\x81\xa4head\x90", "MessagePack"),
    "x.onnx": (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", "ONNX"),
    "saved_model.pb": (b"\x08\x01\x12\xff\x01\x0a\x02hi", "TensorFlow SavedModel"),
    "x.tflite": (b"\x1c\0\0\0TFL3" + bytes(40), "TensorFlow Lite"),
    "x.gguf": (b"GGUF\3\0\0\0", "GGUF"),
    "x.png": (b"\x89PNG\r\n\x1a\n", "PNG image"),
    "x.pkl": (pickle.dumps({"model": {"a": 1}}, 4), "plain Python pickle"),
    "zeros.pth": (bytes(10_000), "all zeros"),
    "noise.pth": (bytes(range(200, 256)), "neither PyTorch's nor safetensors"),
    "outer.zip": (zipped({"weights/model.pth": WHOLE}), "unpack it and name that file"),
    "x.docx": (zipped({"word/document.xml": ""}), "a zip archive of something else"),
    "none.zip": (zipped({}), "empty zip"),
    "jit.pt": (zipped({"x/data.pkl": b"", "x/constants.pkl": b""}),
               "TorchScript"),
    "cut.pth": (WHOLE[: len(WHOLE) // 2], "truncated or not a PyTorch file"),
    "cut.safetensors": (TENSORS[: len(TENSORS) // 2], "truncated or not a safetensors file"),
    "header.safetensors": (TENSORS[:100], "its header claims"),
    "absurd.safetensors": ((1 << 62).to_bytes(8, "little") + b"{}",
                           "header claims 4,611,686,018,427,387,904 bytes"),
    "long.safetensors": ((99_000_000).to_bytes(8, "little") + b"{}", "truncated or not a"),
    "cut-legacy.pth": (saved(STATE, _use_new_zipfile_serialization=False)[:2000], "truncated or"),
    "claims.pth": (claiming(3_500_000_000), "claim 3,500,"),
    "bomb.pth": (edited(lambda n, d: d + bytes(9 << 20) if n.endswith("data.pkl") else d,
                        zipfile.ZIP_DEFLATED), "or made to fill the memory"),
    "short.pth": (edited(lambda n, d: d[:4] if n.endswith("data/0") else d), "claims"),
    "numbers.pth": (saved({"epoch": 3}), "no weights found"),
    "list.pth": (saved([1, 2]), "it is a list"),
    "expanded.pth": (saved({**STATE, "patch_embed.proj.weight":
                            torch.ones(1).expand(24, 3, 4, 1 << 22)}),
                     "the file holds 4 of them; save it again with tensor.contiguous()"),
    "int8.pth": (saved({name: t.to(torch.int8) for name, t in STATE.items()}), "int8 numbers"),
    "resnet.pth": (saved({"model": {"conv1.weight": torch.ones(2)}}), "no Swin state dict"),
    "adapter.pth": (saved({**STATE, "layers.0.blocks.0.lora.weight": torch.ones(2)}), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_one_line_names_the_format_of_a_file(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    if not message:
        assert read_pretrained(path).translation.unknown == ["layers.0.blocks.0.lora.weight"]
        return
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_pretrained(path)
    text = str(error.value)
    assert str(path) in text
    assert len(text.splitlines()) == 1
    assert "weights_only=False" not in text


def test_tensors_that_were_expanded_are_read(tmp_path):
    name = "layers.0.blocks.0.norm1.bias"
    (tmp_path / "x.pth").write_bytes(saved({**STATE, name: torch.ones(1).expand(len(STATE[name]))}))
    assert torch.equal(
        read_pretrained(tmp_path / "x.pth").state[name], torch.ones(len(STATE[name]))
    )


def test_weights_that_are_not_finite_are_reported(tmp_path):
    model = SwinTransformer(config("swin"))
    name, state = "layers.0.blocks.0.norm1.bias", model.state_dict()
    for number in (0.0, float("nan"), float("-inf")):
        state[name][1] = number
        (tmp_path / "x.pth").write_bytes(saved(state))
        note = load_pretrained(model, read_pretrained(tmp_path / "x.pth"))
        assert (f"tensors hold NaN or infinity, first '{name}'" in note) == (number != 0)


@pytest.mark.parametrize("sides", [[64, 128], [64, 64]])
def test_a_rectangles_position_embedding(tmp_path, sides):
    """It is read if ``config.json`` states the image size."""
    model = config("swin", ape=True, img_size=sides)
    state = from_swin_moe(SwinTransformer(model).state_dict(), "huggingface", model)
    save_file(state, tmp_path / "model.safetensors")
    if sides == [64, 128]:
        with pytest.raises(WeightsError, match=r"512 positions, images of 88 x 88 .* have 484; "):
            read_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(huggingface_config(model)))
    assert read_pretrained(tmp_path).config.model.img_size == sides


def test_a_position_for_a_class_token_is_refused(tmp_path):
    state = dict(SwinTransformer(config("swinv2", ape=True, img_size=32)).state_dict())
    state["absolute_pos_embed"] = torch.zeros(1, 65, state["absolute_pos_embed"].shape[2])
    (tmp_path / "x.pth").write_bytes(saved(state))
    with pytest.raises(WeightsError, match=r"65 positions, .* 64: one is for a class token"):
        read_pretrained(tmp_path / "x.pth")


def test_weights_are_known_by_their_content(tmp_path):
    packed = edited(lambda name, data: data, zipfile.ZIP_DEFLATED)
    files = {"x.pth": TENSORS, "x.safetensors": WHOLE, "x.weights": WHOLE, "packed.pth": packed}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        state = read_pretrained(tmp_path / name).state
        assert all(torch.equal(state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_only_regular_files_are_read(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(WeightsError, match=f"{name} is a pipe, not a file"):
        read_pretrained(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(WeightsError, match=f"{name} is a device, not a file"):
        read_pretrained(path)
    path.unlink()
    path.symlink_to("gone")
    with pytest.raises(WeightsError, match="no such file"):
        read_pretrained(path)


def test_a_large_file_is_looked_at_in_place(tmp_path):
    entry = {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4 << 30]}
    header = json.dumps({"optimizer.exp_avg": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + (4 << 30))  # takes no room on the disk
    assert list(read(path).state) == ["optimizer.exp_avg"]


def test_folders_of_other_programs(tmp_path):
    folder = tmp_path / "dcp"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"")
    with pytest.raises(WeightsError, match="dcp_to_torch"):
        read_pretrained(folder)
    (folder / ".metadata").rename(folder / "saved_model.pb")
    with pytest.raises(WeightsError, match="TensorFlow SavedModel"):
        read_pretrained(folder)
    (folder / "saved_model.pb").rename(folder / "best.pth")
    with pytest.raises(WeightsError, match=f"name the file: {folder}/best.pth"):
        read_pretrained(folder)
    (folder / "best.pth").rename(folder / "latest")
    (folder / "latest").write_text("../elsewhere")
    with pytest.raises(WeightsError, match=f"{folder}/latest names"):
        read_pretrained(folder)


def test_weights_in_a_folder_whose_name_is_not_utf8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    torch.save({"a": torch.arange(3)}, folder / "w.pth")
    assert load_pickled(folder / "w.pth")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("w.pth", file_kind._Bounded.read),
        ("w.pth", torch.load),
        ("w.safetensors", files.safe_open),
    ],
)
def test_a_disk_that_fails_is_not_called_a_damaged_file(tmp_path, monkeypatch, name, reads):
    """Otherwise its user would download a good file again."""

    def fails(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / name
    (torch.save if path.suffix == ".pth" else save_file)({"a": torch.arange(3)}, path)
    owner = {"read": file_kind._Bounded, "load": torch}.get(reads.__name__, files)
    monkeypatch.setattr(owner, reads.__name__, fails)
    with pytest.raises(WeightsError) as raised:
        read(path)
    assert str(raised.value) == f"{path}: cannot be read (Input/output error)"
