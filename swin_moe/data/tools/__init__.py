"""Commands on data: prepare shards, verify images, show what a model sees.

They work on the same sources as training does. They run on many processes and can be stopped and
started again.
"""
