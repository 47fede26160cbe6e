"""To be imported before torch: OpenMP's threads then wait as ``moetrain train`` has them wait."""

from moetrain.parallel.cores import choose_waiting

choose_waiting(local_ranks=1)
