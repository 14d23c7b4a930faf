"""The family `lm`: an ordinary small causal LM that shares the target's tokenizer (Yi et al. 2024).

Shapes: B batch, T tokens, S newly committed tokens, N drafted tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.cache import Cache
from decoding.pretrained import no_foreign_code
from decoding.round import Draft, Seen
from decoding.sampling import Dice, Sampling
from decoding.target import Shape, Target, additive, document_mask, refuse_what_cannot_be_cropped
from drafters.base import Batch, Metrics, Objective, Prediction, Trained
from drafters.confined import confined
from drafters.trees import Chain, Growth, above, tree_of

HEAD_DIM = 64


@dataclass
class LMState:
    """The drafter's own cache. `fed`: how many tokens of a chain it has committed to it in advance;
    above: of a tree, which nodes that it was asked about stand above which."""

    cache: Cache
    sampling: Sampling
    requests: list[int]
    fed: int = 0
    above_Bnn: Tensor = field(default_factory=lambda: torch.empty(0))

    def select(self, rows: list[int]) -> None:
        self.cache.select(rows)
        self.requests = [self.requests[r] for r in rows]


class LM(Trained):
    """A Llama-architecture LM of `layers` x `width` (null: as wide as the target), or, given
    `parameters`, the widest that fits that budget; or the architecture and weights of `checkpoint`.

    lora: {rank: 16, alpha: 32} trains low-rank matrices beside the linear layers of what it starts
    from (peft), which are added to them when it is saved; null trains everything.
    draft_length: tokens drafted a round. stop_below: a row stops drafting after a token that the
    drafter gave less than this probability (the token stays in the draft, so the law stays exact).
    sample: whether it draws its tokens when the target samples (else it takes the likeliest).
    tree: {kind: static | dynamic | branching | beams, ...} instead of a chain; drafters/trees.py.
    """

    free = frozenset(
        {"draft_length", "stop_below", "sample", "tree"}
    )  # cannot change what training makes

    def __init__(
        self,
        shape: Shape,
        *,
        layers: int = 1,
        width: int | None = None,
        parameters: int | None = None,
        checkpoint: str | None = None,
        lora: dict[str, int] | None = None,
        draft_length: int = 5,
        stop_below: float = 0.0,
        sample: bool = True,
        tree: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"drafter.layers is {layers}; it must be at least 1")
        self.draft_length, self.stop_below, self.sample = draft_length, stop_below, sample
        self.tree = tree_of(tree)
        self.chain()  # its own checks, before anything starts
        if lora is not None and not (set(lora) == {"rank", "alpha"} and min(lora.values()) > 0):
            raise ValueError(f"drafter.lora is {lora}; expected {{rank: 16, alpha: 32}} or null")
        self.checkpoint, self.lora = checkpoint, lora
        self._adapted: list[Any] = []  # peft's view of the model; a list, since it is no part
        self.model = _architecture(shape, layers, width, parameters, checkpoint)
        if self.model.config.vocab_size != shape.vocab_size:
            raise ValueError(
                f"{checkpoint} has {self.model.config.vocab_size} tokens and the target "
                f"{shape.vocab_size}: a drafter of this family must share the target's tokenizer"
            )
        if checkpoint:
            _refuse(self.model, checkpoint)

    @property
    def max_positions(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def initialise(self, target: Target | None, counts: Callable[[], Tensor]) -> None:
        from transformers import AutoModelForCausalLM

        if self.checkpoint:
            model = AutoModelForCausalLM.from_pretrained(
                self.checkpoint,
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
            )
            self.model.load_state_dict(model.state_dict())

    def forward(
        self, batch: Batch, target: Target | None, objective: Objective
    ) -> tuple[Tensor, Metrics]:
        hidden_BTD = self._hidden(batch)[:, :-1]
        supervised = batch.mask_BT[:, 1:]
        target_ND = None
        if objective.needs_target:
            assert target is not None, "this objective needs a target"
            out = batch.cached or target(batch.ids_BT, doc_BT=batch.doc_BT)
            target_ND = out.hidden_BTD[:, :-1][supervised]
        prediction = Prediction(
            hidden_ND=hidden_BTD[supervised],
            weight_VD=self.model.get_output_embeddings().weight,
            labels_N=batch.ids_BT[:, 1:][supervised],
            row_N=supervised.nonzero()[:, 0],
            target_ND=target_ND,
        )
        loss, (measured,) = objective([prediction], target)
        return loss, measured

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> LMState:
        if max_len > self.max_positions:
            raise ValueError(
                f"requests of {max_len} tokens exceed the drafter's {self.max_positions} positions"
            )
        layers = self.model.config.num_hidden_layers
        drafted = self.tree.nodes if self.tree else self.draft_length
        own = Cache(layers, len(requests), max_len + drafted + 2)
        return LMState(own, sampling, list(requests))

    @torch.inference_mode()
    def propose(self, state: LMState, seen: Seen, target: Target) -> Draft:
        dice = Dice(state.sampling, state.requests, seen.length)
        return (self.tree or self.chain()).grow(confined(self.ask(state, seen, target, dice)))

    def ask(self, state: LMState, seen: Seen, target: Target, dice: Dice) -> Growth:
        """This round's questions, as trees put them."""
        return _Round(self, state, seen, dice)

    def chain(self) -> Chain:
        return Chain(self.draft_length, stop_below=self.stop_below, sample=self.sample)

    def adapt(self) -> None:
        if self.lora is None:
            return
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.lora["rank"], lora_alpha=self.lora["alpha"], target_modules="all-linear"
        )
        self._adapted = [get_peft_model(self.model, config)]

    def save(self, folder: Path) -> None:
        model = self.model
        if self._adapted:
            model = copy.deepcopy(self._adapted[0]).float().merge_and_unload()
        model.save_pretrained(folder)

    def read(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
        )
        saved, report = loaded
        wrong = [key for keys in report.values() for key in keys]
        if wrong:
            raise ValueError(f"{folder} does not fit the drafter: {', '.join(map(str, wrong[:5]))}")
        self.model.load_state_dict(saved.state_dict())

    @classmethod
    def around(cls, model: Any, **drafting: Any) -> "LM":
        """A drafter that is this model itself, sharing its weights (the control: all accepted)."""
        drafter = cls.__new__(cls)
        torch.nn.Module.__init__(drafter)
        drafter.model = model
        drafter.checkpoint, drafter.lora, drafter._adapted = None, None, []
        drafter.draft_length = drafting.get("draft_length", 5)
        drafter.stop_below = drafting.get("stop_below", 0.0)
        drafter.sample = drafting.get("sample", True)
        drafter.tree = None
        return drafter

    def _hidden(self, batch: Batch) -> Tensor:
        mask, positions_BT = document_mask(batch.ids_BT, batch.doc_BT)
        out = self.model.base_model(
            input_ids=batch.ids_BT,
            attention_mask=additive(mask, self.model.dtype),
            position_ids=positions_BT,
            use_cache=False,
        )
        return out.last_hidden_state

    def catch_up(self, state: LMState, seen: Seen) -> Tensor:
        """Reads the committed tokens that it has not read: the prompt, or what the last round
        brought; returns the logits after the last, [B, V].

        After a chain it has read the root and `fed` of its own tokens; of those, the accepted stay.
        What it read of a tree it reads again.
        """
        new = list(seen.count)
        if seen.draft is not None or max(state.cache.length) > 0:
            new = [c - min(c - 1, state.fed) for c in seen.count]
            state.cache.length = [n - k for n, k in zip(seen.length, new, strict=True)]
        state.fed, state.above_Bnn = 0, torch.empty(0)
        longest = max(new)
        unread = [
            [min(c - k + s, c - 1) for s in range(longest)]
            for c, k in zip(seen.count, new, strict=True)
        ]
        index = torch.tensor(unread, device=seen.ids_BS.device)
        hidden_BSD = self._read(seen.ids_BS.gather(1, index), state.cache)
        state.cache.length = list(seen.length)
        last_B = torch.tensor(new, device=index.device) - 1
        hidden_BD = hidden_BSD[torch.arange(len(new), device=index.device), last_B]
        return self.model.get_output_embeddings()(hidden_BD)

    def below(self, state: LMState, ids_BW: Tensor, parents_BW: Tensor, depth: int) -> Tensor:
        """Logits of what follows these nodes, [B, W, V]. A chain's token joins the cache, in the
        hope that it is accepted; a tree's nodes lie behind it, and see what stands above them."""
        if self.tree is None:
            hidden_BWD = self._read(ids_BW, state.cache)
            state.fed += 1
            state.cache.length = [n + 1 for n in state.cache.length]
        else:
            state.above_Bnn = above(state.above_Bnn, parents_BW)
            hidden_BWD = self._read(ids_BW, state.cache, state.above_Bnn, depth)
        return self.model.get_output_embeddings()(hidden_BWD)

    def _read(
        self, ids_BS: Tensor, cache: Cache, above_Bnn: Tensor | None = None, depth: int = 0
    ) -> Tensor:
        """States of tokens that follow each other behind the cache's, or, with `above`, of the
        last nodes of a tree, all at one depth; [B, S, D]."""
        (B, S), device = ids_BS.shape, ids_BS.device
        start_B1 = torch.tensor(cache.length, device=device)[:, None]
        if above_Bnn is None:
            cache.open(S, device)
            mask, positions_BS = cache.causal(B, S, device), start_B1 + torch.arange(S).to(device)
        else:
            cache.open(S, device, after=above_Bnn.shape[1] - S)
            mask, positions_BS = cache.mask(above_Bnn[:, -S:]), (start_B1 + depth - 1).expand(B, S)
        out = self.model.base_model(
            input_ids=ids_BS,
            position_ids=positions_BS,
            attention_mask=additive(mask, self.model.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        return out.last_hidden_state


def _refuse(model: Any, name: str) -> None:
    """A drafter's cache is cropped as its target's is, and training reads its head as a matrix."""
    refuse_what_cannot_be_cropped(model, name)
    config = model.config.get_text_config()
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    changed = [n for n in names if getattr(config, n, None) not in (None, 1)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        changed.append("a bias")
    if changed:
        raise ValueError(
            f"{name} changes its logits behind the output matrix ({', '.join(changed)}), which "
            "training a drafter does not do; choose another drafter.checkpoint"
        )


@dataclass
class _Round:
    """The drafter asked about one round; what trees call a Growth."""

    drafter: LM
    state: LMState
    seen: Seen
    dice: Dice

    def begin(self) -> Tensor:
        return self.drafter.catch_up(self.state, self.seen)

    def deepen(self, ids_BW: Tensor, parents_BW: Tensor, depth: int) -> Tensor:
        return self.drafter.below(self.state, ids_BW, parents_BW, depth)


def _architecture(
    shape: Shape, layers: int, width: int | None, parameters: int | None, checkpoint: str | None
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if checkpoint:
        with no_foreign_code(checkpoint):
            known = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
        return AutoModelForCausalLM.from_config(known, trust_remote_code=False)
    if parameters is not None:
        width = _widest(shape.vocab_size, layers, parameters)
    width = width or shape.hidden_size
    if width % HEAD_DIM:
        raise ValueError(f"drafter.width is {width}; it must be a multiple of {HEAD_DIM}")
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=width,
        intermediate_size=_feed_forward(width),
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_DIM,
        num_key_value_heads=width // HEAD_DIM,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def _feed_forward(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 64 (Llama's choice)."""
    return -(-8 * width // (3 * 64)) * 64


def _widest(vocabulary: int, layers: int, budget: int) -> int:
    """The largest width, a multiple of the head size, whose LM has at most `budget` parameters."""
    best = 0
    for width in range(HEAD_DIM, 16384, HEAD_DIM):
        layer = 4 * width * width + 3 * width * _feed_forward(width) + 2 * width
        if vocabulary * width + layers * layer + width > budget:
            break
        best = width
    if not best:
        least = vocabulary * HEAD_DIM
        raise ValueError(
            f"drafter.parameters is {budget:,}, and the embeddings of {vocabulary:,} tokens alone "
            f"take {least:,}; raise it"
        )
    return best
