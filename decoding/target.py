"""The frozen target: one Hugging Face causal LM, its hidden states and taps, logits on demand.

Shapes: B batch, T tokens, S newly committed tokens, N drafted nodes, M = N + 1 (root first),
D target width, L tapped layers, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.graphs import Graphs, Standing, Tensors
from decoding.round import Draft, Scored, Seen, Verdict
from decoding.tree import ancestors, depths


@dataclass(frozen=True)
class Shape:
    """What a drafter must know of its target before any weight is loaded.

    A mixture of experts has in each layer `experts` gated MLPs of expert_size, of which a token is
    read by active_experts; 0 experts: a dense model, whose MLPs are of intermediate_size.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    max_positions: int
    tied: bool = False
    head_dim: int = 0
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    experts: int = 0
    active_experts: int = 0
    expert_size: int = 0

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From a Hugging Face text configuration."""
        config, shape = config.get_text_config(), None
        try:
            heads = config.num_attention_heads
            shape = cls(
                vocab_size=config.vocab_size,
                hidden_size=config.hidden_size,
                layers=config.num_hidden_layers,
                heads=heads,
                kv_heads=_first(config, "num_key_value_heads") or heads,
                intermediate_size=_first(config, "intermediate_size", "n_inner")
                or 4 * config.hidden_size,
                max_positions=_first(config, "max_position_embeddings") or 2048,
                tied=bool(getattr(config, "tie_word_embeddings", False)),
                head_dim=_first(config, "head_dim") or config.hidden_size // heads,
                rope_theta=_rope_theta(config),
                norm_eps=_first(config, "rms_norm_eps") or 1e-6,
                **_experts(config),
            )
        except (AttributeError, RuntimeError, TypeError):
            pass  # no such setting, or one for each layer
        if shape is None or not all(isinstance(n, int | float) for n in vars(shape).values()):
            raise ValueError(
                f"a model of type {config.model_type} has no one number of attention heads or size "
                "of a layer; choose a decoder-only target whose layers are all alike"
            )
        return shape

    def parameters(self, *, active: bool = False) -> int:
        """Parameters of a Llama-shaped model (gated MLP, no biases), counted from the shape; of a
        mixture of experts all of them, or those that one token is read by (`active`)."""
        width, head_dim = self.hidden_size, self.head_dim or self.hidden_size // self.heads
        attention = 2 * width * head_dim * (self.heads + self.kv_heads)
        mlp = 3 * width * self.intermediate_size
        if self.experts:  # and the matrix that chooses among them
            read = self.active_experts if active else self.experts
            mlp = 3 * width * self.expert_size * read + width * self.experts
        embeddings = self.vocab_size * width * (1 if self.tied else 2)
        return self.layers * (attention + mlp + 2 * width) + embeddings + width


def _experts(config: Any) -> dict[str, int]:
    """The experts of a mixture; of a dense model nothing."""
    experts = _first(config, "num_experts", "num_local_experts")
    if not experts:
        return {}
    size = _first(config, "moe_intermediate_size", "intermediate_size")
    return {
        "experts": experts,
        "active_experts": config.num_experts_per_tok,
        "expert_size": size,
    }


def _rope_theta(config: Any) -> float:
    """The base of the rotary positions; the usual one where there is none."""
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10_000.0)


@dataclass
class TargetOut:
    """hidden_BTD after the final norm; taps_BTLD: hidden_states[k] for each tapped k."""

    hidden_BTD: Tensor
    taps_BTLD: Tensor | None = None


class Target(nn.Module):
    """A frozen decoder-only model. Nothing here is ever trained, saved or given to an optimiser."""

    graphs: Graphs | None = None  # set: scoring passes have fixed shapes and are replayed

    def __init__(self, model: Any, name: str = "target") -> None:
        super().__init__()
        refuse_what_cannot_be_cropped(model, name)
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.revision: str | None = None  # of the Hub, or a hash of the files it was loaded from
        self.shape = Shape.of(model.config)
        config = model.config.get_text_config()
        self.softcap = _first(config, "final_logit_softcapping")
        # Cohere and Granite; that these names mean what they say is for probe() to find out
        self.scale = (_first(config, "logit_scale") or 1) / (_first(config, "logits_scaling") or 1)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.get_input_embeddings().weight.dtype

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids that end an answer, from generation_config.json, else config.json."""
        generation = getattr(self.model, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        ids = self.model.config.eos_token_id if ids is None else ids
        return frozenset(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])

    def embed(self, ids: Tensor) -> Tensor:
        """The target's input embeddings of `ids`, [..., D]."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Head applied to states after the final norm, [..., V]. In training, call it per chunk."""
        head = self.model.get_output_embeddings()
        logits = head(hidden.to(head.weight.dtype))
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def head_rows(self, ids: Tensor) -> Tensor:
        """Rows of the head's matrix, [..., D]: a state's product with one is the token's logit,
        before bias and softcap."""
        rows = self.model.get_output_embeddings().weight[ids]
        return rows if self.scale == 1 else rows * self.scale

    @torch.no_grad()
    def forward(
        self, ids_BT: Tensor, *, doc_BT: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> TargetOut:
        """States of whole sequences; tokens attend within their document only."""
        mask, positions_BT = document_mask(ids_BT, doc_BT)
        return self._states(ids_BT, positions_BT, mask, None, taps)

    @torch.inference_mode()
    def prefill(
        self, ids_BS: Tensor, count: list[int], cache: Cache, taps: tuple[int, ...] = ()
    ) -> Seen:
        """Reads all but the last token of each prompt (ids padded on the right)."""
        B, S = ids_BS.shape
        hidden_BSD = torch.zeros(
            B, S, self.shape.hidden_size, dtype=self.dtype, device=ids_BS.device
        )
        taps_BSLD = None
        if taps:
            taps_BSLD = hidden_BSD[:, :, None].repeat(1, 1, len(taps), 1)
        if S > 1:
            cache.open(S - 1, ids_BS.device)
            positions = torch.arange(S - 1, device=ids_BS.device).expand(B, S - 1)
            mask = cache.causal(B, S - 1, ids_BS.device)
            out = self._states(ids_BS[:, :-1], positions, mask, cache, taps)
            hidden_BSD[:, 1:] = out.hidden_BTD
            if taps_BSLD is not None and out.taps_BTLD is not None:
                taps_BSLD[:, 1:] = out.taps_BTLD
            cache.length = [c - 1 for c in count]
        return Seen(ids_BS, list(count), list(count), hidden_BSD, taps_BSLD)

    @torch.inference_mode()
    def score(
        self, root_B: Tensor, draft: Draft, cache: Cache, taps: tuple[int, ...] = ()
    ) -> Scored:
        """One pass over root and nodes; each node sees the committed tokens and its ancestors."""
        ids_BM = torch.cat([root_B[:, None], draft.ids_BN], dim=1)
        B, M = ids_BM.shape
        device = ids_BM.device
        cache.open(M, device)
        start_B1 = torch.tensor(cache.length, device=device)[:, None]
        if draft.is_chain:
            mask = cache.causal(B, M, device)
            positions_BM = start_B1 + torch.arange(M, device=device)
        else:
            parents_BN = draft.parents_BN.to(device)
            mask = cache.mask(ancestors(parents_BN))
            positions_BM = start_B1 + depths(parents_BN)
        out = self._score(ids_BM, positions_BM, mask, cache, taps)
        return Scored(self.logits(out.hidden_BTD), out.hidden_BTD, out.taps_BTLD)

    @torch.inference_mode()
    def keep(self, draft: Draft, scored: Scored, verdict: Verdict, cache: Cache) -> Seen:
        """Commits the accepted path and the target's own token; lengths differ by row."""
        cache.keep(verdict.path, draft.is_chain)
        count = [len(path) + 1 for path in verdict.path]
        S, device = max(count), scored.hidden_BMD.device
        drafted = draft.ids_BN.tolist()
        ids, before = [], []  # token s was predicted at: the root for the first, then its parent
        for path, token, mine in zip(verdict.path, verdict.next, drafted, strict=True):
            padding = [0] * (S - 1 - len(path))
            ids.append([mine[n] for n in path] + [token] + padding)
            before.append([0] + [n + 1 for n in path] + padding)
        ids_BS, before_BS = torch.tensor([ids, before], device=device)
        rows_B1 = torch.arange(len(count), device=device)[:, None]
        hidden_BSD = scored.hidden_BMD[rows_B1, before_BS]
        taps = None if scored.taps_BMLD is None else scored.taps_BMLD[rows_B1, before_BS]
        length = [n + 1 for n in cache.length]
        return Seen(ids_BS, count, length, hidden_BSD, taps, draft, scored)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        if self.graphs is not None:
            return self.graphs.new_cache(rows, capacity)
        return Cache(self.shape.layers, rows, capacity)

    def _score(
        self,
        ids_BM: Tensor,
        positions_BM: Tensor,
        mask: Tensor,
        cache: Cache,
        taps: tuple[int, ...],
    ) -> TargetOut:
        """The states of a scoring pass, replayed where the cache stands still."""
        if not isinstance(cache, Standing):
            return self._states(ids_BM, positions_BM, mask, cache, taps)

        def run(given: Tensors, inner: Cache) -> Tensors:
            ids, positions, allowed = given
            out = self._states(ids, positions, allowed, inner, taps)
            return (out.hidden_BTD,) if out.taps_BTLD is None else (out.hidden_BTD, out.taps_BTLD)

        hidden, *more = cache.replay((ids_BM, positions_BM, mask), (*ids_BM.shape, *taps), run)
        return TargetOut(hidden, more[0] if more else None)

    def _states(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        mask: Tensor,
        cache: Cache | None,
        taps: tuple[int, ...],
    ) -> TargetOut:
        out = self.model.base_model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=additive(mask, self.dtype),
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=bool(taps),
        )
        tapped = torch.stack([out.hidden_states[k] for k in taps], dim=2) if taps else None
        return TargetOut(out.last_hidden_state, tapped)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as what attention adds to its scores: eager attention knows no other, and the
    others would make it anew in each layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def document_mask(ids_BT: Tensor, doc_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """Boolean mask [B, 1, T, T] (causal, within documents) and positions that restart in each."""
    B, T = ids_BT.shape
    index_T = torch.arange(T, device=ids_BT.device)
    causal = index_T[:, None] >= index_T[None, :]
    if doc_BT is None:
        return causal.expand(B, 1, T, T), index_T.expand(B, T)
    same = doc_BT[:, :, None] == doc_BT[:, None, :]
    first = torch.ones_like(doc_BT, dtype=torch.bool)
    first[:, 1:] = doc_BT[:, 1:] != doc_BT[:, :-1]
    begin_BT = torch.where(first, index_T, 0).cummax(dim=1).values
    return (same & causal)[:, None], index_T - begin_BT


def _first(config: Any, *names: str) -> Any:
    """The first of these settings that a configuration has."""
    return next((v for v in (getattr(config, n, None) for n in names) if v is not None), None)


def refuse_what_cannot_be_cropped(model: Any, name: str) -> None:
    """Recurrent and windowed layers keep state that rejecting a draft cannot undo, and some
    position codes depend on how far a draft reaches."""
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{name} is an encoder-decoder model ({model.config.model_type}); drafts are for "
            "decoder-only models; choose one as the target"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    each = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    moving = {str(kind.get("rope_type")) for kind in each} & {"dynamic", "longrope"}
    if moving:
        raise ValueError(
            f"{name} has rotary positions of type {', '.join(sorted(moving))}, which change with "
            "the length of a pass: a draft would change the tokens before it; choose a target "
            "without"
        )
    kinds = _first(config, "layer_types", "layers_block_type", "attention_layers") or []
    other = sorted(set(kinds) - {"full_attention", "attention", "global"})
    if not other and _has_window(model, config):
        other = [f"sliding_window {config.sliding_window}"]
    if other:
        raise ValueError(
            f"{name} has layers other than full attention ({', '.join(other)}), whose state cannot "
            "be cropped after a rejected draft; choose a target with full attention in every layer"
        )


def _has_window(model: Any, config: Any) -> bool:
    """Whether a configured window is used: where layers have a type, each knows of its own."""
    if not getattr(config, "sliding_window", None):
        return False
    own = [m.sliding_window for m in model.modules() if hasattr(m, "sliding_window")]
    return len(own) < config.num_hidden_layers or any(own)
