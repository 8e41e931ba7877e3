"""The program: it answers signals before it imports the rest."""

from .signals import watch


def entry() -> None:
    watch()
    from . import cli

    cli.entry()


if __name__ == "__main__":
    entry()
