import io
import tarfile

import numpy as np
import pytest
import webdataset

from swin_moe.data.readers.shards import MAX_OPEN, find_shards, open_shards

from .helpers import encode, make_shards, samples, write_shard


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_reads_what_webdataset_reads(tmp_path):
    make_shards(tmp_path, 9)
    paths = find_shards(str(tmp_path / "train"))
    source = open_shards(paths, None)
    expected = [s for p in paths for s in webdataset.WebDataset(str(p), shardshuffle=False)]
    assert len(source) == len(expected) == 9
    for index, sample in enumerate(expected):
        assert source.read(index) == sample["png"]
        assert source.labels[index] == int(sample["cls"])
        assert source.key(index) == f"{sample['__url__']}:{sample['__key__']}"


def test_compressed_equals_plain(tmp_path):
    for name in ("a.tar", "b.tar.gz", "c.tgz"):
        write_shard(tmp_path / name, samples(5))
    plain, *packed = (
        open_shards([tmp_path / name], None) for name in ("a.tar", "b.tar.gz", "c.tgz")
    )
    for other in packed:
        np.testing.assert_array_equal(other.labels, plain.labels)
        assert [other.read(i) for i in range(5)] == [plain.read(i) for i in range(5)]


def test_members_in_folders_other_extensions_and_cases(tmp_path):
    path = write_members(
        tmp_path / "x.tar",
        [
            ("n01/a.JPEG", encode(0, extension="jpg")),
            ("n01/a.cls", b"3\n"),
            ("n01/a.json", b"{}"),
            ("n01/.hidden", b"?"),
            ("n02/a.cls", b"4"),
            ("n02/a.webp", encode(1, extension="webp")),
        ],
    )
    source = open_shards([path], None)
    assert source.labels.tolist() == [3, 4]
    assert source.read(0) == encode(0, extension="jpg")
    assert source.key(1) == f"{path}:n02/a"


def test_find_shards(tmp_path):
    for name in ("train-0.tar", "train-1.tgz", "train-2.tar.gz", "train-3.idx", "trainer-0.tar"):
        (tmp_path / name).touch()
    names = ["train-0.tar", "train-1.tgz", "train-2.tar.gz"]
    assert find_shards(str(tmp_path / "train")) == [tmp_path / name for name in names]
    assert find_shards(str(tmp_path / "train-{0..0}.tar")) == [tmp_path / "train-0.tar"]
    assert find_shards(str(tmp_path / "train*-0.*")) == [
        tmp_path / "train-0.tar",
        tmp_path / "trainer-0.tar",
    ]
    with pytest.raises(ValueError, match=r"train-1\.tar: no such shard, but .*\{0\.\.1\}"):
        find_shards(str(tmp_path / "train-{0..1}.tar"))


def test_more_shards_than_open_files(tmp_path):
    count = MAX_OPEN + 3
    for number in range(count):
        write_shard(tmp_path / f"t-{number:03d}.tar", [("k", bytes([number % 256]), 0)])
    source = open_shards(find_shards(str(tmp_path / "t")), None)
    for index in (*range(count), 0, 1):
        assert source.read(index) == bytes([index % 256])
    assert len(source.open_files) == MAX_OPEN


PNG = encode(0)
FAULTS = {
    "has no label": [("a.png", PNG), ("b.png", PNG), ("b.cls", b"0")],
    "sample 'b' has no label": [("a.png", PNG), ("a.cls", b"0"), ("b.png", PNG)],
    "has no image": [("a.cls", b"0")],
    "'a' is b'cat', not a class number": [("a.png", PNG), ("a.cls", b"cat")],
    "'a' is b'-1', not a class number": [("a.png", PNG), ("a.cls", b"-1")],
    "the key 'a' comes twice": [
        ("a.png", PNG),
        ("a.cls", b"0"),
        ("b.png", PNG),
        ("b.cls", b"0"),
        ("a.png", PNG),
        ("a.cls", b"1"),
    ],
    "the key 'a' has two images": [("a.png", PNG), ("a.cls", b"0"), ("a.jpg", PNG)],
}


@pytest.mark.parametrize("message", FAULTS)
def test_faulty_samples_name_the_shard(tmp_path, message):
    path = write_members(tmp_path / "bad.tar", FAULTS[message])
    with pytest.raises(ValueError, match=rf"bad\.tar: .*{message}") as error:
        open_shards([path], None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["bad.tar", "bad.tar.gz"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 0.9])
def test_truncated_shard(tmp_path, name, kept):
    path = tmp_path / name
    write_shard(path, samples(20))
    content = path.read_bytes()
    if name == "bad.tar":
        content = content[: content.rindex(b"key0019.png")]  # not only the padding at the end
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"bad\.tar.*: the shard is truncated or damaged") as error:
        open_shards([path], None)
    assert "\n" not in str(error.value)


def test_truncated_at_every_block(tmp_path):
    """Truncation between two samples counts too, where tarfile raises no error."""
    path = tmp_path / "bad.tar"
    write_shard(path, samples(2))
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        tar.getmembers()
        end = tar.offset
    for size in range(0, end, 512):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="truncated or damaged"):
            open_shards([path], None)


def test_damaged_header(tmp_path):
    path = tmp_path / "bad.tar"
    write_shard(path, samples(3))
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[4].offset
    content[offset + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        open_shards([path], None)


def test_too_much_compressed(tmp_path, monkeypatch):
    path = tmp_path / "x.tar.gz"
    write_shard(path, samples(3))
    monkeypatch.setattr("swin_moe.data.readers.shards.MAX_COMPRESSED", 100)
    with pytest.raises(ValueError, match=r"x\.tar\.gz: .*gunzip"):
        open_shards([path], None)


def test_shard_that_shrinks_while_in_use(tmp_path):
    path = tmp_path / "x.tar"
    write_shard(path, samples(3))
    source = open_shards([path], None)
    with open(path, "r+b") as file:
        file.truncate(700)
    with pytest.raises(OSError, match="shorter"):
        source.read(2)
