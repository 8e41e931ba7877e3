"""Readers of what holds images: folders, lists, zips, tar shards and Parquet.

Each is a ``Source`` (``data/source.py``): records by number, with a label each. Tables of records
are kept in an index beside the data or in the cache.
"""
