"""NetVLAD: aggregates a set of vectors to one vector (Arandjelovic et al. 2016, in the form of Miech et al. 2018).

Axis letters: B sets, N vectors of a set, D their width, K clusters, G ghost clusters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from frozen_fast.models.experts.batch_norm import BatchNorm


class NetVLAD(nn.Module):
    """Sums each cluster's residuals over a set.

    a = softmax(BN(x A)) over K + G clusters, of which the G ghost clusters are then dropped; V_dk = sum_n a_nk (x_nd -
    C_dk); each cluster is L2-normalised, then the whole vector.

    Attributes:
        clusters: A, [D, K + G].
        clusters2: C, [1, D, K] (the released name).
    """

    def __init__(self, width: int, clusters: int, ghost_clusters: int = 0, *, mask_padding: bool = False) -> None:
        """Initialise random clusters.

        Args:
            width: D.
            clusters: K.
            ghost_clusters: G.
            mask_padding: exclude rows of zeros. The released models include them.
        """
        super().__init__()
        self.width, self.num_clusters, self.mask_padding = width, clusters, mask_padding
        scale = 1 / math.sqrt(width)
        self.clusters = nn.Parameter(scale * torch.randn(width, clusters + ghost_clusters))
        self.clusters2 = nn.Parameter(scale * torch.randn(1, width, clusters))
        self.batch_norm = BatchNorm(clusters + ghost_clusters)

    @property
    def out_width(self) -> int:
        """K x D, the width of the output."""
        return self.num_clusters * self.width

    def forward(self, x_BND: Tensor) -> Tensor:
        """Aggregate sets.

        Args:
            x_BND: [B, N, D], zero-padded.

        Returns:
            [B, D x K], D first, L2-normalised.
        """
        sets, size, width = x_BND.shape
        scores = self.batch_norm(x_BND.reshape(-1, width) @ self.clusters)
        share_BNK = scores.softmax(dim=1)[:, : self.num_clusters].view(sets, size, -1)
        if self.mask_padding:
            share_BNK = share_BNK * (x_BND != 0).any(dim=2, keepdim=True)
        vlad_BDK = x_BND.transpose(1, 2) @ share_BNK - share_BNK.sum(dim=1, keepdim=True) * self.clusters2
        return F.normalize(F.normalize(vlad_BDK, dim=1).reshape(sets, -1), dim=1)
