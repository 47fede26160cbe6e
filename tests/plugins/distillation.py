"""A plug-in task: ``plugins=[distillation]``, ``train.task=distillation``.

The loss is the Kullback-Leibler divergence from what another model says of each position that has a label
(Hinton et al. 2015, arXiv:1503.02531). The teacher is fixed: a small dense decoder, drawn from its own seed.

Shapes: B batch, S sequence, D model, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.data import IGNORE
from moetrain.models.decoder import Decoder
from moetrain.models.options import ModelConfig
from moetrain.moe.options import ExpertsConfig, RouterConfig
from moetrain.parallel.materialize import draw
from moetrain.train.task import Inputs, Task, register_task
from moetrain.train.unloaded import unloaded_decoder

TEACHER = ModelConfig(d_model=7, num_layers=1, num_heads=1, head_dim=4, d_ff=11, num_experts=0, init_std=1.0)
SEED = 3


@register_task("distillation")
class Distillation(Task):
    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        wide = model.embed_VD.dtype == torch.float64
        teacher = unloaded_decoder(TEACHER, RouterConfig(), ExpertsConfig(), model.vocab_size, wide)
        draw(teacher, SEED)
        self._teacher = (teacher.requires_grad_(False),)  # in a tuple: no parameters of the task

    def loss_sum(self, hidden_BSD: Tensor, inputs: Inputs) -> Tensor:
        teacher = self._teacher[0].to(hidden_BSD.device)
        ids_BS, labels_BS, doc_ids_BS, positions_BS, documents = inputs
        theirs_BSD = teacher(ids_BS, None, doc_ids_BS, positions_BS, None, documents).hidden_BSD
        wide = torch.promote_types(hidden_BSD.dtype, torch.float32)
        theirs_BSV = teacher.logits(theirs_BSD).to(wide).log_softmax(-1)
        ours_BSV = self.model.logits(hidden_BSD).to(wide).log_softmax(-1)
        kl_BS = (theirs_BSV.exp() * (theirs_BSV - ours_BSV)).sum(-1)
        return kl_BS[labels_BS != IGNORE].sum()
