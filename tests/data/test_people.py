"""Names, sizes and layouts of real data: no sample is lost, doubled or mislabelled."""

import gzip
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from swin_moe.common.text import plain
from swin_moe.config import DataConfig
from swin_moe.data.bad_samples import BadSamples, Skipped
from swin_moe.data.decode import EncodedImage, UnreadableImage
from swin_moe.data.names import read_classes, write_classes
from swin_moe.data.readers import index
from swin_moe.data.readers.file_list import open_list
from swin_moe.data.readers.folder import open_folder
from swin_moe.data.readers.scan import has_labels, scan_shard
from swin_moe.data.readers.shards import class_of, find_shards
from swin_moe.data.readers.zipped import ZipSource
from swin_moe.data.source import open_path, open_source
from swin_moe.data.tools.commands import prepare_data, verify_data
from swin_moe.data.tools.prepare import image_extension
from swin_moe.data.which import is_image
from tests.data.helpers import add_member, encode, make_folder, open_loader

LATIN = "caf\udce9"  # a name whose bytes are not UTF-8


def contents(source):
    return [source.read(i) for i in range(len(source))]


def test_folder_zip_and_tar_per_class_are_one_data_set(tmp_path):
    root = tmp_path / "folder"
    names = ["b/2.png", "b/10.png", "b/a/1.png", "b-c/1.png", "a.v1/0.png", "a.v2/1.png", "b/z.png"]
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(number))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:  # in the order of the list, not of a folder
            archive.write(root / name, name)
    (tmp_path / "tars").mkdir()
    for name in os.listdir(root):
        with tarfile.open(tmp_path / "tars" / f"{name}.tar", "w") as tar:
            for file in names:
                if file.startswith(f"{name}/"):
                    tar.add(root / file, file.removeprefix(f"{name}/"))
    sources = [open_path(path) for path in (root, tmp_path / "x.zip", tmp_path / "tars")]
    for source in sources:
        assert source.class_names == ["a.v1", "a.v2", "b", "b-c"]
        assert source.labels.tolist() == sources[0].labels.tolist() == [0, 1, 2, 2, 2, 2, 3]
        assert contents(source) == contents(sources[0])


def test_a_class_is_named_like_its_tar():
    names = ["v1.3.tar", "b.tar.gz", "c.tgz"]
    assert [class_of(Path(name)) for name in names] == ["v1.3", "b", "c"]


def test_images_next_to_the_class_folders_are_counted(tmp_path):
    root = make_folder(tmp_path / "train", ["a", "b"])
    (root / "stray.png").write_bytes(encode(1))
    (root / "classes.csv").write_text("a")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    note = "2 files passed over: 1 .csv, 1 images in no class folder"
    assert open_folder(root).passed_over == note
    assert ZipSource(tmp_path / "x.zip", None).passed_over.startswith("2 files passed over")


def test_a_folder_with_dots_gives_no_suffix():
    assert not is_image("v1.0/jpg")
    assert not is_image("png")
    assert not is_image(".png")


@pytest.mark.parametrize("place", [0, 30])
def test_the_number_in_a_json_is_named(tmp_path, place):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(place):
            add_member(tar, f"plain{number}.jpg", b"")
        add_member(tar, "7.jpg", b"")
        add_member(tar, "7.json", json.dumps({"label": 3, "url": "x"}).encode())
    with pytest.raises(ValueError, match=r'\.cls.*"label": 3, which may be that number'):
        open_path(tmp_path)


def test_a_prefix_with_brackets_is_no_pattern(tmp_path):
    for name in ("[a]-0.tar", "a-0.tar", "x{1-0.tar"):
        (tmp_path / name).touch()
    assert [path.name for path in find_shards(str(tmp_path / "[a]"))] == ["[a]-0.tar"]
    assert [path.name for path in find_shards(str(tmp_path / "x{1"))] == ["x{1-0.tar"]
    with pytest.raises(ValueError, match=r"y\{1.*not a pattern of shards|no such shard"):
        find_shards(str(tmp_path / "y{1"))


def test_an_index_of_another_rule_is_not_used(tmp_path, monkeypatch):
    path = [tmp_path / "train-0.tar"]
    now = index.cache_path(path, "tar shards", "x")
    monkeypatch.setattr(index, "RULE", "1")
    assert index.cache_path(path, "tar shards", "x") != now
    index.cache_path([tmp_path / f"{LATIN}.tar"], "tar shards", "x")


def test_names_that_are_not_utf8(tmp_path):
    root = tmp_path / f"root {LATIN}"
    for name, seed in ((LATIN, 1), ("tea", 2)):
        (root / "train" / name).mkdir(parents=True)
        (root / "train" / name / f"{LATIN}{seed}.png").write_bytes(encode(seed))
        (root / "train" / name / f"{LATIN} bad.png").write_bytes(b"no image")
    out, printed = tmp_path / "out", io.StringIO()
    console = Console(file=printed, width=1000)
    assert not verify_data(root, console, tmp_path / "bad.jsonl", 1)
    prepare_data(root, out, console, workers=1)
    printed.getvalue().encode()
    shards = open_source(DataConfig(path=str(out)), 0, training=True)
    assert shards.class_names == [LATIN, "tea"]
    assert len(shards) == 2
    assert all("caf\\xe9" in shards.key(i) for i in range(2))
    assert verify_data(out, console, tmp_path / "bad.jsonl", 1)
    train = tmp_path / LATIN
    train.mkdir()
    os.rename(out / "train-000000.tar", train / f"{LATIN}-0.tar")
    assert len(open_path(train / LATIN)) == 2


