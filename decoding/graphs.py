"""Scoring passes of fixed shapes over a cache that stays where it is, replayed as CUDA graphs.

A pass of a small model on a GPU is hundreds of kernels, each started from Python in about the time
that it runs. A graph starts all of them at once, if shapes and addresses never change: so a pass
sees a window of slots that doubles instead of growing slot by slot, the mask hides those that are
not there yet, and what changes is copied into buffers. The kernels are the ordinary pass's.

Shapes: B batch, M tokens of a pass, W slots that it sees, H heads, d their size.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from decoding.cache import GROWTH, Cache

Tensors = tuple[Tensor, ...]


class Pass:
    """`run` over buffers of its own. On a GPU it is recorded once and then replayed, so `run` may
    not wait for the device, and must read nothing that changes but what it is given."""

    def __init__(self, run: Callable[[Tensors], Tensors], inputs: Tensors) -> None:
        self.run, self.buffers = run, tuple(t.clone() for t in inputs)
        self.graph: Any = None
        if inputs[0].is_cuda:
            self._record()

    def __call__(self, inputs: Tensors) -> Tensors:
        """What `run` gives for these inputs, which have the shapes of the first ones."""
        for buffer, value in zip(self.buffers, inputs, strict=True):
            buffer.copy_(value)
        if self.graph is None:
            return self.run(self.buffers)
        self.graph.replay()
        return tuple(t.clone() for t in self.results)  # which the next replay overwrites

    def _record(self) -> None:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):  # kernels set themselves up in their first calls
            for _ in range(2):
                self.run(self.buffers)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self.run(self.buffers)


@dataclass
class Slots:
    """Keys and values [rows, H, capacity, d] of each layer, the passes recorded over them, and the
    cache that has them now."""

    layers: int
    rows: int
    capacity: int
    passes: dict[tuple[int, ...], Pass] = field(default_factory=dict)
    keys: list[Tensor | None] = field(init=False)
    values: list[Tensor | None] = field(init=False)
    owner: Callable[[], Any] = lambda: None

    def __post_init__(self) -> None:
        self.keys, self.values = [None] * self.layers, [None] * self.layers


class Standing(Cache):
    """A cache over slots that keep their addresses from job to job. Passes write by slot numbers
    and see the first 256, 512, 1024, ... slots of the first rows."""

    def __init__(self, slots: Slots, rows: int) -> None:
        super().__init__(slots.layers, slots.rows, slots.capacity)
        self.slots, self.length = slots, [0] * rows
        self._keys, self._values = slots.keys, slots.values

    def open(self, tokens: int, device: torch.device, after: int = 0) -> None:
        super().open(tokens, device, after)
        window = GROWTH
        while window < self._width:
            window *= 2
        self._width = min(window, self.capacity)

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        all_keys, all_values = super().update(keys, values, layer)
        return all_keys[: len(keys)], all_values[: len(keys)]

    def select(self, rows: list[int]) -> None:
        """Keeps some of the rows, as the first ones."""
        self.length = [self.length[r] for r in rows]
        for tensor in [*self._keys, *self._values]:
            if tensor is not None:
                tensor[: len(rows)] = tensor[torch.tensor(rows, device=tensor.device)]

    def replay(self, inputs: Tensors, key: tuple[int, ...], run: "Run") -> Tensors:
        """`run` of these inputs and a cache, for the pass that was just opened; `key` is all that
        decides which kernels it starts, besides the window."""
        assert self._write is not None, "a standing cache writes by slot numbers"
        width, passes = self._width, self.slots.passes
        if (*key, width) not in passes:
            inner = Standing(self.slots, 0)  # not this cache: a recorded pass outlives it

            def whole(given: Tensors) -> Tensors:
                *most, rows_B1, slots_BM = given
                inner._write, inner._width = (rows_B1, slots_BM), width
                return run(tuple(most), inner)

            passes[*key, width] = Pass(whole, (*inputs, *self._write))
        return passes[*key, width]((*inputs, *self._write))

    def _where(self, tokens: int, device: torch.device, after: int) -> tuple[Tensor, Tensor]:
        return self._scattered(tokens, device, after)

    def _grow(self, capacity: int) -> None:
        super()._grow(_rounded(capacity))
        self.slots.capacity = self.capacity
        self.slots.passes.clear()


Run = Callable[[Tensors, Cache], Tensors]


class Graphs:
    """The slots that the jobs of one target have in turn."""

    def __init__(self, layers: int) -> None:
        self.slots = Slots(layers, 0, 0)

    def new_cache(self, rows: int, capacity: int) -> Standing:
        """An empty cache; over the kept slots if no other job has them still."""
        kept = self.slots
        if kept.owner() is not None:  # two at once: the second has slots of its own
            return Standing(Slots(kept.layers, rows, _rounded(capacity)), rows)
        if rows > kept.rows or capacity > kept.capacity:
            kept.passes.clear()  # they hold the slots, which hold them
            rows_kept, capacity = max(rows, kept.rows), max(capacity, kept.capacity)
            kept = self.slots = Slots(kept.layers, rows_kept, _rounded(capacity))
        cache = Standing(kept, rows)
        kept.owner = weakref.ref(cache)
        return cache


def _rounded(capacity: int) -> int:
    return -(-capacity // GROWTH) * GROWTH
