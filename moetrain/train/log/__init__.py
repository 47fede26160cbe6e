"""What a run says: metrics, progress, trackers."""
