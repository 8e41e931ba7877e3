"""Readers of images in folders, lists of files, zips, tar shards and parquet files.

Each reader is a ``Source`` (``data/files.py``): encoded images by number, with labels. The index of
tar shards is kept next to them or in the user's cache.
"""
