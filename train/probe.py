"""One step, measured before the first: the memory that it takes at its peak, and its seconds.

Shapes: B batch, T tokens.
"""

import functools
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from decoding.sharded import agreed
from decoding.target import Shape, Target
from drafters.base import Batch
from train.loop import Step
from train.machine import device, gib, memory_free, neighbours, now
from train.scale import held
from train.schedule import Schedule

SAVED = 12  # bytes a trained parameter of a checkpoint that a CPU gathers to write it
PASSES, ENOUGH = 3, 1.0  # timed passes at most, and seconds after which they are enough


@dataclass(frozen=True)
class Measured:
    """peak: bytes that forward and backward of one micro-batch need at once, gradients included;
    seconds: of that micro-batch; update: seconds of the optimiser's step."""

    peak: int
    seconds: float
    update: float

    def step_seconds(self, schedule: Schedule, ranks: int) -> float:
        """Seconds of one optimiser step with its micro-batches."""
        passes = schedule.rows // (ranks * schedule.micro(ranks))
        return passes * self.seconds + self.update


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within it, while they live. Those of `known`
    were there before. On a GPU its allocator counts itself, and better."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def measure(
    module: nn.Module, step: Step, batch: Batch, dtype: str, frozen: Any = None, sharers: int = 1
) -> Measured:
    """A few steps of `module` on `batch` in `dtype`, without a trace: weights, gradients and random
    states are afterwards as they were. The first is weighed, the others timed.

    `frozen`: the target that `step` reads, whose weights are not of the step; sharers: ranks that
    divide the optimiser's work (ZeRO 1 and above).
    """
    mine = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with _borrowed(module, dtype), torch.random.fork_rng(devices=mine):
        tensors = [*module.parameters(), *module.buffers(), *_tensors(frozen)]
        peak = _weigh(lambda: _once(module, step, batch), tensors)
        _forget(module)
        times: list[float] = []
        while agreed(frozen, not times or (len(times) < PASSES and sum(times) < ENOUGH)):
            begin = now()
            _once(module, step, batch)
            times.append(now() - begin)
            _forget(module)
        update = _update([p for p in module.parameters() if p.requires_grad], sharers)
        return Measured(peak, median(times), update)


def probe(
    module: nn.Module, step: Step, batch: Batch, schedule: Schedule, ranks: int, frozen: Any = None
) -> str:
    """Measures the step of a stage that is about to train on `batch`, its longest micro-batch, and
    returns a line that says memory and time (without torch.compile, which takes less of both once
    it has compiled). Raises OSError when the memory at hand is too little: it names what needs it
    and the keys to lower; and when torch.compile is asked for and does not work here."""
    if schedule.compile:
        require_compiler()
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    free, here = memory_free(), neighbours(ranks)
    state = held(trained, schedule.zero_stage, ranks, schedule.dtype)
    if device().type == "cpu":  # where a checkpoint is gathered and serialised too
        state += SAVED * trained
    require(state, 0, free, here, schedule)
    try:
        sharers = ranks if schedule.zero_stage else 1
        found = measure(module, step, batch, schedule.dtype, frozen, sharers)
    except torch.OutOfMemoryError:
        found = Measured(free + 1, 0.0, 0.0)  # or more
    require(state, found.peak, free, here, schedule)
    seconds = found.step_seconds(schedule, ranks)
    return (
        f"a measured step: {gib(state)} for the drafter, its optimiser and saving, "
        f"{gib(found.peak)} at the peak of a micro-batch of {batch.ids_BT.numel():,} tokens, "
        f"{gib(free)} free; "
        f"{seconds:.3g} s a step of {schedule.batch_tokens:,} tokens, about "
        f"{schedule.steps * seconds / 60:.1f} minutes for {schedule.steps:,} without validation"
    )


def require(state: int, peak: int, free: int, ranks: int, schedule: Schedule) -> None:
    """Raises OSError when `ranks` ranks that share `free` bytes need more."""
    if (state + peak) * ranks <= free:
        return
    keys = "raise deepspeed.zero_stage, add ranks or choose a smaller drafter"
    if peak:
        keys = "lower schedule.micro_batch (a step stays batch_tokens), then sequence_length"
    raise OSError(
        f"a training step of micro_batch {schedule.micro_batch} x sequence_length "
        f"{schedule.sequence_length} needs {gib(state + peak)} more on each of {ranks} rank(s) "
        f"here ({gib(state)} for weights, gradients, optimiser and saving, {gib(peak)} for "
        f"activations and logits), and {gib(free)} are free; {keys}"
    )


