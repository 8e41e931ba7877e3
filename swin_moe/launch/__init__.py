"""The command ``swin-moe launch`` and the agent that starts the ranks of a node.

``command.py`` checks a request and calls a script of ``launch/``. ``torchrun.py`` is torch's
launcher with our agent: ranks are forked from one process, and their exit codes are explained.
"""
