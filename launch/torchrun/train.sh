#!/usr/bin/env bash
# One node, one process per GPU (or NPROC processes on a CPU): launch/torchrun/train.sh <overrides>
# A batch system's warning (SIGUSR1) reaches the ranks, which save and stop.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" -m moetrain train "$@"