def require_compiler() -> None:
    """Raises OSError where torch.compile cannot make and run a kernel, forward and backward."""
    options: Any = {"fx_graph_cache": False}  # a kernel found on disk proves no compiler
    kernel = torch.compile(lambda x: F.silu(x).sum(), dynamic=False, options=options)
    try:
        kernel(torch.ones(8, device=device(), requires_grad=True)).backward()
    except Exception as error:  # whatever a compiler, a driver or a package of it says
        why = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise OSError(
            f"schedule.compile is true and torch.compile does not work here ({why}): install a C++ "
            "compiler and Python's headers, for a GPU triton too, or set schedule.compile=false"
        ) from error


def longest(batch: Batch) -> Batch:
    """The batch with every token supervised, which is the most that a step can meet."""
    mask_BT = torch.ones_like(batch.mask_BT)
    mask_BT[:, 0] = False  # nothing predicts a first token
    return Batch(batch.ids_BT, mask_BT, batch.doc_BT, batch.cached)


def random_batch(rows: int, length: int, vocabulary: int) -> Batch:
    """Rows of one document each, every token supervised."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocabulary, (rows, length), generator=generator).to(device())
    return longest(Batch(ids_BT, torch.ones_like(ids_BT).bool(), torch.zeros_like(ids_BT)))


@functools.lru_cache(maxsize=1)
def stand_in(shape: Shape, dtype: str = "bfloat16") -> Target:
    """A target of this shape with random weights, which take as long as any."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim or shape.hidden_size // shape.heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
    )
    with torch.random.fork_rng():
        model: Any = LlamaForCausalLM(config).to(getattr(torch, dtype)).to(device())
    return Target(model, "stand-in")


@functools.cache
def round_seconds(shape: Shape, rows: int, tokens: int = 1) -> float:
    """Seconds of a round of decoding: the target's pass over `tokens` tokens of each of `rows`
    requests, with choosing and keeping, measured on a stand-in."""
    from eval.rounds import Fixed, Round

    ahead = Round(stand_in(shape), Fixed(tokens - 1), rows)
    ahead.begin()
    return sorted(ahead()[1] for _ in range(5))[2] / 1000


@contextmanager
def _borrowed(module: nn.Module, dtype: str) -> Any:
    """The module as an engine would have it: on the device, its parameters in `dtype`."""
    training, before = module.training, [(p, p.data) for p in module.parameters()]
    fixed = [(buffer, buffer.data) for buffer in module.buffers()]
    try:
        module.train()
        for parameter, data in before:
            parameter.data = data.to(device(), getattr(torch, dtype))
        for buffer, data in fixed:
            buffer.data = data.to(device())
        yield
    finally:
        module.train(training)
        for parameter, data in before:
            parameter.data, parameter.grad = data, None
        for buffer, data in fixed:
            buffer.data = data


def _once(module: nn.Module, step: Step, batch: Batch) -> None:
    loss, _ = step(module, batch)
    loss.backward()


def _weigh(work: Callable[[], None], known: list[Tensor]) -> int:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with Live(known) as live:
        work()
    return live.most


def _update(trained: list[nn.Parameter], sharers: int) -> float:
    """Seconds of AdamW on a rank's part of parameters of these sizes."""
    sizes = [-(-p.numel() // sharers) for p in trained]
    copies = [nn.Parameter(torch.zeros(n, device=device())) for n in sizes]
    for copy in copies:
        copy.grad = torch.zeros_like(copy)
    adamw = torch.optim.AdamW(copies, lr=0.0)
    adamw.step()  # makes its moments
    begin = now()
    adamw.step()
    return now() - begin


def _forget(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = None


def _tensors(frozen: Any) -> list[Tensor]:
    return [*frozen.parameters(), *frozen.buffers()] if isinstance(frozen, nn.Module) else []
