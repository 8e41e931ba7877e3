"""Nothing in foreign files is executed, and nothing is written outside the run directory.

Checkpoints: ``test_checkpoint.py``; files of weights: ``models/test_weights.py`` and
``test_deepspeed_import.py``.
"""

import io
import os
import pickle
import subprocess
import tarfile

import pytest
from PIL import Image

from swin_moe.config import ConfigError, load_config
from swin_moe.reporting.metric_log import read_metrics
from tests.parallel import MICRO, ROOT, one_error, swin_moe, train

ATTACK = "touch attacked"


class Malice:
    def __reduce__(self):
        return os.system, (ATTACK,)


@pytest.mark.parametrize(
    "text",
    [
        f"model: !!python/object/apply:os.system ['{ATTACK}']",
        f"model: !!python/object/new:os.system ['{ATTACK}']",
        "model: !!python/name:os.system",
        "model: !!python/module:antigravity",
        f"model: {{name: !!python/object/apply:subprocess.getoutput ['{ATTACK}']}}",
    ],
)
def test_a_config_is_data(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="python/") as error:
        load_config(tmp_path / "config.yaml")
    assert "config.yaml" in str(error.value)
    word = text.removeprefix("model: ")
    with pytest.raises(ConfigError):
        load_config(MICRO, [f"model={word}"])
    assert load_config(MICRO, [f"train.output={word}"]).train.output == word
    assert not (tmp_path / "attacked").exists()


def test_a_config_that_unfolds_without_end_is_refused(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError) as error:
        load_config(tmp_path / "config.yaml")
    assert len(str(error.value)) < 2000


def image(colour):
    file = io.BytesIO()
    Image.new("L", (28, 28), colour).save(file, "png")
    return file.getvalue()


def add(archive, name, content=b"", **attributes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in attributes.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path, label, links):
    """Write a hundred good samples, and the worst content that an archive can have."""
    secret = path.parent.parent / "secret.png"
    secret.write_bytes(image(9))
    with tarfile.open(path, "w") as archive:
        for index in range(100):
            add(archive, f"{index:03d}.png", image(index))
            add(archive, f"{index:03d}.cls", str(index % 10).encode())
        for name in ("../../attacked", "/tmp/attacked-by-a-shard", "a/../../attacked"):
            add(archive, f"{name}.png", image(1))
            add(archive, f"{name}.cls", b"1")
        for kind in ("pyd", "pickle", "pth", "npy"):  # webdataset would decode some of them
            add(archive, f"bad.{kind}", pickle.dumps(Malice()))
        add(archive, "bad.png", pickle.dumps(Malice()))
        add(archive, "bad.cls", label.encode())
        add(archive, "bad.json", b"{" * 100_000)
        if links:
            for name, kind in (("link", tarfile.SYMTYPE), ("hard", tarfile.LNKTYPE)):
                add(archive, f"{name}.png", type=kind, linkname="../../secret.png")
                add(archive, f"{name}.cls", b"1")
            add(archive, "device.png", type=tarfile.CHRTYPE)
            add(archive, "device.cls", b"1")


def everything(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("label", "links", "message"),
    [
        ("1", False, ""),
        (
            "1",
            True,
            "'link.png' is a link to '../../secret.png', and links in tars are not followed",
        ),
        (f"__import__('os').system('{ATTACK}')", False, "the label of sample 'bad' is"),
    ],
)
def test_a_shard_is_data(tmp_path, monkeypatch, label, links, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for split in ("train", "val"):
        write_shard(tmp_path / f"data/{split}-000000.tar", label, links)
    before = everything(tmp_path)
    done = train(tmp_path / "run", f"data.path={tmp_path / 'data'}", "data.batch_size=10")
    if message:
        assert done.returncode == 2
        assert message in one_error(done)
    else:
        assert done.returncode == 0, done.stderr
        assert read_metrics(tmp_path / "run")[-1]["data/unreadable"] > 0
    assert not {path for path in everything(tmp_path) - before if not path.startswith("run")}
    assert not os.path.exists("/tmp/attacked-by-a-shard.png")
    assert not (ROOT / "attacked").exists()


def test_a_name_of_a_run_cannot_be_a_command(tmp_path):
    done = swin_moe("evaluate", f"{tmp_path}/$({ATTACK})")
    assert done.returncode == 2
    assert not (ROOT / "attacked").exists()


def test_tensorboard_listens_on_this_machine_alone():
    done = subprocess.run(
        ["make", "-n", "tensorboard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "--host 127.0.0.1" in done.stdout
