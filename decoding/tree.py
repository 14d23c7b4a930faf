"""Parents of a token tree -> depths and attention mask. Shapes as in round.py."""

import torch
from torch import Tensor


def depths(parents_BN: Tensor) -> Tensor:
    """Depth of root and nodes, [B, M]: the root's is 0, a child's its parent's plus one."""
    B, N = parents_BN.shape
    depth_BM = torch.zeros(B, N + 1, dtype=torch.long, device=parents_BN.device)
    for n in range(N):
        parent_B1 = parents_BN[:, n : n + 1] + 1
        depth_BM[:, n + 1] = depth_BM.gather(1, parent_B1)[:, 0] + 1
    return depth_BM


def ancestors(parents_BN: Tensor) -> Tensor:
    """Boolean [B, M, M]: entry (i, j) says that j is i or an ancestor of i (root first)."""
    B, N = parents_BN.shape
    mask_BMM = torch.eye(N + 1, dtype=torch.bool, device=parents_BN.device).repeat(B, 1, 1)
    rows = torch.arange(B, device=parents_BN.device)
    for n in range(N):
        mask_BMM[:, n + 1] |= mask_BMM[rows, parents_BN[:, n] + 1]
    return mask_BMM
