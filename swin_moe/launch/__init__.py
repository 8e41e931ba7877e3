"""The command ``swin-moe launch`` and the agent that starts the ranks of a node.

``command.py`` checks a request and calls a script of ``launch/``. ``torchrun.py`` is torch's
launcher with the agent of ``elastic.py``, which forks the ranks from one process; ``nodes.py`` and
``rendezvous.py`` bring the nodes together.
"""
