"""Who waits for whom: the flight recorder, heartbeats, and the diagnosis of a hang."""
