"""The gated delta rule: a matrix of state a head, which each token decays and corrects.

    S_t = exp(g_t) S_(t-1);  S_t += k_t (beta_t (v_t - k_t S_t));  y_t = q_t S_t

Shapes: B batch, S sequence, N heads, K key width, V value width, M chunks, C tokens of a chunk; U = V + K.
A run is a document's tokens, one after the other: where a row's number of the run changes, the state starts
anew. Run 0 goes on from the state that is given.

Sources: Yang et al. 2024, "Gated Delta Networks: Improving Mamba2 with Delta Rule", arXiv:2412.06464;
the form by chunks: Yang et al. 2024, "Parallelizing Linear Transformers with the Delta Rule over Sequence
Length", arXiv:2406.06484.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


def runs_of(doc_ids_BS: Tensor) -> Tensor:
    """int64 [B, S]: how often the id has changed before each token of its row, without a wait."""
    runs_BS = torch.zeros_like(doc_ids_BS, dtype=torch.int64)
    runs_BS[:, 1:] = (doc_ids_BS[:, 1:] != doc_ids_BS[:, :-1]).cumsum(1)
    return runs_BS


def recurrent_delta_rule(
    q_BSNK: Tensor,
    k_BSNK: Tensor,
    v_BSNV: Tensor,
    g_BSN: Tensor,
    beta_BSN: Tensor,
    runs_BS: Tensor | None = None,
    state_BNKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y [B, S, N, V], the state after the last token), token by token; g is 0 at most."""
    state_BNKV = _first_state(k_BSNK, v_BSNV, state_BNKV)
    decay_BSN = g_BSN.exp()
    if runs_BS is not None:
        before_BS = F.pad(runs_BS[:, :-1], (1, 0))
        decay_BSN = decay_BSN * (runs_BS == before_BS)[..., None]
    ys = []
    for t in range(q_BSNK.shape[1]):
        state_BNKV = state_BNKV * decay_BSN[:, t, :, None, None]
        k_BN1K = k_BSNK[:, t, :, None]
        wrong_BN1V = v_BSNV[:, t, :, None] - k_BN1K @ state_BNKV
        state_BNKV = state_BNKV + k_BN1K.mT @ (wrong_BN1V * beta_BSN[:, t, :, None, None])
        ys.append(q_BSNK[:, t, :, None] @ state_BNKV)
    return torch.cat(ys, 2).transpose(1, 2), state_BNKV


def chunked_delta_rule(
    q_BSNK: Tensor,
    k_BSNK: Tensor,
    v_BSNV: Tensor,
    g_BSN: Tensor,
    beta_BSN: Tensor,
    runs_BS: Tensor | None = None,
    state_BNKV: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """:func:`recurrent_delta_rule` by products of matrices, one step for each ``chunk`` tokens.

    Within a chunk the corrections d of its tokens solve (I + A) d = beta (v - decayed k S), where A has
    beta_i (k_i . k_j) and the decay between the two below the diagonal. The last chunk is filled up with
    tokens that change nothing.
    """
    seq = q_BSNK.shape[1]
    chunk = min(chunk, seq)
    state_BNKV = _first_state(k_BSNK, v_BSNV, state_BNKV)
    q_BNMCK, k_BNMCK, v_BNMCV = (_in_chunks(x, chunk) for x in (q_BSNK, k_BSNK, v_BSNV))
    g_BNMC, beta_BNMC1 = (_in_chunks(x[..., None], chunk) for x in (g_BSN, beta_BSN))
    within_BNMCC, start_BNMC1 = _decays(g_BNMC[..., 0], None if runs_BS is None else _padded(runs_BS, chunk))
    a_BNMCC = (k_BNMCK @ k_BNMCK.mT * within_BNMCC).tril(-1) * beta_BNMC1
    right_BNMCU = torch.cat([v_BNMCV, k_BNMCK * start_BNMC1], -1) * beta_BNMC1
    solved_BNMCU = torch.linalg.solve_triangular(a_BNMCC, right_BNMCU, upper=False, unitriangular=True)
    alone_BNMCV, read_BNMCK = solved_BNMCU.split([v_BSNV.shape[-1], k_BSNK.shape[-1]], -1)
    weights_BNMCC = q_BNMCK @ k_BNMCK.mT * within_BNMCC
    from_start_BNMCK = q_BNMCK * start_BNMC1
    to_end_BNMKC = (k_BNMCK * within_BNMCC[..., -1, :, None]).mT
    whole_BNM11 = start_BNMC1[..., -1:, :]
    ys = []
    for m in range(q_BNMCK.shape[2]):
        d_BNCV = alone_BNMCV[:, :, m] - read_BNMCK[:, :, m] @ state_BNKV
        ys.append(from_start_BNMCK[:, :, m] @ state_BNKV + weights_BNMCC[:, :, m] @ d_BNCV)
        state_BNKV = state_BNKV * whole_BNM11[:, :, m] + to_end_BNMKC[:, :, m] @ d_BNCV
    return torch.cat(ys, 2)[:, :, :seq].transpose(1, 2), state_BNKV


def _first_state(k_BSNK: Tensor, v_BSNV: Tensor, state_BNKV: Tensor | None) -> Tensor:
    if state_BNKV is not None:
        return state_BNKV.to(v_BSNV.dtype)
    batch, _, heads, width = k_BSNK.shape
    return v_BSNV.new_zeros(batch, heads, width, v_BSNV.shape[-1])


def _in_chunks(x_BSNX: Tensor, chunk: int) -> Tensor:
    """[B, N, M, C, X]; zeros at the end."""
    x_BNSX = F.pad(x_BSNX.transpose(1, 2), (0, 0, 0, -x_BSNX.shape[1] % chunk))
    x_BNMCX: Tensor = x_BNSX.unflatten(2, (-1, chunk))
    return x_BNMCX


def _padded(runs_BS: Tensor, chunk: int) -> Tensor:
    """[B, M, C]; what fills up the last chunk belongs to the last run."""
    fill = runs_BS[:, -1:].expand(-1, -runs_BS.shape[1] % chunk)
    runs_BMC: Tensor = torch.cat([runs_BS, fill], 1).unflatten(1, (-1, chunk))
    return runs_BMC


def _decays(g_BNMC: Tensor, runs_BMC: Tensor | None) -> tuple[Tensor, Tensor]:
    """What is left at token i of what token j wrote [.., i, j], and of the state before the chunk [.., i, 1].

    The exponents are sums of one sign: a difference of two running sums would cancel.
    """
    chunk = g_BNMC.shape[-1]
    lower_CC = g_BNMC.new_ones(chunk, chunk).tril()
    between_BNMCC = (g_BNMC[..., None] * lower_CC.tril(-1)).cumsum(-2)
    within_BNMCC, start_BNMC = between_BNMCC.exp() * lower_CC, g_BNMC.cumsum(-1).exp()
    if runs_BMC is not None:
        before_BM = F.pad(runs_BMC[:, :-1, -1], (1, 0))
        within_BNMCC = within_BNMCC * (runs_BMC[..., None] == runs_BMC[..., None, :])[:, None]
        start_BNMC = start_BNMC * (runs_BMC == before_BM[..., None])[:, None]
    return within_BNMCC, start_BNMC[..., None]
