"""A value in a config or override is taken as typed, or refused in one line."""

import os
import random

import pytest
import yaml

from swin_moe.cli.main import main
from swin_moe.config import (
    Config,
    ConfigError,
    dump_plain,
    load_config,
    load_plain,
    parse_overrides,
    validate,
)
from swin_moe.config.yaml_core import NotOurYaml, dump, parse
from tests.parallel import MICRO

# Words that YAML takes for a number, a date, a switch, null, a comment, a list, an alias, a tag, …
NAMES = [
    "no", "yes", "on", "off", "y", "true", "null", "~", "2012", "010", "08", "0123", "1:30", "1e-3",
    "5e5", "1_000", "0x1F", "0o17", "0b11", ".5", "1.", ".inf", ".nan", "-", "--", "---", "...",
    "2001-01-01", "2001-12-14t21:59:43.10-05:00", "<<", "=", "exp #3", "#3", "a #b", "a: b", "a:",
    ": a", "- a", "? a", "*a", "&a b", "!a", "!!int 5", "!!python/name:os.system", "%a", "@a",
    "`a`", "|", ">", "[v1] flowers", "{old}", "{a: b}", "x{old}", "what?", "'", "it's", "'a' b",
    '"a', "a,b", "a]", "C:\\new\\x", "café", "caf\udce9", "\U0001f600 x", "日本", " a", "a ",
    "a  b", "a\tb", "a\nb", "a\x1b[31m", "a\u2028b", "\ufeffa", "runs/exp #3", "s3://bucket/a b",
    "x" * 200 + " y" * 100,
]  # fmt: skip


def write(folder, text):
    (folder / "c.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    return folder / "c.yaml"


def error(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) <= 1000
    return message


@pytest.mark.parametrize("key", ["data.path", "data.train", "train.output", "model.pretrained"])
def test_a_word_of_the_command_line_is_taken_as_it_is(tmp_path, key):
    section, name = key.split(".")
    path = write(tmp_path, "")
    for word in NAMES:
        config = load_config(path, [f"{key}={word}"])
        assert getattr(getattr(config, section), name) == os.path.expanduser(word)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("'[v1] flowers'", "[v1] flowers"),
        ('"a b"', "a b"),
        ("'it''s'", "it's"),
        (r'"a\"b\x41"', 'a"bA'),
        ("' a'", " a"),
        ("''", ""),
    ],
)
def test_quotes_around_a_whole_word_are_those_of_yaml(typed, meant):
    for key in (
        "train.output",
        "zero.offload_optimizer",
        "model.img_size",
    ):  # for keys of any type
        section, name = key.split(".")
        assert parse_overrides([f"{key}={typed}"]) == {section: {name: meant}}


def test_every_string_comes_back_from_a_file(tmp_path):
    for word in [*NAMES, "", "'a'", '"a"', "a\rb", "a\x85b", "a" * 5000, "  a  \n  b  "]:
        config = Config()
        config.data.path = f"/data/{word}"
        config.data.train = config.data.val = word or "x"
        config.train.output = word or "runs/c"
        config.augment.auto_augment = config.model.pretrained = config.zero.nvme_path = word
        texts = {
            section: {key: value for key, value in keys.items() if isinstance(value, str)}
            for section, keys in config.model_dump().items()
        }
        del texts["moe"]  # without blocks its keys would be refused
        text = dump(texts, default_flow_style=None)
        assert load_config(write(tmp_path, text)) == config
    assert yaml.safe_load(text)["train"]["output"] == word  # other programs read it, too


def test_every_string_comes_back_from_a_file_of_an_earlier_version(tmp_path):
    for word in NAMES:
        raw = {"data": {"path": word}, "train": {"output": word}}
        path = write(tmp_path, yaml.safe_dump(raw, sort_keys=False, default_flow_style=None))
        assert load_config(path).train.output == os.path.expanduser(word)


def test_plain_data_come_back_from_a_file(tmp_path):
    values = [*NAMES, "", None, True, 0, -7, 10**20, 0.1, 1e-300, 1e22, -0.0, [], {}]
    data = {
        "values": values,
        "nested": [{"a": {"b": [values]}}],
        **{w: w for w in NAMES if w.isprintable()},
    }
    assert load_plain(write(tmp_path, dump_plain(data))) == data


@pytest.mark.parametrize("word", ["no", "2012", "1e-3", "5e5", "1_000", "010", "1:30", "2001-01-01",
                                  "on", "true", ".inf", "0x1F"])  # fmt: skip
def test_a_name_in_a_file_is_its_characters(tmp_path, word):
    """Also in checkpoints, in whose config.yaml earlier versions wrote no quotes."""
    path = write(tmp_path, f"data: {{path: {word}, train: '{word}'}}\ntrain:\n  output: {word}\n")
    config = load_config(path)
    assert (config.data.path, config.data.train, config.train.output) == (word, word, word)


