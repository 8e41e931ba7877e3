"""Logs, tables and pictures of a run.

``metric_log.py`` writes JSONL and TensorBoard, and ``tables.py`` prints header and result.
``plots.py`` draws ``summary.png``, ``contact_sheet.py`` draws the data, and ``profiler.py`` splits
the time of an update.
"""
