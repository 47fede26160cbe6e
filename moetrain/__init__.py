"""moetrain: a Mixture-of-Experts language model trainer on torch.distributed."""

__version__ = "0.1.0"