@pytest.mark.parametrize("word", ["16", "+16", "0x10", "0o20", "16.0", "1.6e1", " 16 "])
def test_numbers_of_yaml_1_2(tmp_path, word):
    assert load_config(write(tmp_path, f"data: {{batch_size: {word}}}")).data.batch_size == 16
    assert load_config(write(tmp_path, ""), [f"data.batch_size={word}"]).data.batch_size == 16


@pytest.mark.parametrize(
    ("key", "word", "parts"),
    [
        ("data.batch_size", "010", ["010 has several meanings", "write 10"]),
        ("train.seed", "0123", ["write 123"]),
        ("train.seed", "08", ["write 8"]),
        ("train.seed", "-0_7", ["write -7"]),
        ("data.eval_batch_size", "1:30", ["write a plain number"]),
        ("train.max_steps", "1_000", ["write 1000"]),
        ("optimizer.base_lr", "1_0.5", ["write 10.5"]),
        ("train.seed", "2001-01-01", ["write a plain number"]),
        ("log.tensorboard", "yes", ["write true"]),
        ("log.tensorboard", "Off", ["write false"]),
        ("log.tensorboard", "maybe", ["'maybe': expected boolean: write true or false"]),
        ("data.batch_size", "'16'", ["'16': expected integer without quotes"]),
        ("data.batch_size", "16.5", ["16.5: expected", "integer"]),
        ("data.batch_size", "", ["null: expected integer"]),
        ("train.seed", "9" * 5000, ["5,000 digits"]),
        ("optimizer.base_lr", "9" * 900, ["optimizer.base_lr=9999", "number"]),
        ("model.depths", "[]", ["a list of at least 1"]),
        ("model.img_size", "[8]", ["model.img_size=[8]: expected a list of at least 2"]),
        ("model.img_size", "[a, 8]", ["model.img_size[0]='a': expected integer"]),
        ("model.use_checkpoint", "2", ["model.use_checkpoint=2: expected boolean or 'offload' or"]),
    ],
)  # fmt: skip
def test_other_numbers_are_refused(tmp_path, key, word, parts):
    section, name = key.split(".")
    for message in (
        error(write(tmp_path, ""), f"{key}={word}"),
        error(write(tmp_path, f"{section}:\n  {name}: {word}\n")),
    ):
        for part in [name, *parts]:
            assert part in message


def test_a_manifest_has_no_numbers_of_two_meanings(tmp_path):
    assert load_plain(write(tmp_path, "mode: '0400'\nname: it is\n"))["mode"] == "0400"
    with pytest.raises(ConfigError, match=r"c.yaml:2: a.mode: 0400 .* write 400, or put it in q"):
        load_plain(write(tmp_path, "a:\n  mode: 0400\n"))


def test_a_comment_is_none_on_the_command_line(tmp_path):
    path = write(tmp_path, "data: {path: a#b} # really\n")
    assert load_config(path).data.path == "a#b"
    assert "'16 #x': expected integer" in error(path, "data.batch_size=16 #x")
    assert "# would begin a comment" in error(path, "model.depths=[2, 2 #, 2]")
    assert "# would begin a comment" in error(path, "data={path: a} #, batch_size: 2}")


def test_a_section_on_the_command_line(tmp_path):
    path = write(tmp_path, "zero: {stage: 5}\n")
    config = load_config(path, ["zero={stage: 2}", "data={path: 1e-3, train: 'no'}", "data.val=x"])
    assert (config.zero.stage, config.data.path, config.data.train) == (2, "1e-3", "no")
    message = error(path, "zero={stage: 7}")
    assert message.startswith("override 'zero={stage: 7}': zero.stage=7: expected")
    assert load_config(write(tmp_path, "zero:\n"), ["zero.stage=2"]).zero.stage == 2


def test_paths_are_treated_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path, "")
    for key in ("data.path", "data.train", "data.val", "train.output", "model.pretrained",
                "zero.nvme_path"):  # fmt: skip
        section, name = key.split(".")

        def value(word, key=key, section=section, name=name):
            return getattr(getattr(load_config(path, [f"{key}={word}"]), section), name)

        assert value("~/a") == f"{tmp_path}/a"
        assert value("~nobody-of-this-name/a") == "~nobody-of-this-name/a"
        assert value("s3://~/a") == "s3://~/a"
        assert value("~root") == "~root"  # an ordinary name
        assert "NUL" in error(path, f"{key}=a\0b")
        assert f"{key}: it is empty" in error(path, f"{key}=  ")
        assert "line break" in error(path, f"{key}=a\r")
    for key in ("data.path", "data.train", "data.val"):
        assert f"{key}: it is empty" in error(path, f"{key}=")
    (tmp_path / "parent.yaml").write_text("zero: {stage: 3}")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(write(tmp_path, "base: ~/parent.yaml")).zero.stage == 3


