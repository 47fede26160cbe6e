"""Checkpoints: named tensors with global shapes, a manifest, and JSON of everything else."""
