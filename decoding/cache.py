"""A preallocated key/value cache whose rows have lengths of their own and that keeps one tree path.

Shapes: B batch, H key/value heads, C capacity, M tokens of a pass, W slots that a pass sees.
"""

import torch
from torch import Tensor

GROWTH = 256  # slots added at once when a cache is too small


class Cache:
    """Keys and values of the committed tokens, with room for the pass at hand.

    `length[b]` tokens of row b are committed; what lies behind them is scratch, overwritten by the
    next pass, so that rejecting a draft costs nothing. A pass is `open(M)`, one `update` a layer
    (called by the model's attention) and `keep`.
    """

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.length = [0] * rows
        self.rows, self.capacity = rows, capacity
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._write: tuple[Tensor, Tensor] | None = None
        self._begin = self._width = 0

    def open(self, tokens: int, device: torch.device, after: int = 0) -> None:
        """Announces a pass over `tokens` new tokens a row, written behind each row's length and
        behind `after` scratch tokens that earlier passes over the same draft wrote there."""
        self._begin, longest = min(self.length) + after, max(self.length)
        self._width = longest + after + tokens
        if self._width > self.capacity:
            self._grow(self._width + GROWTH)
        self._write = self._where(tokens, device, after)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Stores [B, H, M, d] and returns what the pass attends to, [B, H, W, d]."""
        store_k, store_v = self._keys[layer], self._values[layer]
        if store_k is None or store_v is None:
            store_k, store_v = self._allocate(layer, keys, values)
        if self._write is None:
            store_k[:, :, self._begin : self._width] = keys
            store_v[:, :, self._begin : self._width] = values
        else:
            rows, slots = self._write
            store_k[rows, :, slots] = keys.transpose(1, 2)
            store_v[rows, :, slots] = values.transpose(1, 2)
        return store_k[:, :, : self._width], store_v[:, :, : self._width]

    def mask(self, allowed_BMA: Tensor) -> Tensor:
        """Boolean [B, 1, M, W]: all committed slots, and behind them what `allowed` says of the
        A = after + M scratch slots, the pass's own last."""
        B, M, A = allowed_BMA.shape
        device = allowed_BMA.device
        if self._write is None:
            mask = torch.ones(B, 1, M, self._width, dtype=torch.bool, device=device)
            mask[:, 0, :, self._width - A :] = allowed_BMA
            return mask
        length_B1 = torch.tensor(self.length, device=device)[:, None]
        slot_W = torch.arange(self._width, device=device)
        own_BW = slot_W - length_B1  # index among the scratch slots; negative: committed
        index = own_BW.clamp(0, A - 1)[:, None, :].expand(B, M, self._width)
        own = allowed_BMA.gather(2, index) & (own_BW < A)[:, None, :]
        return (own | (own_BW < 0)[:, None, :])[:, None]

    def causal(self, rows: int, tokens: int, device: torch.device, after: int = 0) -> Tensor:
        """`mask` for a pass whose tokens follow each other and `after` scratch tokens."""
        if tokens == 1 and self._write is None:  # every slot stands before the token, or is its own
            return torch.ones(rows, 1, 1, self._width, dtype=torch.bool, device=device)
        tril = torch.ones(tokens, after + tokens, dtype=torch.bool, device=device).tril(after)
        return self.mask(tril.expand(rows, -1, -1))

    def keep(self, path: list[list[int]], is_chain: bool) -> None:
        """Commits, of the pass just made, the root and the nodes of each row's path."""
        if not is_chain:
            for b, nodes in enumerate(path):
                if nodes != list(range(len(nodes))):
                    self._gather(b, nodes)
        for b, nodes in enumerate(path):
            self.length[b] += 1 + len(nodes)

    def select(self, rows: list[int]) -> None:
        """Keeps some of the rows."""
        self.length, self.rows = [self.length[r] for r in rows], len(rows)
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    store[layer] = tensor[torch.tensor(rows, device=tensor.device)]

    def _where(self, tokens: int, device: torch.device, after: int) -> tuple[Tensor, Tensor] | None:
        """Where a pass writes: rows [B, 1] and each row's slots [B, M]; None: all rows at one."""
        if min(self.length) == max(self.length):
            return None
        return self._scattered(tokens, device, after)

    def _scattered(self, tokens: int, device: torch.device, after: int) -> tuple[Tensor, Tensor]:
        start_B1 = torch.tensor(self.length, device=device)[:, None]
        rows_B1 = torch.arange(len(self.length), device=device)[:, None]
        return rows_B1, start_B1 + after + torch.arange(tokens, device=device)

    def _gather(self, row: int, nodes: list[int]) -> None:
        """Moves the path's entries to stand right behind the root's (sources precede no target)."""
        behind_root = self.length[row] + 1
        for store in (self._keys, self._values):
            for tensor in store:
                if tensor is not None:
                    source = torch.tensor(nodes, device=tensor.device) + behind_root
                    tensor[row, :, behind_root : behind_root + len(nodes)] = tensor[row, :, source]

    def _allocate(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        _, H, _, d = keys.shape
        store_k = keys.new_zeros(self.rows, H, self.capacity, d)
        store_v = values.new_zeros(self.rows, H, self.capacity, values.shape[-1])
        self._keys[layer], self._values[layer] = store_k, store_v
        return store_k, store_v

    def _grow(self, capacity: int) -> None:
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                if tensor is not None:
                    B, H, old, d = tensor.shape
                    bigger = tensor.new_zeros(B, H, capacity, d)
                    bigger[:, :, :old] = tensor
                    store[layer] = bigger
        self.capacity = capacity
