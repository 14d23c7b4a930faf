"""The frozen target: one Hugging Face causal LM, its hidden states and taps, logits on demand.

Shapes: B batch, T tokens, S newly committed tokens, N drafted nodes, M = N + 1 (root first),
D target width, L tapped layers, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from decoding.cache import Cache
from decoding.round import Draft, Scored, Seen, Verdict
from decoding.tree import ancestors, depths


@dataclass(frozen=True)
class Shape:
    """What a drafter must know of its target before any weight is loaded."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    max_positions: int
    tied: bool = False
    head_dim: int = 0

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From a Hugging Face text configuration."""
        config = config.get_text_config()
        heads = config.num_attention_heads
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            intermediate_size=getattr(config, "intermediate_size", 4 * config.hidden_size),
            max_positions=getattr(config, "max_position_embeddings", 2048),
            tied=bool(getattr(config, "tie_word_embeddings", False)),
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        )

    def parameters(self) -> int:
        """Parameters of a Llama-shaped model (gated MLP, no biases), counted from the shape."""
        head_dim = self.head_dim or self.hidden_size // self.heads
        attention = 2 * self.hidden_size * head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.layers * layer + embeddings + self.hidden_size


@dataclass
class TargetOut:
    """hidden_BTD after the final norm; taps_BTLD: hidden_states[k] for each tapped k."""

    hidden_BTD: Tensor
    taps_BTLD: Tensor | None = None


class Target(nn.Module):
    """A frozen decoder-only model. Nothing here is ever trained, saved or given to an optimiser."""

    def __init__(self, model: Any, name: str = "target", taps: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.revision: str | None = None  # of the Hub, or a hash of the files it was loaded from
        self.taps = taps
        self.shape = Shape.of(model.config)
        self.softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        _refuse_what_cannot_be_cropped(model.config.get_text_config(), name)

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
        logits = self.model.get_output_embeddings()(hidden)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @torch.no_grad()
    def forward(
        self, ids_BT: Tensor, *, doc_BT: Tensor | None = None, taps: tuple[int, ...] = ()
    ) -> TargetOut:
        """States of whole sequences; tokens attend within their document only."""
        mask, positions_BT = document_mask(ids_BT, doc_BT)
        return self._states(ids_BT, positions_BT, mask, None, taps)

    @torch.inference_mode()
    def prefill(self, ids_BS: Tensor, count: list[int], cache: Cache) -> Seen:
        """Reads all but the last token of each prompt (ids padded on the right)."""
        B, S = ids_BS.shape
        hidden_BSD = torch.zeros(
            B, S, self.shape.hidden_size, dtype=self.dtype, device=ids_BS.device
        )
        taps_BSLD = None
        if self.taps:
            L = len(self.taps)
            taps_BSLD = hidden_BSD[:, :, None].repeat(1, 1, L, 1)
        if S > 1:
            cache.open(S - 1, ids_BS.device)
            positions = torch.arange(S - 1, device=ids_BS.device).expand(B, S - 1)
            mask = cache.causal(B, S - 1, ids_BS.device)
            out = self._states(ids_BS[:, :-1], positions, mask, cache, self.taps)
            hidden_BSD[:, 1:] = out.hidden_BTD
            if taps_BSLD is not None and out.taps_BTLD is not None:
                taps_BSLD[:, 1:] = out.taps_BTLD
            cache.length = [c - 1 for c in count]
        return Seen(ids_BS, list(count), list(count), hidden_BSD, taps_BSLD)

    @torch.inference_mode()
    def score(self, root_B: Tensor, draft: Draft, cache: Cache) -> Scored:
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
        out = self._states(ids_BM, positions_BM, mask, cache, self.taps)
        return Scored(self.logits(out.hidden_BTD), out.hidden_BTD, out.taps_BTLD)

    @torch.inference_mode()
    def keep(self, draft: Draft, scored: Scored, verdict: Verdict, cache: Cache) -> Seen:
        """Commits the accepted path and the target's own token; lengths differ by row."""
        cache.keep(verdict.path, draft.is_chain)
        count = [len(path) + 1 for path in verdict.path]
        S, device = max(count), scored.hidden_BMD.device
        # token s of a row was predicted at: the root for the first, then the node before it
        before = [[0] + [n + 1 for n in path] + [0] * (S - 1 - len(path)) for path in verdict.path]
        before_BS = torch.tensor(before, device=device)
        rows = torch.arange(len(count), device=device)[:, None]
        kept_BS = torch.cat([draft.ids_BN, draft.ids_BN.new_zeros(len(count), 1)], dim=1)
        nodes = [path + [draft.ids_BN.shape[1]] * (S - len(path)) for path in verdict.path]
        ids_BS = kept_BS.gather(1, torch.tensor(nodes, device=device))
        ids_BS[rows[:, 0], torch.tensor(count, device=device) - 1] = torch.tensor(
            verdict.next, device=device
        )
        taps = None if scored.taps_BMLD is None else scored.taps_BMLD[rows, before_BS]
        length = [n + 1 for n in cache.length]
        hidden_BSD = scored.hidden_BMD[rows, before_BS]
        return Seen(ids_BS, count, length, hidden_BSD, taps, draft, scored)

    def new_cache(self, rows: int, capacity: int) -> Cache:
        return Cache(self.shape.layers, rows, capacity)

    def _states(
        self,
        ids_BT: Tensor,
        positions_BT: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
        taps: tuple[int, ...],
    ) -> TargetOut:
        out = self.model.base_model(
            input_ids=ids_BT,
            position_ids=positions_BT,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            output_hidden_states=bool(taps),
        )
        tapped = torch.stack([out.hidden_states[k] for k in taps], dim=2) if taps else None
        return TargetOut(out.last_hidden_state, tapped)


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


def _refuse_what_cannot_be_cropped(config: Any, name: str) -> None:
    """Recurrent and windowed layers keep state that rejecting a draft cannot undo, and some
    position codes depend on how far a draft reaches."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"{name} has rotary positions of type {rope}, which change with the length of a pass: "
            "a draft would change the tokens before it; choose a target without"
        )
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    if kinds or window:
        what = ", ".join(sorted(kinds)) or f"sliding_window {window}"
        raise ValueError(
            f"{name} has layers other than full attention ({what}), whose state cannot be cropped "
            "after a rejected draft; choose a target with full attention in every layer"
        )


def probe(target: Target) -> None:
    """The head over our states must be the model's own logits: some models scale in between."""
    ids = torch.arange(4, device=target.device)[None] % target.shape.vocab_size
    with torch.inference_mode():
        own = target.model(input_ids=ids).logits.float()
        ours = target.logits(target(ids).hidden_BTD).float()
    gap = (own - ours).abs().max().item()
    if gap > 0.05 * own.abs().max().item():
        raise ValueError(
            f"{target.name}: logits from hidden states differ from the model's own by {gap:.3g}; "
            f"{type(target.model).__name__} transforms them in a way that is not supported"
        )
