"""Faster paths on a CPU: products by oneDNN, experts one at a time."""
