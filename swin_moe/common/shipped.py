"""The plain files that come with the package: recipes and launch scripts.

A clone has them next to the package, in ``configs/`` and ``launch/``. A wheel carries copies inside
the package, which ``setup.py`` puts there.
"""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def recipes() -> Path:
    """Return the folder of the recipes."""
    carried = PACKAGE / "recipes"
    return carried if carried.is_dir() else PACKAGE.parent / "configs"


def launch_scripts() -> Path:
    """Return the folder of the launch scripts; its name is ``launch`` in both places."""
    carried = PACKAGE / "launch"
    return carried if (carried / "common.sh").is_file() else PACKAGE.parent / "launch"
