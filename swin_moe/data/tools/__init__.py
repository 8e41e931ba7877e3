"""The commands ``prepare-data`` and ``data verify``.

They read the same sources as training, on many processes. ``prepare-data`` goes on after a stop.
"""
