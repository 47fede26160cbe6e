"""Routers by name. Importing a router's module registers it."""

from moetrain.moe.routers import adaptive as adaptive
from moetrain.moe.routers import base_layers as base_layers
from moetrain.moe.routers import blockffn as blockffn
from moetrain.moe.routers import comet as comet
from moetrain.moe.routers import competesmoe as competesmoe
from moetrain.moe.routers import cosine as cosine
from moetrain.moe.routers import dense as dense
from moetrain.moe.routers import domain as domain
from moetrain.moe.routers import dselect_k as dselect_k
from moetrain.moe.routers import dynmoe as dynmoe
from moetrain.moe.routers import emo as emo
from moetrain.moe.routers import evomoe as evomoe
from moetrain.moe.routers import expert_choice as expert_choice
from moetrain.moe.routers import grouped as grouped
from moetrain.moe.routers import gshard as gshard
from moetrain.moe.routers import gw as gw
from moetrain.moe.routers import hashed as hashed
from moetrain.moe.routers import hyper as hyper
from moetrain.moe.routers import mask as mask
from moetrain.moe.routers import module_former as module_former
from moetrain.moe.routers import moec as moec
from moetrain.moe.routers import moepp as moepp
from moetrain.moe.routers import multi_hash as multi_hash
from moetrain.moe.routers import noisy_topk as noisy_topk
from moetrain.moe.routers import prototypes as prototypes
from moetrain.moe.routers import random as random
from moetrain.moe.routers import relu as relu
from moetrain.moe.routers import sam as sam
from moetrain.moe.routers import scot as scot
from moetrain.moe.routers import sigma as sigma
from moetrain.moe.routers import sigmoid as sigmoid
from moetrain.moe.routers import similarity as similarity
from moetrain.moe.routers import sinkhorn as sinkhorn
from moetrain.moe.routers import sparsemixer as sparsemixer
from moetrain.moe.routers import stable as stable
from moetrain.moe.routers import switch as switch
from moetrain.moe.routers import temperature as temperature
from moetrain.moe.routers import thor as thor
from moetrain.moe.routers import threshold as threshold
from moetrain.moe.routers import topk as topk
from moetrain.moe.routers import vq as vq
from moetrain.moe.routers import words as words
from moetrain.moe.routers.base import (
    ROUTERS,
    LinearRouter,
    Router,
    RouterSpec,
    build_router,
    full_options,
    register,
    resolve_top_k,
)  # fmt: skip

__all__ = [
    "ROUTERS", "LinearRouter", "Router", "RouterSpec", "build_router", "full_options", "register",
    "resolve_top_k",
]  # fmt: skip
