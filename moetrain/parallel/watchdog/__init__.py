"""Detection of hangs: the flight recorder, the heartbeats of the ranks, and the diagnosis."""
