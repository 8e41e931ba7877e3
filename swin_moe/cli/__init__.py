"""The command line: ``swin-moe``, ``python -m swin_moe``, and under torchrun.

``parser.py`` knows the words, ``main.py`` runs a command and turns an error into one line and an
exit code. A command imports what it needs when it runs, so that most of them start at once.
"""
