"""The engine ``deepspeed``: DeepSpeed's ZeRO behind the interface of :mod:`moetrain.train.engine`."""
