"""The program: it answers signals before it imports the rest."""

from .signals import watch
from .writing import open_streams


def entry() -> None:
    watch()
    open_streams()
    from . import cli

    cli.entry()


if __name__ == "__main__":
    entry()
