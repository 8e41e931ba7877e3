"""The command line: ``swin-moe``, ``python -m swin_moe``, and under torchrun.

``parser.py`` parses the words. ``main.py`` runs a command of ``runs.py``, ``models.py``,
``checkpoints.py`` or ``data.py``, and turns an error into one line and an exit code. A command
imports what it needs when it runs, so that most commands start at once.
"""
