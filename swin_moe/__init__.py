"""Train Swin Transformer V2 and its Mixture-of-Experts variant."""

__version__ = "0.1.0"
