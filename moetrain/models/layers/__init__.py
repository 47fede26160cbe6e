"""Feed-forward layers without a dispatch of tokens; each file registers its own."""

from moetrain.models.layers import avg_k as avg_k
from moetrain.models.layers import merging as merging
from moetrain.models.layers import moe_x as moe_x
from moetrain.models.layers import monet as monet
from moetrain.models.layers import product_keys as product_keys
from moetrain.models.layers import s2moe as s2moe
