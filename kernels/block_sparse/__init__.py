"""Products with block-sparse matrices, and expert layers made of them.

topology.py has which blocks are present; sdd.py, dsd.py and dds.py the products, autograd.py the same with
gradients; experts.py the dropless layer, whose rows have the columns of their expert. masks.py and masked.py
are of experts whose own matrices are block-sparse, masked_experts.py is their layer.
"""
