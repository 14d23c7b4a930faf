"""Parents of a token tree -> depths and attention mask. Shapes as in round.py."""

import torch
from torch import Tensor


def depths(parents_BN: Tensor) -> Tensor:
    """Depth of root and nodes, [B, M]: the root's is 0, a child's its parent's plus one."""
    return ancestors(parents_BN).sum(-1) - 1


def ancestors(parents_BN: Tensor) -> Tensor:
    """Boolean [B, M, M]: entry (i, j) says that j is i or an ancestor of i (root first)."""
    B, N = parents_BN.shape
    reach_BMM = torch.eye(N + 1, device=parents_BN.device).repeat(B, 1, 1)
    reach_BMM[:, 1:].scatter_(2, parents_BN[..., None] + 1, 1.0)
    for _ in range(N.bit_length()):  # each time twice as far up
        reach_BMM = (reach_BMM @ reach_BMM).clamp(max=1)
    return reach_BMM.bool()
