"""Draft layers computed from a file alone, in plain torch: what exports are held against.

Nothing here knows our drafters. Llama's layer (neox rotary positions) as vLLM 0.32 computes it for
drafters: models/llama_eagle.py and llama_eagle3.py.

Shapes: T tokens, S pairs of a sequence, D width, I what attention reads, H heads, d head width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(streams [S, D], embeddings [S, D]) -> what is fed back and what the head reads, [S, D] each."""


@dataclass(frozen=True)
class Layer:
    """One decoder layer; the names of its weights begin with `prefix`."""

    weights: Mapping[str, Tensor]
    prefix: str
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float

    @classmethod
    def of(cls, weights: Mapping[str, Tensor], prefix: str, config: Mapping[str, Any]) -> "Layer":
        """As its configuration says, in transformers' words and with Llama's defaults."""
        heads = config["num_attention_heads"]
        return cls(
            weights=weights,
            prefix=prefix,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            eps=config.get("rms_norm_eps", 1e-6),
            theta=theta(config),
        )

    def __call__(self, residual_SD: Tensor, read_SI: Tensor) -> Tensor:
        x_SD = residual_SD + self._attention(read_SI)
        normed = self.norm("post_attention_layernorm", x_SD)
        gate, up = self._times("mlp.gate_proj", normed), self._times("mlp.up_proj", normed)
        return x_SD + self._times("mlp.down_proj", F.silu(gate) * up)

    def norm(self, name: str, x_SD: Tensor) -> Tensor:
        return rms(x_SD, self.weights[f"{self.prefix}{name}.weight"], self.eps)

    def _times(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{self.prefix}{name}.weight"].T

    def _attention(self, read_SI: Tensor) -> Tensor:
        S = len(read_SI)
        q, k, v = (
            self._times(f"self_attn.{name}_proj", read_SI).view(S, -1, self.head_dim)
            for name in "qkv"
        )
        share = self.heads // self.kv_heads
        k, v = (
            x.repeat_interleave(share, dim=1) for x in (rotated(k, self.theta), v)
        )  # a key head serves `share` query heads
        score = torch.einsum("shd,thd->hst", rotated(q, self.theta), k) * self.head_dim**-0.5
        ahead = torch.ones(S, S, dtype=torch.bool).triu(1)
        weight = score.masked_fill(ahead, -torch.inf).softmax(-1)
        mixed = torch.einsum("hst,thd->shd", weight, v).flatten(1)
        return self._times("self_attn.o_proj", mixed)


def theta(config: Mapping[str, Any]) -> float:
    """The rotary base, in the spelling of transformers 5 or of before; ValueError where the two
    differ or the positions are scaled, which engines of one kind would overlook."""
    nested = config.get("rope_parameters") or {}
    said = {float(t) for t in (nested.get("rope_theta"), config.get("rope_theta")) if t is not None}
    kinds = {(config.get("rope_scaling") or {}).get("rope_type"), nested.get("rope_type")}
    if len(said) > 1:
        raise ValueError(
            f"rope_theta is {nested['rope_theta']} in rope_parameters and {config['rope_theta']} "
            "beside it: engines read the one or the other; make them equal"
        )
    if kinds - {None, "default"}:
        raise ValueError(
            f"the rotary positions are of type {', '.join(sorted(map(str, kinds - {None})))}; a "
            "drafter of this family has the default ones"
        )
    return next(iter(said), 10_000.0)


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rotated(x_SHd: Tensor, base: float) -> Tensor:
    """Rotary positions 0, 1, ...: each number of the first half turns with one of the second."""
    S, _, d = x_SHd.shape
    turn = torch.outer(torch.arange(S).float(), base ** (-torch.arange(0, d, 2).float() / d))
    cos, sin = turn.cos()[:, None], turn.sin()[:, None]
    a, b = x_SHd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def guesses(streams_TD: Tensor, embed_TD: Tensor, depth: int, step: Step) -> list[Tensor]:
    """For k = 1, ..., depth: what the head reads to guess token t + 1 + k from pair t, a row for
    each t that has such a token. Pair t is (token t + 1, state t); below the first guess the
    drafter reads true tokens, and its own output in the place of states."""
    T = len(embed_TD)
    found: list[list[Tensor]] = [[] for _ in range(depth)]
    for t in range(T - 2):
        stream_SD = streams_TD[: t + 1]
        for k in range(1, min(depth, T - 2 - t) + 1):
            fed_SD, said_SD = step(stream_SD, embed_TD[1 : t + 1 + k])
            found[k - 1].append(said_SD[-1])
            stream_SD = torch.cat([stream_SD, fed_SD[-1:]])
    return [torch.stack(rows) for rows in found]