def test_a_list_names_files_of_any_bytes_and_no_companions(tmp_path):
    make_folder(tmp_path, ["a"], per_class=1)
    (tmp_path / "a" / f"{LATIN}.png").write_bytes(encode(5))
    lines = [b"a/._0.png\t0", b"a/0.png\t0", f"a/{LATIN}.png\t1".encode("utf-8", "surrogateescape")]
    (tmp_path / "train_map.txt").write_bytes(b"\n".join(lines))
    source = open_list(tmp_path / "train_map.txt")
    assert source.labels.tolist() == [0, 1]
    assert source.read(1) == encode(5)
    (tmp_path / "other.txt").write_bytes("a/0.png\t0".encode("utf-16"))
    with pytest.raises(ValueError, match="not UTF-8 text"):
        open_list(tmp_path / "other.txt")


def test_class_names_survive_their_file(tmp_path):
    names = [LATIN, "a b ", "x\x85y", "ünï", "", "z"]
    write_classes(tmp_path / "classes.txt", names)
    assert read_classes(tmp_path / "classes.txt") == names
    (tmp_path / "dos.txt").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert read_classes(tmp_path / "dos.txt") == ["a", "b"]


@pytest.mark.parametrize("kind", ["AVIF", "PPM", "PNG", "WEBP"])
def test_prepared_are_all_formats_that_are_read(kind):
    buffer = io.BytesIO()
    Image.new("1" if kind == "PPM" else "RGB", (16, 16)).save(buffer, kind)
    assert image_extension(buffer.getvalue()) == kind.lower()
    assert EncodedImage(buffer.getvalue(), "RGB").pixels().shape == (16, 16, 3)


def test_too_large_is_no_damage_and_names_the_key(tmp_path):
    with pytest.raises(UnreadableImage, match=r"data\.max_pixels=100 to at least 144") as error:
        EncodedImage(encode(1), "RGB", 100)
    assert error.value.kind == "too large"
    root = make_folder(tmp_path / "train", ["a", "b"])
    with (root / "a/0.png").open("wb") as file:
        file.truncate(3_500_000_000)  # takes no room on the disk
    loader = open_loader(tmp_path)
    list(loader.epoch(0))
    assert dict(loader.bad.kinds) == {"too large": 1}
    printed = io.StringIO()
    assert not verify_data(
        tmp_path, Console(file=printed, width=1000), tmp_path / "bad.jsonl", 1, max_pixels=100
    )
    assert "4 too large" in printed.getvalue()
    assert "data.max_pixels=100: raise it" in (tmp_path / "bad-train.jsonl").read_text()


def test_an_entry_that_claims_more_than_the_table_holds(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a/1.png", encode(1))
    source = ZipSource(tmp_path / "x.zip", None)
    from swin_moe.data.readers.zipped import array, pack_records

    record = pack_records(array("Q", [0, 2**33 + 5, 2**33 + 5, 0, 0]))
    source.table[0] = record[0]
    with pytest.raises(UnreadableImage, match=r"data\.max_pixels"):
        source.read(0)


def test_an_unreadable_image_is_logged_once(caplog, tmp_path):
    bad = BadSamples()
    for _ in range(3):
        bad.add([Skipped("x.png", "damaged", "why"), Skipped("x.png", "damaged", "why")])
    assert caplog.text.count("x.png") == 1
    assert bad.total == 1


def test_whole_batches_of_bad_images_are_replaced_up_to_the_share(tmp_path):
    root = make_folder(tmp_path / "train", ["a", "b"], per_class=20)
    for number in range(20):
        (root / "a" / f"{number}.png").write_bytes(b"broken")

    def epochs():
        loader = open_loader(tmp_path, batch_size=2, max_bad_share=1.0)
        return [[batch.indices.tolist() for batch in loader.epoch(e)] for e in (0, 1)]

    first, again = epochs(), epochs()
    assert first == again
    assert first[0] != first[1]
    taken = np.array(first)
    assert (taken >= 20).all()
    (root / "b").rename(tmp_path / "aside")
    (root / "b").mkdir()
    with pytest.raises(ValueError, match=r"none of 12 training images can be read.*max_bad_share"):
        list(open_loader(tmp_path, batch_size=2, max_bad_share=0.0).epoch(0))


def test_too_many_workers_is_one_line(tmp_path, caplog):
    make_folder(tmp_path / "train", ["a", "b"], per_class=4)
    assert open_loader(tmp_path, batch_size=8, num_workers=64).workers == 1
    assert caplog.text.count("data.num_workers=64") == 1
    assert "an epoch has 1 batches, so 1 of them work" in caplog.text


def test_a_relative_path_names_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"no such folder in {plain(tmp_path)}, where you are"):
        open_source(DataConfig(path="nowhere"), 0, training=True)


