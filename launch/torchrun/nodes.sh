#!/usr/bin/env bash
# Several nodes without a batch system. The same line on each: HEAD=first-node NNODES=2 launch/torchrun/nodes.sh <overrides>
# NNODES=1:2 lets nodes leave and join; MAX_RESTARTS is the number of times that a failed round begins again.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
# Each round gets a store of its own: of one that earlier rounds share, torchrun does not tell nodes that join later.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
exec torchrun --nnodes "${NNODES:?how many nodes}" --nproc-per-node "${NPROC:-gpu}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:?the first node, as host or host:port}" --rdzv-id "${RUN_ID:-moetrain}" \
  --max-restarts "${MAX_RESTARTS:-0}" -m moetrain train "$@"
