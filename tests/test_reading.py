"""Users' text files are read within bounds; names are printed as one line."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from swin_moe.common.reading import openable, parse_json, read_json, read_text
from swin_moe.common.text import plain


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("cat [old] $5_", "cat [old] $5_"),
        ("猫 🐟", "猫 🐟"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("two\nlines \x1b[31m", r"two\nlines \x1b[31m"),
        (os.fsdecode(b"\xff\n"), r"\xff\n"),
    ],
)
def test_any_name_is_one_line_of_utf8(name, shown):
    assert plain(name) == shown
    plain(name).encode("utf-8")


def test_a_pipe_a_folder_and_a_device_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, kind in [
        (tmp_path / "pipe", "a pipe"),
        (tmp_path, "a folder"),
        ("/dev/zero", "a dev"),
    ]:
        with pytest.raises(ValueError, match=f"{path} is {kind}"):
            read_text(path)


def test_size_encoding_and_depth_have_bounds(tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(b"[1]" + b" " * 100)
    assert read_json(file) == [1]
    with pytest.raises(ValueError, match=r"a.json has 103 bytes; at most 50"):
        read_json(file, limit=50)
    file.write_bytes(b"\xef\xbb\xbf{}")
    assert read_json(file) == {}
    file.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"a.json is not UTF-8 text \(byte 3\)"):
        read_text(file)
    for text in ("[" * 40 + "]" * 40, "[" * 100_000, "{", "9" * 5000):
        with pytest.raises(ValueError, match=r"^here is n"):
            parse_json(text, "here")


def test_safetensors_are_read_in_a_folder_that_is_not_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    save_file({"a": torch.arange(3)}, file)
    with openable(file) as name:
        name.encode()
        handle = safe_open(name, framework="pt")
    assert handle.get_tensor("a").tolist() == [0, 1, 2]
    with openable(tmp_path / "猫") as name:
        assert name == str(tmp_path / "猫")
