"""A Llama decoder layer for draft heads, with three ways to attend: over whole sequences, over a
cache, and over unrolled guesses.

Shapes: B batch, T tokens, H heads, D width, d head width. Tensor names are those of transformers'
Llama, which serving engines read.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.target import Shape, Target

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q [B, H, T, d], k and v [B, kv heads, T, d]) -> [B, H, T, d]."""


class Layer(nn.Module):
    """Attention and gated MLP, each with a residual; `inputs`: width of what attention reads, if it
    is not the residual itself; `norm`: whether it is normed before (EAGLE-1 has none there)."""

    def __init__(self, shape: Shape, inputs: int | None = None, norm: bool = True) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        super().__init__()
        config = llama_config(shape)
        self.input_layernorm = rms_norm(shape) if norm else nn.Identity()
        self.self_attn = Attention(config, inputs or shape.hidden_size)
        self.post_attention_layernorm = rms_norm(shape)
        self.mlp = LlamaMLP(config)

    def forward(
        self, hidden_BTD: Tensor, positions_BT: Tensor, attend: Attend, read: Tensor | None = None
    ) -> Tensor:
        """`read` [B, T, inputs]: what attention reads instead of the normed residual."""
        seen = self.input_layernorm(hidden_BTD) if read is None else read
        hidden_BTD = hidden_BTD + self.self_attn(seen, positions_BT, attend)
        return hidden_BTD + self.mlp(self.post_attention_layernorm(hidden_BTD))

    def start_as_identity(self) -> None:
        """Leaves both residuals alone until training moves them."""
        nn.init.zeros_(self.self_attn.o_proj.weight)
        nn.init.zeros_(self.mlp.down_proj.weight)


class Attention(nn.Module):
    """Projections and rotary positions; who attends to what is the caller's `attend`."""

    def __init__(self, config: Any, inputs: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        super().__init__()
        self.head_dim = config.head_dim
        width, kv = config.num_attention_heads * self.head_dim, config.num_key_value_heads
        self.q_proj = nn.Linear(inputs, width, bias=False)
        self.k_proj = nn.Linear(inputs, kv * self.head_dim, bias=False)
        self.v_proj = nn.Linear(inputs, kv * self.head_dim, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, x_BTI: Tensor, positions_BT: Tensor, attend: Attend) -> Tensor:
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        B, T, _ = x_BTI.shape
        q, k, v = (
            proj(x_BTI).view(B, T, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = self.rotary(x_BTI, positions_BT)
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        return self.o_proj(attend(q, k, v).transpose(1, 2).reshape(B, T, -1))


def llama_config(shape: Shape) -> Any:
    """A one-layer Llama of the target's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim or shape.hidden_size // shape.heads,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=False,
    )


def exported(shape: Shape) -> dict[str, Any]:
    """What a checkpoint's config.json says of it, the rotary base also as engines of before
    transformers 5 read it (they take 10,000 where it is missing)."""
    config = llama_config(shape).to_dict()
    return config | {"rope_theta": shape.rope_theta, "rope_scaling": None}


def rms_norm(shape: Shape) -> nn.Module:
    return nn.RMSNorm(shape.hidden_size, eps=shape.norm_eps)


def copy_last_layer(target: Target, layer: Layer) -> None:
    """Starts the layer as the target's last one where that is this layer too, else as the
    identity: other architectures give the same names to other computations."""
    stack = getattr(target.model.base_model, "layers", None)
    theirs = stack[-1].state_dict() if stack is not None and _alike(target) else {}
    mine = layer.state_dict()
    if {k: v.shape for k, v in theirs.items()} == {k: v.shape for k, v in mine.items()}:
        layer.load_state_dict(theirs)
    else:
        layer.start_as_identity()


def copy_final_norm(target: Target, norm: nn.Module) -> None:
    """Starts the norm as the one behind the target's last layer, on the same condition."""
    theirs = getattr(target.model.base_model, "norm", None)
    if theirs is not None and _alike(target):
        norm.load_state_dict(theirs.state_dict())


def _alike(target: Target) -> bool:
    """Whether the target's layers compute what ours do."""
    config = target.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    return (
        config.model_type in ("llama", "mistral")
        and config.hidden_act == "silu"
        and rope.get("rope_type", "default") == "default"
        and not getattr(config, "attention_bias", False)
        and not getattr(config, "mlp_bias", False)
    )


def over(mask: Tensor) -> Attend:
    """Attention among the tokens of a pass; mask [B, 1, T, T]."""
    return lambda q, k, v: _sdpa(q, k, v, mask)


def cached(cache: Cache, layer: int, mask: Tensor) -> Attend:
    """Attention over a cache that is open for this pass; mask [B, 1, T, W]."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(q, *cache.update(k, v, layer), mask)

    return attend


class Unrolled:
    """Training-time test (EAGLE-3): token t of step s is a guess s places past t. It attends to the
    true tokens up to t, whose keys step 0 left, and to its own line of guesses: the keys at t of
    steps 1 to s. Step 0 is causal attention."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = mask
        self._true: tuple[Tensor, Tensor] | None = None
        self._guessed: list[tuple[Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._true is None:
            self._true = k, v
            return _sdpa(q, k, v, self.mask)
        self._guessed.append((k, v))
        share = q.shape[1] // k.shape[1]
        pairs = [(_repeat(a, share), _repeat(b, share)) for a, b in (self._true, *self._guessed)]
        (k0, v0), line = pairs[0], pairs[1:]
        scale = q.shape[-1] ** -0.5
        score = (q @ k0.transpose(-1, -2)).masked_fill(~self.mask, -torch.inf)
        own = torch.stack([(q * key).sum(-1) for key, _ in line], dim=-1)
        weight = (torch.cat([score, own], dim=-1) * scale).softmax(-1)
        T = k0.shape[2]
        mixed = weight[..., :T] @ v0
        for i, (_, value) in enumerate(line):
            mixed = mixed + weight[..., T + i, None] * value
        return mixed


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat_interleave(times, dim=1) if times > 1 else x
