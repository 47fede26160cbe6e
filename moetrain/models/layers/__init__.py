"""Feed-forward layers without a dispatch of tokens; each file registers its own."""

from moetrain.models.layers import product_keys as product_keys
