"""Every reader takes the same files as samples."""

import os
import tarfile
import zipfile

import pytest

from swin_moe.data.readers.folder import class_folders, open_folder
from swin_moe.data.readers.index import cache_path, read_cache
from swin_moe.data.readers.scan import scan_shard
from swin_moe.data.readers.shards import find_shards
from swin_moe.data.readers.zipped import ZipSource
from swin_moe.data.source import open_path
from swin_moe.data.which import PassedOver, among_companions, is_image
from tests.data.helpers import add_member, encode, make_folder, make_shards, open_loader


def keys(source):
    return [source.key(index) for index in range(len(source))]


def write(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["a.JPEG", "x/a.jfif", "a.b.gif", "A.Webp", "a.avif"])
def test_suffixes_of_images(name):
    assert is_image(name)


@pytest.mark.parametrize(
    "path",
    ["a/._1.png", "__MACOSX/a/1.png", "a/@eaDir/1.png", ".git/x", "a/.ipynb_checkpoints/1.png",
     "$RECYCLE.BIN/a/1.png", "a/Thumbs.db", "lost+found/1.png"],
)  # fmt: skip
def test_companions_at_any_depth(path):
    assert among_companions(path)
    assert not among_companions("./a/1.png")


def untidy(root):
    """Write class folders with many files that are not samples, and one empty class."""
    make_folder(root, ["ant", "bee"], per_class=2)
    (root / "cow").mkdir()
    for name in ("ant/._0.png", "ant/.DS_Store", "@eaDir/ant/0.png", "ant/@eaDir/0.png",
                 "bee/Thumbs.db", ".git/index.png", "__MACOSX/ant/0.png"):  # fmt: skip
        write(root / name, encode(99))
    for name in ("ant/x.gif", "bee/y.jfif", "bee/sub/z.PNG"):
        write(root / name, encode(7))
    for name in ("ant/notes.txt", "bee/labels.csv", "bee/more.txt", "bee/nosuffix"):
        write(root / name, b"text")


def test_folder_and_zip_have_the_same_samples_classes_and_rest(tmp_path):
    root = tmp_path / "train"
    untidy(root)
    folder = open_folder(root)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    packed = ZipSource(tmp_path / "x.zip", None)
    assert folder.class_names == packed.class_names == ["ant", "bee", "cow"]
    expected = {
        "ant/0.png": 0, "ant/1.png": 0, "ant/x.gif": 0,
        "bee/0.png": 1, "bee/1.png": 1, "bee/y.jfif": 1, "bee/sub/z.PNG": 1,
    }  # fmt: skip
    for source, start in ((folder, f"{root}/"), (packed, f"{tmp_path}/x.zip:")):
        found = {
            key.removeprefix(start): int(source.labels[i]) for i, key in enumerate(keys(source))
        }
        assert found == expected
        assert source.class_counts.tolist() == [3, 4, 0]
        assert source.passed_over == "4 files passed over: 2 .txt, 1 .csv, 1 without a suffix"


def test_files_passed_over_are_reported_once_a_start(tmp_path, caplog):
    untidy(tmp_path / "train")
    open_loader(tmp_path, num_classes=3)
    assert (
        "4 files passed over: 2 .txt, 1 .csv, 1 without a suffix (data.train=train)" in caplog.text
    )
    line = PassedOver()
    for index in range(9):
        line.add(f"a.x{index % 6}")
    assert line.line() == ("9 files passed over: 2 .x0, 2 .x1, 2 .x2, 1 .x3, 2 of other kinds")


