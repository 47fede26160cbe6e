#!/usr/bin/env bash
# Several nodes, without ssh between them. On each: NODE_RANK=0 launch/deepspeed/nodes.sh <overrides>, from 0 up.
# HOSTFILE lists the nodes and their processes, and the first is where ranks meet unless HEAD says another address.
hostfile=${HOSTFILE:-$(dirname "$0")/hostfile}
head=$(grep -v -m 1 -e '^ *#' -e '^ *$' "$hostfile" | cut -d ' ' -f 1)
exec deepspeed --hostfile "$hostfile" --no_ssh --node_rank "${NODE_RANK:?the number of this node in $hostfile, from 0}" \
  --master_addr "${HEAD:-$head}" --master_port "${PORT:-29500}" --module moetrain train engine=deepspeed "$@"
