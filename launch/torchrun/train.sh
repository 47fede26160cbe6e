#!/usr/bin/env bash
# One node, one process per GPU (or NPROC processes on a CPU): launch/torchrun/train.sh <overrides>
exec torchrun --standalone --nproc-per-node "${NPROC:-gpu}" -m moetrain train "$@"
