"""Formats of ImageNet other than shards and folders, all with one interface."""

import json
import multiprocessing
import pickle
import struct
import zipfile

import numpy as np
import pytest

from swin_moe.data.readers import file_list, zipped
from swin_moe.data.readers.file_list import open_list, read_list
from swin_moe.data.readers.zipped import ZipSource
from swin_moe.data.source import open_path, open_splits

from .helpers import encode, make_folder, open_loader, samples, write_shard
from .test_shards import write_members

FILES = [f"n0{i % 3}/n0{i % 3}_{i}.JPEG" for i in range(12)] + ["n01/Größe.png"]
LABELS = [int(name[2]) for name in FILES]
WALKED = sorted(range(len(FILES)), key=FILES.__getitem__)  # in the order of a folder's walk


def _content(index: int) -> bytes:
    return bytes([index]) * (100 + index)


def _refused(pattern, make, *arguments):
    with pytest.raises(ValueError, match=pattern) as error:
        make(*arguments)
    assert "\n" not in str(error.value)


def _make_zip(path, compression=zipfile.ZIP_STORED, names=FILES):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for index, name in enumerate(names):
            archive.writestr(name, _content(index))
        archive.mkdir("empty")
        archive.writestr("n00/notes.txt", "not an image")
    return path


def _make_map(path, names=FILES, labels=LABELS, end="\n"):
    lines = [f"{name}\t{label}{end}" for name, label in zip(names, labels, strict=True)]
    path.write_text("".join(lines) + end, encoding="utf-8", newline="")
    return path


def _read_all(source):
    return [source.read(index) for index in range(len(source))]


def _check_in_processes(source, expected):
    """Check that forked processes share an open file and spawned ones get a pickled copy."""
    source.read(0)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(source.read, range(len(source))) == expected
    assert _read_all(pickle.loads(pickle.dumps(source))) == expected


# ---------------------------------------------------------------------------------------------
# Zip


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_zip_with_its_map(tmp_path, compression, end):
    _make_zip(tmp_path / "train.zip", compression)
    order = np.random.default_rng(0).permutation(len(FILES)).tolist()
    names, labels = [FILES[i] for i in order], [LABELS[i] for i in order]
    _make_map(tmp_path / "train_map.txt", names[:-1], labels[:-1], end)
    source = open_path(tmp_path / "train.zip")
    assert isinstance(source, ZipSource)
    assert source.labels.tolist() == labels[:-1]
    assert source.class_counts.tolist() == np.bincount(labels[:-1]).tolist()
    assert source.runs.tolist() == [12]
    assert source.key(0) == f"{tmp_path}/train.zip:{names[0]}"
    _check_in_processes(source, [_content(i) for i in order[:-1]])


def test_zip_without_a_map_is_of_class_folders(tmp_path):
    source = ZipSource(_make_zip(tmp_path / "train.zip"), None)
    assert source.class_names == ["empty", "n00", "n01", "n02"]  # in the order of a folder
    assert source.labels.tolist() == [LABELS[i] + 1 for i in WALKED]
    assert _read_all(source) == [_content(i) for i in WALKED]


def test_folders_around_the_classes_of_a_zip(tmp_path):
    names = ["data/train/cat/1.jpg", "data/train/dog/sub/2.jpg", "__MACOSX/data/train/cat/._1.jpg"]
    source = ZipSource(_make_zip(tmp_path / "x.zip", names=names), None)
    # notes.txt and __MACOSX hold no class
    assert source.class_names == ["cat", "dog"]
    assert source.labels.tolist() == [0, 1]
    one = ZipSource(_make_zip(tmp_path / "one.zip", names=["train/cat/1.jpg"]), None)
    assert one.class_names == ["cat"]


