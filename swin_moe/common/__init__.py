"""Helpers that every other folder may use.

They make text printable, read and write files within bounds, and know the host, its ranks and its
signals. They import nothing from the rest of the package. None of them imports torch at its top.
"""
