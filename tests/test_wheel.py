"""The package works away from a clone: the files that a wheel packs, run from another folder."""

import shutil
import subprocess
import sys

import pytest

from swin_moe.common import shipped
from tests.parallel import ROOT, SMALL, environment, one_error, swin_moe

MICRO = "fashion_mnist/swin_moe_micro"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel packs. The compiled ops are those of the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    words = ["egg_info", "--egg-base", folder, "build_py", "--build-lib", folder / "lib"]
    subprocess.run(
        [sys.executable, "setup.py", "-q", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return folder / "lib"


@pytest.fixture
def away(installed, tmp_path):
    """Run the command line of the installed package in an empty folder."""

    def run(*words):
        return swin_moe(*words, fresh=True, folder=tmp_path, PYTHONPATH=str(installed))

    return run


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}


def test_it_carries_recipes_scripts_and_data(installed):
    package = installed / "swin_moe"
    assert files(package / "recipes") == files(ROOT / "configs")
    for script in (ROOT / "launch").iterdir():
        carried = package / "launch" / script.name
        assert carried.read_bytes() == script.read_bytes()
        assert carried.stat().st_mode & 0o111 == script.stat().st_mode & 0o111
    for path in ("cli/models.json", "data/fashion_mnist/classes.txt", "py.typed"):
        assert (package / path).is_file()


def test_a_clone_has_them_next_to_the_package():
    assert shipped.recipes() == ROOT / "configs"
    assert shipped.launch_scripts() == ROOT / "launch"


def test_it_lists_its_recipes_and_models(away):
    assert MICRO in away("recipes").stdout
    assert "swinv2_tiny" in away("models").stdout


def test_it_trains_a_recipe_by_its_name(away, tmp_path):
    done = away("train", MICRO, *SMALL, "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/swin_moe_micro/checkpoints").is_dir()
    assert "no such config file or recipe" in one_error(away("train", f"{MICRO}s"))


def test_it_launches_two_processes(away, installed, tmp_path):
    words = ["launch", "--on", "local", "--cpu", "--gpus-per-node", "2", MICRO]
    planned = away(*words, "--dry-run")
    assert planned.stdout.startswith(f"{sys.executable} -m swin_moe.launch.torchrun"), planned
    done = away(*words, *SMALL, "train.max_steps=1")
    assert done.returncode == 0, done.stderr
    assert "2 processes" in done.stdout
    assert (tmp_path / "runs/swin_moe_micro/checkpoints").is_dir()


def test_slurm_runs_a_copy_of_its_script(away, installed, tmp_path):
    words = ["launch", "--on", "slurm", "--cpu", "--gpus-per-node", "2", MICRO, "--dry-run"]
    root = f"SWIN_MOE_ROOT={installed}/swin_moe"
    python = f"SWIN_MOE_PYTHON={sys.executable}"
    printed = away(*words).stdout
    assert printed.startswith(f"env {python} {root} sbatch ")
    assert f"{installed}/swin_moe/launch/slurm.sbatch --processes 2 {MICRO}" in printed
    copy = shutil.copy(installed / "swin_moe/launch/slurm.sbatch", tmp_path / "slurm_script")

    def run(*variables):
        return subprocess.run(
            ["env", *variables, copy, "--dry-run", MICRO],
            cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip

    assert f"{sys.executable} -m swin_moe.launch.torchrun" in run(python, root).stdout
    lost = run(python, f"SLURM_SUBMIT_DIR={tmp_path}")
    assert lost.returncode == 2
    assert lost.stderr.startswith(f"slurm.sbatch: error: no launch/common.sh in {tmp_path}: set ")


def test_a_script_alone_runs_the_python_of_its_environment(installed, tmp_path):
    package = tmp_path / "lib/python3.12/site-packages/swin_moe"
    shutil.copytree(installed / "swin_moe/launch", package / "launch")
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    done = subprocess.run(
        [package / "launch/local.sh", "--dry-run", MICRO],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"{python} -m swin_moe.launch.torchrun")
