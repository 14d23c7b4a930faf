"""The family `lm`: an ordinary small causal LM that shares the target's tokenizer (Yi et al. 2024).

Shapes: B batch, T tokens, S newly committed tokens, N drafted tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from decoding.cache import Cache
from decoding.round import Draft, Seen
from decoding.sampling import Dice, Sampling
from decoding.target import Shape, Target, additive, document_mask, refuse_what_cannot_be_cropped
from drafters.base import Batch, Metrics, Objective, Prediction, Trained
from drafters.trees import Chain

HEAD_DIM = 64


@dataclass
class LMState:
    """The drafter's own cache; `fed` is how many of the last draft's tokens it has read."""

    cache: Cache
    sampling: Sampling
    requests: list[int]
    fed: int = 0

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
    """

    free = frozenset({"draft_length", "stop_below", "sample"})  # cannot change what training makes

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
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"drafter.layers is {layers}; it must be at least 1")
        self.draft_length, self.stop_below, self.sample = draft_length, stop_below, sample
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
            model = AutoModelForCausalLM.from_pretrained(self.checkpoint, dtype=torch.float32)
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
        return objective(prediction, target)

    def start(
        self, target: Target, cache: Cache, sampling: Sampling, requests: list[int], max_len: int
    ) -> LMState:
        if max_len > self.max_positions:
            raise ValueError(
                f"requests of {max_len} tokens exceed the drafter's {self.max_positions} positions"
            )
        layers = self.model.config.num_hidden_layers
        own = Cache(layers, len(requests), max_len + self.draft_length + 2)
        return LMState(own, sampling, list(requests))

    @torch.inference_mode()
    def propose(self, state: LMState, seen: Seen, target: Target) -> Draft:
        dice = Dice(state.sampling, state.requests, seen.length)
        return self.chain().grow(_Round(self, state, seen, dice))

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
            folder, dtype="auto", output_loading_info=True, local_files_only=True
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
        """Reads the committed tokens that it has not read: the prompt, or the last one or two.

        After a draft it has read the root and `fed` of its own tokens; of those, the accepted stay.
        """
        new = list(seen.count)
        if seen.draft is not None or max(state.cache.length) > 0:
            new = [c - min(c - 1, state.fed) for c in seen.count]
            state.cache.length = [n - k for n, k in zip(seen.length, new, strict=True)]
        state.fed = 0
        longest = max(new)
        unread = [
            [min(c - k + s, c - 1) for s in range(longest)]
            for c, k in zip(seen.count, new, strict=True)
        ]
        index = torch.tensor(unread, device=seen.ids_BS.device)
        return self.step(seen.ids_BS.gather(1, index), new, state.cache)

    def step(self, ids_BS: Tensor, new: list[int], cache: Cache) -> Tensor:
        """Reads `new[b]` tokens of each row; returns the logits after the last of them, [B, V]."""
        B, S = ids_BS.shape
        device = ids_BS.device
        cache.open(S, device)
        start_B1 = torch.tensor(cache.length, device=device)[:, None]
        out = self.model.base_model(
            input_ids=ids_BS,
            position_ids=start_B1 if S == 1 else start_B1 + torch.arange(S, device=device),
            attention_mask=additive(cache.causal(B, S, device), self.model.dtype),
            past_key_values=cache,
            use_cache=True,
        )
        cache.length = [n + k for n, k in zip(cache.length, new, strict=True)]
        hidden_BSD = out.last_hidden_state
        if S == 1:
            return self.model.get_output_embeddings()(hidden_BSD[:, 0])
        last = torch.tensor(new, device=device) - 1
        hidden_BD = hidden_BSD[torch.arange(B, device=device), last]
        return self.model.get_output_embeddings()(hidden_BD)


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
        self.state.fed += 1
        return self.drafter.step(ids_BW, [1] * len(ids_BW), self.state.cache)[:, None]


def _architecture(
    shape: Shape, layers: int, width: int | None, parameters: int | None, checkpoint: str | None
) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if checkpoint:
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
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
