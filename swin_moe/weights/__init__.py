"""Weights of others in, ours out.

``files.py`` reads and writes files of weights without running any code in them, and ``adapters/``
translates the names of other libraries. ``pretrained.py`` fits weights to a model, ``convert.py``
to a file.
"""
