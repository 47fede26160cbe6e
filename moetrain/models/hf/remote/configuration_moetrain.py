"""The config of a decoder trained with moetrain, for transformers with trust_remote_code=True."""

from transformers import PretrainedConfig


class MoetrainConfig(PretrainedConfig):
    """config.json has every key. ``router`` is what the model was trained with, ``routing`` what that does in
    evaluation, in the words of routing_moetrain.py."""

    model_type = "moetrain"
    keys_to_ignore_at_inference = ("past_key_values",)
    max_position_embeddings = None  # none is known