def test_links(tmp_path):
    store = make_folder(tmp_path / "store", ["a", "b"])
    root = tmp_path / "train"
    root.mkdir()
    for name in ("a", "b"):
        (root / name).symlink_to(store / name)
    (root / "a" / "loop").symlink_to(".")
    (root / "b" / "up").symlink_to("..")
    (root / "b" / "top").symlink_to(root)
    (root / "all").symlink_to(root)
    (root / "b" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(root / "a" / "pipe.png")
    source = open_folder(root)
    assert source.class_names == ["a", "b"]
    assert len(source) == 4
    assert source.passed_over == (
        "5 files passed over: 3 links to a folder above, 1 pipes or devices, 1 links to nothing"
    )
    (root / "c").symlink_to("not mounted")
    with pytest.raises(ValueError, match=r"/c is a link to not mounted, which does not exist"):
        class_folders(root)


def test_keys_with_dots_are_samples_and_fields_are_not(tmp_path):
    path = tmp_path / "x-0.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.jpg", "a.mask.png", "a.cls", "v1.0_b.jpg", "v1.0_b.cls", "._a.jpg"):
            add_member(tar, name, b"1" if name.endswith("cls") else encode(1))
    scan = scan_shard(path, 0)
    assert scan.table["label"].tolist() == [1, 1]
    assert scan.passed_over == 1
    source = open_path(tmp_path / "x")
    assert keys(source) == [f"{path}:a", f"{path}:v1.0_b"]
    assert source.passed_over.startswith("1 images passed over: no .cls")


def test_shards_without_labels_are_not_a_tar_per_class(tmp_path):
    for shard in range(2):
        write(tmp_path / "train" / "x")
        with tarfile.open(tmp_path / "train" / f"{shard:05d}.tar", "w") as tar:
            for end in ("jpg", "json", "txt"):
                add_member(tar, f"000.{end}", encode(1))
    with pytest.raises(
        ValueError, match=r"images have \.json and \.txt next to them, but no label"
    ):
        open_path(tmp_path / "train")


@pytest.mark.parametrize("name", ["[v1] flowers", "x{old}", "what?", "a*b", "$HOME"])
def test_an_existing_path_is_no_pattern(tmp_path, name):
    root = make_shards(tmp_path / name, 6, shards=2)
    assert [path.name for path in find_shards(str(root / "train"))] == [
        "train-0.tar",
        "train-1.tar",
    ]
    assert len(find_shards(str(root / "train-{0..1}.tar"))) == 2
    assert len(find_shards(str(root / "tr*.tar"))) == 2
    assert open_loader(root).num_samples == 6


def test_a_pipe_named_like_an_image_is_not_read(tmp_path):
    make_folder(tmp_path / "train", ["a", "b"], per_class=4)
    loader = open_loader(tmp_path)
    victim = tmp_path / "train/a/0.png"
    victim.unlink()
    os.mkfifo(victim)
    list(loader.epoch(0))
    assert dict(loader.bad.kinds) == {"cannot be read": 1}


def test_a_zip_entry_that_claims_gigabytes_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", encode(1))
    source = ZipSource(tmp_path / "x.zip", None)
    source.table["size"] = 3_500_000_000
    with pytest.raises(ValueError, match=r"3,500,000,000 bytes; at most"):
        source.read(0)


def test_a_user_without_a_home_has_no_cache_there(tmp_path, monkeypatch):
    path = make_shards(tmp_path / "x", 2, shards=1) / "train-0.tar"
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    assert read_cache([path], "tar shards") is None
    assert cache_path([path], "tar shards", ".swin_moe_index").parent == path.parent / (
        ".swin_moe_index"
    )


def test_a_batch_without_a_readable_image_takes_another(tmp_path):
    folder = make_folder(tmp_path / "train", ["a", "b"], per_class=4)
    (folder / "a" / "0.png").write_bytes(b"broken")
    runs = [
        [b.indices.tolist() for b in open_loader(tmp_path, batch_size=1).epoch(0)] for _ in range(2)
    ]
    assert runs[0] == runs[1]
    taken = [index for (index,) in runs[0]]
    assert set(taken) == {1, 2, 3, 4, 5, 6, 7}
    assert len(taken) == 8
