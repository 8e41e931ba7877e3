"""The program: handles signals before it imports the rest."""

from .common.signals import watch
from .common.writing import open_streams


def entry() -> None:
    watch()
    open_streams()
    from .cli import main

    main.entry()


if __name__ == "__main__":
    entry()
