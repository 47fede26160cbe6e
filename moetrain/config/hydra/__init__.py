"""Composition by Hydra: groups, overrides, sweeps."""
