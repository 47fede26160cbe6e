"""The config of a decoder trained with moetrain, for transformers with trust_remote_code=True."""

from transformers import PretrainedConfig


class MoetrainConfig(PretrainedConfig):
    """config.json has every key; the names are transformers' own where it has one.

    ``router`` is what the model was trained with, ``routing`` what that does in evaluation, in the words of
    modeling_moetrain.py. Layers l from ``first_dense`` on with (l + 1) % ``moe_every`` == 0 have experts.
    ``expert_kind`` adapters: bottlenecks on the output of a network that all tokens share.
    """

    model_type = "moetrain"
    keys_to_ignore_at_inference = ("past_key_values",)
    max_position_embeddings = None  # none is known