@pytest.mark.parametrize(
    "setting",
    [
        *(
            f"{key}={value}"
            for key in (
                "model.img_size", "model.embed_dim", "model.window_size", "model.patch_size",
                "model.num_classes", "model.mlp_ratio", "model.init_std", "model.depths",
                "moe.num_experts", "moe.capacity_factor", "moe.eval_capacity_factor",
                "moe.init_std", "moe.aux_loss_weight", "moe.z_loss_weight", "moe.gate_noise",
                "moe.overlap_degree", "data.batch_size", "data.eval_batch_size",
                "data.num_workers", "augment.repeats",
                "augment.mixup", "augment.eval_crop", "optimizer.eps", "optimizer.weight_decay",
                "parallel.expert_parallel_size", "faults.hang_timeout_s",
            )
            for value in ("1e9", "1e30", "1000000000", ".inf", ".nan", "-1")
        ),
        "augment.eval_crop=1e-9", "augment.scale=[1e-9, 1]", "data.std=[1e-30, 1, 1]",
        "data.mean=[.nan, 0, 0]", "moe.aux_loss_weight=[.nan]", "optimizer.base_lr=1e999",
        "train.seed=1e30", "model.depths=[]",
    ],
)  # fmt: skip
def test_absurd_values_are_refused(tmp_path, setting):
    key = setting.partition("=")[0]
    assert f"{key}" in error(write(tmp_path, ""), setting).removeprefix(f"override '{setting}'")


def test_a_lowest_rate_above_the_peak(tmp_path):
    path = write(tmp_path, "optimizer: {base_lr: 1e-6}")
    assert "c.yaml:1: schedule.min_lr=5e-06 is above optimizer.base_lr=1e-06" in error(path)
    assert error(path, "optimizer.base_lr=1e-7").startswith("override 'optimizer.base_lr=1e-7'")
    load_config(path, ["schedule.min_lr=1e-6"])
    path.rename(tmp_path / "config.yaml")
    (tmp_path / "manifest.json").touch()  # a checkpoint of an earlier version
    assert load_config(tmp_path / "config.yaml").optimizer.base_lr == 1e-6


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning-rate: 1\n", ["c.yaml:1", "unknown key 'learning-rate'"]),
        ("\nmodel.img_size: 32\n", ["c.yaml:2", "'model.img_size'", "'model:' and below it"]),
        ("'': 1\n", ["c.yaml:1", "a key must be a word"]),
        (": 1\n", ["c.yaml:1", "not valid YAML"]),
        ("? [a]\n: 1\n", ["c.yaml:1", "a key must be a word"]),
        ("1: 2\n", ["c.yaml:1", "unknown key '1'"]),
        ('"a\\nb": 2\n', ["c.yaml:1", "a key must be a word"]),
        ('"\\udce9": 2\n', ["c.yaml:1", "a key must be a word"]),
        ("model:\n  <<: {a: 1}\n", ["c.yaml:2", "'model.<<'"]),
        ("model: {ape: true, ape: false}", ["c.yaml:1", "'model.ape' stands twice"]),
        ("model: {depths: [{a: 1, a: 2}]}", ["c.yaml:1", "stands twice"]),
        ("data: &a {}\naugment: *a\n", ["c.yaml:2", "aliases"]),
        ("train: {seed: !!int abc}\n", ["c.yaml:1", "not valid YAML", "!!int"]),
        ("train: !!set {a}\n", ["c.yaml:1", "!!set"]),
        ("train: !mine {a}\n", ["c.yaml:1", "!mine"]),
        ("a: 1\nb\0: 2\n", ["c.yaml:2", r"'\x00' is not allowed"]),
        ('a: "\\U99999999"\n', ["c.yaml:1", "not valid YAML"]),
        ("%YAML 1." + "9" * 5000 + "\n---\na: 1\n", ["c.yaml", "not valid YAML"]),
        ("a: 1\n---\nb: 1\n", ["c.yaml:2", "second document"]),
        ("[" * 5000, ["c.yaml:1", "deeper than 32"]),
        ("".join(f"{' ' * n}a:\n" for n in range(500)), ["c.yaml:33", "deeper than 32"]),
        ("#" * 300_000, ["c.yaml has 300,000 bytes"]),
        ("x: \udce9", ["c.yaml is not UTF-8"]),
        ("base: /dev/zero\n", ["c.yaml:1", "/dev/zero is a device"]),
        ("base: .\n", ["c.yaml:1", "is a folder"]),
        ("base: pipe\n", ["c.yaml:1", "is a pipe"]),
        ("base: circle\n", ["c.yaml:1", "circle"]),
        ("base: loop\n", ["c.yaml:1", "loop: cannot read"]),
        ("base:\n", ["c.yaml:1", "it is empty"]),
        ("base: [c.yaml]\n", ["c.yaml:1", "expected a path"]),
        ("base: 'a\tb'\n", ["c.yaml:1", r"a\tb: cannot read"]),
        ('base: "a\\0b"\n', ["c.yaml:1", "NUL"]),
        ("data: {path: null}\n", ["data.path=null", "write ''"]),
        ("data: {path: {old}}\n", ["data.path={'old'", "put it in quotes"]),
        ("data: {path: [v1]}\n", ["data.path=['v1']", "put it in quotes"]),
        ("model: [1]\n", ["c.yaml:1", "'model' is a section"]),
        ("- model\n", ["c.yaml:1", "expected sections"]),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, str) else "",
)
def test_odd_files_are_one_line_that_names_the_place(tmp_path, text, parts):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to("c.yaml")
    (tmp_path / "loop").symlink_to("loop")
    message = error(write(tmp_path, text))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "override",
    [
        "learning-rate=1", "=1", "model.=1", ".x=1", "model", "a" * 9999, "model.depths.x=1",
        ".".join("a" * 5000) + "=1", "a\nb=1", "model.depths=" + "[" * 5000, "model.depths=*a",
        "model.depths=[*a]", "model.depths=[!!int 1]", "model={<<: 1}", "model.name=\udce9",
        "\udce9=1", "model.\udce9=1",
        "zero.offload_optimizer=\udce9", "base=x.yaml", 'data.path="\\q"',
    ],
)  # fmt: skip
def test_odd_overrides_are_one_line_that_names_them(tmp_path, override):
    assert error(write(tmp_path, ""), override).startswith("override '")