def test_the_folder_around_the_classes_of_a_zip_is_reported(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("cat/a/1.jpg", "cat/b/2.jpg"):  # folders of one class, or a folder of classes?
            archive.writestr(name, encode(0))
    source = ZipSource(tmp_path / "x.zip", None)
    assert source.class_names == ["a", "b"]
    assert "classes are the folders in cat)" in source.describe()


def test_paths_that_begin_with_here_or_a_bracket(tmp_path):
    names = ["./cat/1.jpg", "[dog]/2.jpg"]
    _make_zip(tmp_path / "x.zip", names=names)
    for lines in ("cat/1.jpg\t1\n./[dog]/2.jpg\t0\n", "[dog]/2.jpg\t0\n./cat/1.jpg\t1\n"):
        (tmp_path / "x_map.txt").write_text(lines)
        source = open_path(tmp_path / "x.zip")
        found = {source.key(i).rpartition("/")[2]: int(source.labels[i]) for i in range(2)}
        assert found == {"1.jpg": 1, "2.jpg": 0}


def test_a_validation_zip_with_other_classes(tmp_path):
    for split, classes in (("train", "abc"), ("val", "ac")):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for name in classes * 4:
                archive.writestr(f"{name}/{len(archive.namelist())}.png", encode(0))
    message = r"data\.val=val: .*/val and .*/train differ in 1 class folders, first 'b'"
    _refused(message, lambda: open_loader(tmp_path, training=False, num_classes=3))


def test_a_list_may_begin_with_a_mark(tmp_path):
    (tmp_path / "m.txt").write_text("a.jpg\t1\n", encoding="utf-8-sig")
    assert list(read_list(tmp_path / "m.txt")) == [("a.jpg", 1)]
    (tmp_path / "j.txt").write_text('[["a.jpg", 1]]', encoding="utf-8-sig")
    assert list(read_list(tmp_path / "j.txt")) == [("a.jpg", 1)]


def test_zip64_and_many_chunks(tmp_path, monkeypatch):
    """Archives of more than 65,535 entries have the zip64 form of the directory."""
    monkeypatch.setattr(zipped, "CHUNK", 1000)
    names = [f"a/{i:05d}.jpg" for i in range(66_000)]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for index, name in enumerate(names):
            archive.writestr(name, struct.pack("<I", index))
    source = ZipSource(tmp_path / "x.zip", None)
    assert len(source) == 66_000
    assert [struct.unpack("<I", source.read(i))[0] for i in (0, 1, 40_000, 65_999)] == [
        0, 1, 40_000, 65_999,
    ]  # fmt: skip


def test_large_numbers_of_an_entry():
    extra = struct.pack("<2HI", 7, 4, 1) + struct.pack("<2H2Q", 1, 16, 5 << 32, 6 << 32)
    fields = (b"PK\x01\x02", 20, 20, 0, 0, 0, 0, 9, 0xFFFFFFFF, 7, 1, len(extra), 0, 0, 0, 0)
    entry = zipped.DIRECTORY.pack(*fields, 0xFFFFFFFF) + b"a" + extra
    parsed, used = zipped.parse_entry(entry, 0, "x.zip")
    assert parsed == ("a", 6 << 32, 5 << 32, 7, 9, 0)
    assert used == len(entry)


def test_faulty_zips(tmp_path):
    archive = _make_zip(tmp_path / "train.zip")
    missing = _make_map(tmp_path / "m.txt", [*FILES, "n00/x.jpg", "n00/y.jpg"], [*LABELS, 0, 0])
    _refused(
        r"train\.zip: 2 images of m\.txt are not in it, first 'n00/x", ZipSource, archive, missing
    )
    twice = _make_map(tmp_path / "t.txt", [*FILES, FILES[3]], [*LABELS, 0])
    _refused(rf"t\.txt: '{FILES[3]}' is listed twice", ZipSource, archive, twice)
    content = archive.read_bytes()
    for damaged in (content[:-300], content[: len(content) // 2], b"", b"PK\x05\x06"):
        (tmp_path / "bad.zip").write_bytes(damaged)
        _refused(
            r"bad\.zip: not a zip archive, or a truncated", ZipSource, tmp_path / "bad.zip", None
        )
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as other:
        other.writestr("a/b.jpg", b"1")
    _refused(
        r"lzma\.zip: 'a/b\.jpg' is encrypted or compressed", ZipSource, tmp_path / "lzma.zip", None
    )


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_entry_is_refused_when_it_is_read(tmp_path, compression):
    archive = _make_zip(tmp_path / "train.zip", compression)
    source = ZipSource(archive, None)
    content = bytearray(archive.read_bytes())
    content[int(source.table["offset"][2]) + 30 + len(FILES[WALKED[2]]) + 2] ^= 255
    content[int(source.table["offset"][4])] ^= 255
    archive.write_bytes(content)
    for index, reason in ((2, "damaged"), (4, "no entry of the archive begins")):
        with pytest.raises(ValueError, match=reason):
            source.read(index)
    assert source.read(3) == _content(WALKED[3])


# ---------------------------------------------------------------------------------------------
# Lists


def _make_files(root):
    for index, name in enumerate(FILES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_content(index))


@pytest.mark.parametrize("kind", ["lines", "json", "json-indented"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_list_of_files(tmp_path, monkeypatch, kind, chunk):
    monkeypatch.setattr(file_list, "CHUNK", chunk)
    _make_files(tmp_path)
    path = tmp_path / "ILSVRC2011fall_whole_map_train.txt"
    if kind == "lines":
        _make_map(path)
    else:
        entries = [[name, label, "further"] for name, label in zip(FILES, LABELS, strict=True)]
        text = json.dumps(
            entries, indent=1 if kind == "json-indented" else None, ensure_ascii=False
        )
        path.write_text(text, encoding="utf-8")
    source = open_path(path)
    assert source.describe() == f"list of image files ({path})"
    assert source.labels.tolist() == LABELS
    assert source.key(12) == str(tmp_path / FILES[12])
    assert source.runs.tolist() == [1] * 13
    _check_in_processes(source, [_content(i) for i in range(13)])


@pytest.mark.parametrize(("text", "message"), [
    ("a.jpg\t0\nb.jpg 1\n", "line 2: no tab"),
    ("a.jpg\tcat\n", "line 1: 'a.jpg' with 'cat' is not a path with a class number"),
    ("a.jpg\t-1\n", "line 1: .* class number"),
    ("/a.jpg\t0\n", "line 1: '/a.jpg' leads out"),
    ("x/../../a.jpg\t0\n", "line 1: .* leads out"),
    ('[["a.jpg", 0], ["b.jpg"', "entry 2: the list is damaged or ends too early"),
    ('[["a.jpg", 0]', "entry 2: the list is damaged or ends too early"),
    ('[["a.jpg", 0], ["b.jpg"]]', r"entry 2: not a \[path, label\] pair"),
    ('[["a.jpg", 0], {"b.jpg": 1}]', r"entry 2: not a \[path, label\] pair"),
    ('[["a.jpg", 0.5]]', "entry 1: 'a.jpg' with 0.5"),
    ("[[7, 0]]", "entry 1: 7 with 0"),
    ('[["a.jpg", true]]', "entry 1: 'a.jpg' with True"),
    ("a.jpg\t1_0\n", "line 1: 'a.jpg' with '1_0'"),
    ('[["\\ud800.jpg", 0]]', "entry 1: .* is no file name"),
    ("[" * 3000, "entry 1: the list is damaged"),
])  # fmt: skip
def test_faulty_lists(tmp_path, text, message):
    path = tmp_path / "map.txt"
    path.write_text(text)
    _refused(rf"map\.txt, {message}", lambda: list(read_list(path)))


def test_a_list_far_from_its_files(tmp_path):
    _refused(
        r"m\.txt: its first file, .*n00_0\.JPEG, is missing",
        open_list,
        _make_map(tmp_path / "m.txt"),
    )
    path = tmp_path / "latin.txt"
    path.write_bytes("Größe.jpg\t0\n".encode("latin-1"))
    _refused(r"latin\.txt: its first file, .*Gr\\xf6\\xdfe\.jpg, is missing", open_list, path)


# ---------------------------------------------------------------------------------------------
# Parquet


def _make_parquet(path, start=0, count=10, *, label="label", labels=None, kind="int64"):
    parquet = pytest.importorskip("pyarrow.parquet", reason="reading parquet needs pyarrow")
    import pyarrow

    rows = range(start, start + count)
    table = pyarrow.table({
        "image": [{"bytes": encode(i), "path": f"{i}.png"} for i in rows],
        label: pyarrow.array(labels or [i % 2 for i in rows], kind),
    })  # fmt: skip
    features = {
        "image": {"_type": "Image"},
        label: {"names": ["cat", "dog"], "_type": "ClassLabel"},
    }
    info = json.dumps({"info": {"features": features}})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": info}), path, row_group_size=4
    )
    return path


def test_parquet(tmp_path):
    _make_parquet(tmp_path / "data/train-00000-of-00002.parquet")
    _make_parquet(tmp_path / "data/train-00001-of-00002.parquet", 10, 5)
    source = open_splits(tmp_path)["train"]
    assert source.class_names == ["cat", "dog"]
    assert source.labels.tolist() == [i % 2 for i in range(15)]
    assert source.runs.tolist() == [4, 4, 2, 4, 1]
    assert source.key(13).endswith("train-00001-of-00002.parquet:3")
    assert "swin-moe prepare-data" in source.describe()
    _check_in_processes(source, [encode(i) for i in range(15)])
    loader = open_loader(tmp_path, num_classes=2, num_workers=2)
    assert sorted(i for b in loader.epoch(0) for i in b.indices.tolist()) == sorted(
        i for batch in loader.sampler for _, i, _ in batch
    )


def test_parquet_keeps_few_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr("swin_moe.data.readers.parquet.MAX_OPEN", 2)
    monkeypatch.setattr("swin_moe.data.readers.parquet.KEPT_BYTES", 0)
    for number in range(4):
        _make_parquet(tmp_path / f"train-{number}.parquet", 3 * number, 3)
    source = open_splits(tmp_path)["train"]
    for index in (*range(12), 0, 5):
        assert source.read(index) == encode(index)
    assert len(source.open_files) == 2


def test_parquet_keeps_few_row_row_groups(tmp_path, monkeypatch):
    source = open_path(_make_parquet(tmp_path / "x.parquet"))
    monkeypatch.setattr("swin_moe.data.readers.parquet.KEPT_BYTES", 9 * len(encode(0)))
    for index in (0, 4, 8, 0, 9, 5):
        assert source.read(index) == encode(index)
    assert len(source.row_groups) == 2


def test_parquet_of_repeated_values(tmp_path):
    path = _make_parquet(tmp_path / "x.parquet")
    import pyarrow
    import pyarrow.parquet

    images = pyarrow.array([encode(0), encode(1), encode(0)]).dictionary_encode()
    labels = pyarrow.array([4, 7, 4]).dictionary_encode()
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "label": labels}), path)
    source = open_path(path)
    assert source.labels.tolist() == [4, 7, 4]
    assert _read_all(source) == [encode(0), encode(1), encode(0)]


def test_faulty_parquet(tmp_path):
    path = _make_parquet(tmp_path / "x.parquet", label="target")
    _refused(r"x\.parquet: no column label or .*: it has image, target", open_path, path)
    path = _make_parquet(tmp_path / "n.parquet", count=3, labels=[0, None, 1])
    _refused(r"n\.parquet: row 1 has no label", open_path, path)
    path = _make_parquet(tmp_path / "m.parquet", count=2, labels=[0, -1])
    _refused(r"m\.parquet: row 1 has the label -1: a split without labels", open_path, path)
    path = _make_parquet(tmp_path / "t.parquet", count=2, labels=["cat", "dog"], kind="string")
    _refused(r"t\.parquet: the column 'label' holds string, not class numbers", open_path, path)
    damaged = bytearray(_make_parquet(tmp_path / "d.parquet").read_bytes())
    damaged[4:-200] = bytes(len(damaged) - 204)
    (tmp_path / "d.parquet").write_bytes(damaged)
    _refused(r"d\.parquet: the shard is damaged", open_path, tmp_path / "d.parquet")
    path = tmp_path / "m.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    _refused(r"m\.parquet: the shard is damaged", open_path, path)


# ---------------------------------------------------------------------------------------------
# Detection of the format


def test_tars_of_one_class_each(tmp_path):
    for label, name in enumerate(("n01440764", "n01443537")):
        members = [(f"{name}_{i}.JPEG", encode(10 * label + i, extension="jpg")) for i in range(3)]
        (tmp_path / "train").mkdir(exist_ok=True)
        write_members(tmp_path / "train" / f"{name}.tar", members)
    source = open_splits(tmp_path)["train"]
    assert source.class_names == ["n01440764", "n01443537"]
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.read(4) == encode(11, extension="jpg")
    assert source.key(4).endswith("n01443537.tar:n01443537_1")
    assert "a tar per class" in source.describe()


def test_odd_members_do_not_hide_the_labels(tmp_path):
    (tmp_path / "train").mkdir()
    members = [("._a.jpg.txt", b"?"), ("README", b"?"), ("a.png", encode(0)), ("a.cls", b"7")]
    write_members(tmp_path / "train" / "000.tar", members)
    assert open_splits(tmp_path)["train"].labels.tolist() == [7]
    plain = [("b.1.png", encode(1)), ("b.2.png", encode(2))]
    write_members(tmp_path / "train" / "001.tar", plain)
    _refused(r"001\.tar: 2 images, but none with a \.cls", open_splits, tmp_path)


def test_other_files_in_a_tar_of_one_class_are_counted(tmp_path):
    write_members(tmp_path / "ant.tar", [("README", b"?"), ("a.heic", b"?"), ("b.png", encode(0))])
    write_members(tmp_path / "bee.tar", [("c.png", encode(1))])
    source = open_path(tmp_path)
    assert source.passed_over == "2 files in the tars passed over: they are not named like images"
    assert source.labels.tolist() == [0, 1]


def test_a_tar_that_is_called_like_a_split_is_no_class(tmp_path):
    write_members(tmp_path / "train.tar", [("cat/a.png", encode(0)), ("dog/b.png", encode(1))])
    _refused(r"train\.tar has no labels .* unpack it", open_path, tmp_path)


def test_tars_of_one_class_keep_every_name(tmp_path):
    names = ["x.1.jpg", "x.2.jpg", "x.2.png"]
    write_members(tmp_path / "ant.tar", [(n, encode(i)) for i, n in enumerate(names)])
    assert len(open_path(tmp_path)) == 3
    write_members(tmp_path / "bee.tar", [("y.png", encode(1)), ("y.cls", b"1")])
    _refused(r"bee\.tar: it has labels", open_path, tmp_path)


def test_validation_tars_with_other_classes(tmp_path):
    for split, classes in (("train", "abc"), ("val", "bcd")):
        (tmp_path / split / ".swin_moe_index").mkdir(parents=True)
        for name in classes:
            members = [(f"{i}.png", encode(i)) for i in range(4)]
            write_members(tmp_path / split / f"{name}.tar", members)
    message = r"differ in 2 class folders, first 'a'"
    _refused(message, lambda: open_loader(tmp_path, training=False, num_classes=3))


def test_shards_in_folders_are_no_classes(tmp_path):
    for split, count in (("train", 2), ("val", 1)):
        (tmp_path / split).mkdir()
        for number in range(count):
            write_shard(tmp_path / split / f"{number:03d}.tar", samples(4))
    assert open_loader(tmp_path, training=False).num_samples == 4


def test_a_train_json_of_another(tmp_path):
    make_folder(tmp_path / "train", ["a", "b"])
    (tmp_path / "train.json").write_text('{"images": [], "annotations": []}')
    assert open_loader(tmp_path, num_classes=2).class_names == ["a", "b"]


def test_timms_index_names_the_shards(tmp_path):
    for number in range(3):
        write_shard(tmp_path / f"in22k_{number}.tar", samples(4, 4 * number))
    splits = {"train": {"filenames": ["in22k_0.tar", "in22k_2.tar"]}}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    loader = open_loader(tmp_path)
    assert loader.num_samples == 8
    splits["train"]["filenames"].append("in22k_9.tar")
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    _refused(r"in22k_9\.tar: no such shard, but .*_info\.json lists it", open_loader, tmp_path)
    for name in ("../in22k_0.tar", "/in22k_0.tar"):
        content = json.dumps({"splits": {"train": {"filenames": [name]}}})
        (tmp_path / "_info.json").write_text(content)
        _refused(r"_info\.json: not an index of splits", open_loader, tmp_path)
    (tmp_path / "_info.json").write_text("[]")
    _refused(r"_info\.json: not an index of splits", open_loader, tmp_path)


def test_official_zip_mode_by_config(tmp_path):
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for i in range(8):
            archive.writestr(f"n0{i % 2}/{i}.png", encode(i))
    _make_map(tmp_path / "train_map.txt", [f"n0{i % 2}/{i}.png" for i in range(8)], [0, 1] * 4)
    loader = open_loader(tmp_path, num_classes=2)
    assert "8 samples, 2 classes without names, zip (" in loader.description
    assert len(list(loader.epoch(0))) == 2
    assert not loader.bad.total


def test_a_class_that_is_called_train(tmp_path):
    make_folder(tmp_path, ["bus", "train"])
    (split,) = open_splits(tmp_path).items()
    assert split[0] == "train"
    assert split[1].class_names == ["bus", "train"]


def test_nothing_there(tmp_path):
    _refused(r"nowhere: nothing that can be read", open_splits, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    _refused(r"empty has no class folders", open_splits, tmp_path / "empty")


def test_an_unreadable_folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "train", ["a", "b"])

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    _refused(
        r"train: the folder cannot be read \(Permission denied\)", open_path, tmp_path / "train"
    )


def test_empty_images_are_named_when_read(tmp_path):
    folder = make_folder(tmp_path / "train", ["a", "b"], per_class=4)
    (folder / "a" / "1.png").write_bytes(b"")
    loader = open_loader(tmp_path)
    list(loader.epoch(0))
    assert dict(loader.bad.kinds) == {"not an image": 1}
