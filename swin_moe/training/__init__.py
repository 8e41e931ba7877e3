"""The parts of a training run.

``trainer.py`` has the loop, ``engine.py`` wraps DeepSpeed, and ``checkpointer.py`` saves and
restores the run's state. The other files find a micro-batch that fits, agree on bad updates, and
manage inputs, optimizer and run directory.
"""
