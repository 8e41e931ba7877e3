"""Reading, translating and writing files of weights, ours and those of other programs.

``files.py`` reads and writes files of weights without running any code in them, and ``adapters/``
translates the names of other libraries. ``pretrained.py`` loads weights into a model, and
``convert.py`` writes them in another dialect.
"""
