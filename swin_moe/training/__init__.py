"""One run: the loop and all that it drives.

``trainer.py`` makes updates, evaluates and saves. ``engine.py`` is the only file that knows
DeepSpeed. The rest finds a batch that fits, agrees on bad updates and keeps the run directory.
"""