def test_a_long_chain_of_bases(tmp_path):
    for index in range(40):
        (tmp_path / f"{index}.yaml").write_text(f"base: {index + 1}.yaml\n")
    assert "more than 32 base files" in error(tmp_path / "0.yaml")


def test_damaged_configs_raise_nothing_else(tmp_path):
    """Some hundred damages of a real config give one line, or a config."""
    chance = random.Random(7)
    lines = MICRO.read_text().splitlines(keepends=True)
    bits = [*NAMES, *"\0\n[]{}:\t'\"\\\ufffe", "- ", "? ", "  ", "!!int ", "&a ", "base: /dev/null",
            "9" * 5000, "1e999", "%YAML 9.9\n"]  # fmt: skip
    seen = set()
    for _ in range(200):
        text = "".join(chance.sample(lines, len(lines)) if chance.random() < 0.1 else lines)
        for _ in range(chance.randint(1, 3)):
            at, length = chance.randrange(len(text)), chance.choice([0, 0, 1, 5, 100])
            text = text[:at] + chance.choice(bits) + text[at + length :]
        try:
            load_config(write(tmp_path, text), [f"train.seed={chance.choice(bits)}"])
        except ConfigError as caught:
            seen.add(str(caught))
    assert len(seen) > 60
    assert all(message.isprintable() for message in seen)


def test_text_that_is_no_config_raises_nothing_else():
    chance = random.Random(8)
    for _ in range(2000):
        text = "".join(chance.choices("ab01 \n\t:-?!&*#[]{},'\"|>%@`~.<=\\_\u2028\x85", k=12))
        try:
            value, _ = parse(text)
        except NotOurYaml:
            continue
        assert parse(dump_plain(value))[0] == value if isinstance(value, dict) else True


def test_sections_that_are_none():
    for raw in ([], 3, {"model": 3}, {"model": {"name": "\udce9"}}, {"model": None}, {"a.b": 1}):
        with pytest.raises(ConfigError):
            validate(raw)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["learning-rate=1"], "unknown key 'learning-rate'"),
        (["=1"], "expected section.key=value"),
        (["data.batch_size=010"], "write 10"),
        (["--zero.stage=2"], "an override has no dashes: zero.stage=2"),
        (["--epochs", "3"], "unrecognized arguments: --epochs 3"),
    ],
)
def test_wrong_use_is_one_line_and_is_never_started_again(
    tmp_path, monkeypatch, capsys, words, part
):
    monkeypatch.setenv("SWIN_MOE_FINAL", str(tmp_path / "final"))
    monkeypatch.setattr("swin_moe.cli.main.quiet_libraries", lambda: None)
    try:
        code = main(["launch", "--on", "local", "--dry-run", str(MICRO), *words])
    except SystemExit as end:
        code = end.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line
    assert (tmp_path / "final").exists()
