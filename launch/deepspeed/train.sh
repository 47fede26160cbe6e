#!/usr/bin/env bash
# One node, one process per GPU (or NPROC processes): launch/deepspeed/train.sh <overrides>
# DeepSpeed's launcher gives ranks 30 seconds after SIGTERM or Ctrl-C: touch STOP in the run folder if a save takes longer.
PORT=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')} # a free one
exec deepspeed ${NPROC:+--num_gpus "$NPROC"} --master_port "$PORT" --module moetrain train engine=deepspeed "$@"
