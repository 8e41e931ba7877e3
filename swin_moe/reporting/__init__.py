"""Figures of a run as people read them.

``metric_log.py`` writes JSONL and TensorBoard, ``tables.py`` prints the header and the result.
``plots.py`` draws ``summary.png``, and ``profiler.py`` splits the time of an update.
"""
