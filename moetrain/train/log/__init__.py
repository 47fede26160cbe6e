"""The output of a run: metrics, progress, trackers."""
