"""The names of what a run folder holds besides its checkpoints."""

CONFIG = "config.yaml"
TOKENIZER = "tokenizer"  # a folder