def a_tar(path, *names):
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            add_member(tar, name, encode(number) if name.endswith("png") else b"0")
    return path


def test_data_after_the_end_of_a_tar_is_an_error(tmp_path):
    first, second = (a_tar(tmp_path / f"{n}.tar", f"{n}.png", f"{n}.cls") for n in "ab")
    second.write_bytes(first.read_bytes() + second.read_bytes())
    first.unlink()
    with pytest.raises(ValueError, match=r"b\.tar: more follows .* joined by cat"):
        open_path(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_in_a_tar_per_class_is_not_lost(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add_member(tar, "1.png", encode(0))
        link = tarfile.TarInfo("2.png")
        link.type, link.linkname = kind, "1.png"
        tar.addfile(link)
    with pytest.raises(ValueError, match=r"a\.tar: '2\.png' is a link to '1\.png'.*--hard-deref"):
        open_path(tmp_path)


def test_a_shard_with_its_compressed_copy_does_not_count_twice(tmp_path):
    shard = a_tar(tmp_path / "train-0.tar", "a.png", "a.cls")
    (tmp_path / "train-0.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(ValueError, match=r"train-0\.tar and train-0\.tar\.gz are one shard twice"):
        open_path(tmp_path / "train")


def test_a_stray_tar_does_not_take_the_place_of_class_folders(tmp_path):
    make_folder(tmp_path, ["a", "b"])
    a_tar(tmp_path / "a.tar", "1.png")  # the class that was unpacked
    with pytest.raises(ValueError, match=r"holds a\.tar next to the class folder 'b'"):
        open_path(tmp_path)
    a_tar(tmp_path / "b.tar", "1.png")
    assert open_path(tmp_path).class_names == ["a", "b"]


def test_an_entry_that_a_zip_holds_twice_counts_once(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for number, name in enumerate(["a/1.png", "a/2.png", "b/1.png"]):
            archive.writestr(name, encode(number))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a/1.png", encode(3))
    source = ZipSource(tmp_path / "x.zip", None)
    assert contents(source) == [encode(3), encode(1), encode(2)]
    assert source.labels.tolist() == [0, 0, 1]


def test_zips_of_macos_and_of_windows_have_the_names_of_folders(tmp_path):
    info = zipfile.ZipInfo("caf__/1.png")
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr(info, encode(0))
    content = (tmp_path / "mac.zip").read_bytes().replace(b"caf__", "caf\u00e9".encode())
    (tmp_path / "mac.zip").write_bytes(content)  # without the flag that says UTF-8
    assert ZipSource(tmp_path / "mac.zip", None).class_names == ["caf\u00e9"]
    info = zipfile.ZipInfo("dog\\1.png")
    info.create_system = 0
    with zipfile.ZipFile(tmp_path / "windows.zip", "w") as archive:
        archive.writestr(info, encode(0))
    assert ZipSource(tmp_path / "windows.zip", None).class_names == ["dog"]


def test_blank_lines_at_the_end_of_a_list_of_classes_are_no_classes(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n\n")
    assert read_classes(tmp_path / "classes.txt") == ["cat", "dog"]


def test_parquet_shards_must_agree_on_their_classes(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for number, names in enumerate([["a", "b"], ["b", "a"]]):
        table = pa.table({"image": [encode(number)], "label": [0]})
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, tmp_path / f"train-{number}.parquet")
    with pytest.raises(ValueError, match=r"train-1\.parquet names its classes differently"):
        open_path(tmp_path / "train")


def test_a_grey_image_of_16_bits_is_read_as_pnm_too():
    data = b"P5 2 1 65535\n" + bytes([0, 0, 128, 128])
    assert EncodedImage(data, "L").pixels().ravel().tolist() == [0, 128]


def test_files_without_permission_are_not_called_damaged(tmp_path, monkeypatch):
    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", "x")

    shard = a_tar(tmp_path / "x.tar", "a.png", "a.cls")
    monkeypatch.setattr(tarfile, "open", refused)
    monkeypatch.setattr(Path, "read_bytes", refused)
    for look in (has_labels, lambda path: scan_shard(path, 0), index.read_index):
        with pytest.raises(PermissionError):
            look(shard)


def test_the_first_tar_per_class_may_be_empty(tmp_path):
    a_tar(tmp_path / "a.tar")
    a_tar(tmp_path / "b.tar", "1.png")
    source = open_path(tmp_path)
    assert (source.class_names, source.labels.tolist()) == (["a", "b"], [1])


def test_splits_are_not_taken_for_classes(tmp_path):
    make_folder(tmp_path / "x", ["train/a", "train/b", "val/a", "val/b"])
    with pytest.raises(ValueError, match=r"data\.train=x: its classes are 'train' and 'val'"):
        open_source(DataConfig(path=str(tmp_path), train="x"), 2, True)
