"""A router's scores, top-k choice and weights in one kernel, forward and backward."""
