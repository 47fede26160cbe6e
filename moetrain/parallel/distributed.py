"""Process groups as torchrun starts them, and the few collectives the trainer needs.

Without torchrun (or with one process) there is no process group and every function here is a no-op, so
callers never ask whether the run is distributed. CPU tensors always travel over gloo, CUDA ones over nccl.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from moetrain.errors import UserError
from moetrain.parallel.interface import choose_interface
from moetrain.parallel.meeting import meet
from moetrain.parallel.watchdog.flight_recorder import watched

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_VISIBLE = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
_prefix = ""  # of this start's keys in the store


def init_from_env(timeout: float = 600.0, device: str = "cpu") -> None:
    """Join the process group that torchrun's variables describe; does nothing for one process.

    ``timeout`` (seconds) bounds the start and every collective. With ``device="cuda"`` the process takes
    the GPU of its local rank. Raises UserError where a variable is missing or not a number, or where the
    other ranks cannot be reached in time.
    """
    global _prefix
    if dist.is_initialized():
        return
    size = _env_int("WORLD_SIZE", 1)
    if device == "cuda":
        torch.cuda.set_device(_own_gpu())
    if size == 1:
        return
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE={size} but {', '.join(missing)} unset: start the ranks with torchrun, or set them"
        )
    own = _env_int("RANK", 0)
    if not 0 <= own < size:
        raise UserError(f"RANK={own} does not lie below WORLD_SIZE={size}: start the ranks with torchrun")
    if local_world() == size and any(name == "lo" for _, name in socket.if_nameindex()):
        # All ranks share this machine: do not depend on its host name resolving.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        choose_interface(os.environ["MASTER_ADDR"])
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    limit = timedelta(seconds=timeout)
    try:
        store = run_store(timeout, serve=own == 0 and not agent_serves())
        _prefix = meet(store, own, size, timeout)
        inner = PrefixStore(_prefix, store)
        dist.init_process_group(backend, store=inner, rank=own, world_size=size, timeout=limit)
    except (dist.DistError, RuntimeError, OSError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"rank {own} of {size} could not join the others at {address} (MASTER_ADDR:MASTER_PORT) "
            f"within {timeout:g} s: {reason}; start all {size} ranks, or correct the address"
        ) from error


def run_store(seconds: float, serve: bool = False) -> TCPStore:
    """A client of the run's store, with a time-out of ``seconds`` a request. ``serve``: start the store too.

    Raises DistError if the store cannot be reached, UserError if MASTER_PORT is not a number.
    """
    host, port = os.environ["MASTER_ADDR"], _env_int("MASTER_PORT", 0)
    limit = timedelta(seconds=seconds)
    return TCPStore(host, port, is_master=serve, timeout=limit, wait_for_workers=False, multi_tenant=serve)


def agent_serves() -> bool:
    """Whether torchrun's process serves the run's store; if not, rank 0 does, and it ends with rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def start_prefix() -> str:
    """The prefix of this start's keys in the run's store, which outlives a restart."""
    return _prefix


def new_gloo_group(timeout: timedelta, ranks: list[int] | None = None) -> dist.ProcessGroup:
    """A new gloo group of ``ranks`` (None: all). All ranks of the run must call it; the watchdog sees it."""
    with watched("a new process group", ""):
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's number in ``group`` (None: all ranks), 0 to ``world(group)`` - 1."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def world(group: dist.ProcessGroup | None = None) -> int:
    """The number of processes in ``group``, None: in the run."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return _env_int("LOCAL_RANK", 0)


def local_world() -> int:
    """The number of processes on this machine."""
    return _env_int("LOCAL_WORLD_SIZE", 1)


def is_main() -> bool:
    """True on the one process that prints and writes what all ranks share."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank has come here. Over gloo, so that a GPU's queue is not drained."""
    if dist.is_initialized():
        with watched("a barrier"):
            dist.all_reduce(torch.zeros(1))


def all_reduce_sum_(*tensors: Tensor, name: str = "a sum", group: dist.ProcessGroup | None = None) -> None:
    """Sum every tensor over ``group`` (None: all ranks) in place, in one collective per dtype and device.

    Shapes and dtypes must agree across ranks. All ranks get the same bits. ``name``: for the watchdog's
    report, what is summed.
    """
    if not dist.is_initialized():
        return
    kinds = dict.fromkeys((t.dtype, t.device) for t in tensors)
    for kind in kinds:
        _sum_flat_([t for t in tensors if (t.dtype, t.device) == kind], name, group)


def _sum_flat_(tensors: Iterable[Tensor], name: str, group: dist.ProcessGroup | None) -> None:
    tensors = list(tensors)
    flat = torch.cat([t.detach().reshape(-1) for t in tensors])
    with watched(name, group=group):
        dist.all_reduce(flat, group=group)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.detach().copy_(part.view_as(tensor))


def broadcast_object(value: Any, src: int = 0) -> Any:
    """``value`` of rank ``src`` on every rank. It travels as JSON, so tuples come back as lists, also on
    ``src`` and on one process. Raises TypeError on ``src`` and RuntimeError elsewhere if it is not JSON.
    """
    if not dist.is_initialized():
        return json.loads(json.dumps(value))
    error: Exception | None = None
    data = b""
    if rank() == src:
        try:
            data = json.dumps(value).encode()
        except (TypeError, ValueError) as raised:
            error = raised
    size = torch.tensor([-1 if error else len(data)])
    with watched("a value of one rank", "broadcast"):
        dist.broadcast(size, src)
    if error:
        raise error
    if int(size) < 0:
        raise RuntimeError(f"rank {src} had no JSON value to broadcast")
    buffer = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if data
        else torch.empty(int(size), dtype=torch.uint8)
    )
    with watched("a value of one rank", "broadcast"):
        dist.broadcast(buffer, src)
    return json.loads(bytes(buffer.tolist()))


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _own_gpu() -> int:
    """The number of this rank's GPU; a launcher that shows each rank one GPU alone makes it number 0."""
    seen = torch.cuda.device_count()
    if seen == 1 and any(name in os.environ for name in _VISIBLE):
        return 0
    if local_rank() >= seen:
        raise UserError(
            f"LOCAL_RANK={local_rank()}, but {seen} GPU(s) can be seen here: start one rank a GPU, "
            "or take train.device=cpu"
        )
    return local_rank()


def _env_int(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}={text!r} is not a whole number: start the ranks with torchrun") from None
