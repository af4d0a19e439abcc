"""Attention of the CLS query alone, from separately projected queries, keys and values, for the last block.

Axis letters: see frozen_kernels.attention.qkv_layout.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def cls_attention(query_B1ND: Tensor, kv_BS2ND: Tensor) -> Tensor:
    """One query per head over all S tokens.

    On a CPU this uses sums of elementwise products, which are faster than PyTorch's attention for a single query.

    Args:
        query_B1ND: the query of CLS.
        kv_BS2ND: keys and values of all tokens, in the same dtype.

    Returns:
        [B, 1, E] in that dtype, E = N*D.
    """
    key_BSND, value_BSND = kv_BS2ND.unbind(2)
    if query_B1ND.device.type != "cpu":
        query, key, value = (rows.transpose(1, 2) for rows in (query_B1ND, key_BSND, value_BSND))
        return scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    scores_BSN1 = (query_B1ND.float() * key_BSND).sum(dim=-1, keepdim=True) * query_B1ND.shape[-1] ** -0.5
    return (scores_BSN1.softmax(dim=1) * value_BSND).sum(dim=1, keepdim=True).flatten(2).to(query_B1ND.dtype)
