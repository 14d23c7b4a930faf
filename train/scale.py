"""What training a drafter takes on GPUs that are not here: memory by placement, bounds of speed,
cache sizes, communication. `python -m train.scale` prints the tables of docs/scale.md.

Everything is arithmetic on shapes; nothing is allocated. n is the number of GPUs, P the target's
parameters, Q the drafter's; bytes are decimal in sums and GiB where they are shown.
"""

from dataclasses import dataclass
from typing import Any

from decoding.target import Shape
from train.machine import gib
from train.placement import placement
from train.recorded import Kept

PLACEMENTS = ("replicated", "zero3", "tensor", "cached")
CHUNK = 6 * 2**23  # bytes of a chunk of logits with what a loss makes of it
KEPT = 34  # bytes that a training step keeps for each token, layer and unit of width, in bf16
USABLE = 0.92  # share of a GPU's memory: the context, NCCL's buffers and holes take the rest
TOP_K = 64  # tokens of a position in a cache without states


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """conf/hardware/: a GPU by its published figures, in bytes and operations a second.

    flops: dense bf16; bandwidth: of its own memory; link and network: to one of the `per_node`
    GPUs of its node and to other nodes, one way.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    network: float
    per_node: int = 8

    def __post_init__(self) -> None:
        figures = (self.memory, self.flops, self.bandwidth, self.link, self.network, self.per_node)
        if min(figures) <= 0:
            raise ValueError(f"hardware {self.name} has {figures}; every figure must be above 0")


@dataclass(frozen=True)
class Work:
    """A drafter's training step on one GPU: `parameters` of it, applied `passes` times to each of
    micro x length tokens; `layers` of `width` keep activations; `taps` of the target's states are
    read beside its last."""

    parameters: int
    passes: int
    layers: int
    width: int
    taps: int
    micro: int
    length: int

    @property
    def tokens(self) -> int:
        return self.micro * self.length


def held(trained: int, stage: int, ranks: int, dtype: str = "bfloat16") -> int:
    """Bytes that a rank holds for `trained` parameters under a ZeRO stage: weights, gradients, the
    bucket that they are reduced in, and in fp32 master weights, two moments and, while it steps,
    gradients (Rajbhandari et al. 2020, section 3, with DeepSpeed's buffers)."""
    own = 2 if dtype == "bfloat16" else 4
    shared = 16
    each = {
        0: 2 * own + (16 if own == 2 else 8),
        1: 3 * own + shared / ranks,
        2: 2 * own + (own + shared) / ranks,
        3: 2 * own
        + (2 * own + shared) / ranks,  # a bucket, and the weights while a pass reads them
    }
    return int(trained * each[stage])


def kept(work: Work, dtype: str = "bfloat16") -> int:
    """Bytes of activations and one chunk of logits in a drafter's step."""
    scale = 1 if dtype == "bfloat16" else 2
    return work.tokens * work.width * work.layers * work.passes * KEPT * scale + CHUNK


def target_bytes(shape: Shape, place: str, ranks: int, per_node: int) -> float:
    """Bytes of the frozen target's bf16 weights on one GPU; tensor: shared within a node."""
    found = placement(shape, dtype="bfloat16", ranks=ranks, positions=0)
    sizes = {
        "replicated": found.replicated,
        "zero3": found.sharded,
        "tensor": found.replicated / min(ranks, per_node),
        "cached": found.borrowed,
    }
    return sizes[place]


def pass_bytes(shape: Shape, work: Work) -> float:
    """Bytes that a forward pass of the target works in: the mask, and per token its states (the
    last and the taps are kept) and one gated MLP's three activations, in bf16."""
    mlp = shape.active_experts * shape.expert_size if shape.experts else shape.intermediate_size
    each = 8 * shape.hidden_size + 3 * mlp + work.taps * shape.hidden_size
    return 2 * work.tokens * each + 2 * work.micro * work.length**2


def target_flops(shape: Shape, length: int) -> float:
    """Operations of the target's forward pass for one token: two for each parameter that reads it
    (its row of the embeddings is no product) and causal attention over half of `length`."""
    head_dim = shape.head_dim or shape.hidden_size // shape.heads
    looked_up = 0 if shape.tied else shape.vocab_size * shape.hidden_size
    products = 2 * (shape.parameters(active=True) - looked_up)
    return products + 2 * length * shape.heads * head_dim * shape.layers


def drafter_flops(work: Work) -> float:
    """Operations of the drafter's forward and backward pass for one token."""
    return 6 * work.parameters * work.passes


@dataclass(frozen=True)
class Bound:
    """The most tokens a second of all GPUs together, and what bounds them. seconds: by compute,
    memory and links, of one micro-batch if each were all that it takes."""

    tokens_per_second: float
    by: str
    seconds: dict[str, float]


def bound(shape: Shape, work: Work, place: str, ranks: int, gpu: Hardware) -> Bound:
    """A roofline with perfect overlap: the longest of operations at the peak, of reading every
    weight once a pass, and of what the links carry; one micro-batch a step."""
    group = min(ranks, gpu.per_node) if place == "tensor" else 1
    own = target_flops(shape, work.length)
    if place == "cached":  # the head alone, for the law
        own = 2.0 * shape.vocab_size * shape.hidden_size
    flops = work.tokens * (own / group + drafter_flops(work))
    weights = target_bytes(shape, place, ranks, gpu.per_node)
    if place == "zero3":  # gathered into its memory, then read
        weights = 4.0 * shape.parameters()
    read = weights + 2 * work.parameters * (2 * work.passes + 1) + 28 * work.parameters
    seconds = {
        "operations": flops / gpu.flops,
        "memory": read / gpu.bandwidth,
        "links": _link_seconds(shape, work, place, ranks, gpu),
    }
    by = max(seconds, key=lambda key: seconds[key])
    return Bound(ranks / group * work.tokens / seconds[by], by, seconds)


def _link_seconds(shape: Shape, work: Work, place: str, ranks: int, gpu: Hardware) -> float:
    speed = gpu.link if ranks <= gpu.per_node else gpu.network
    seconds = drafter_traffic(work.parameters, 1, ranks) / speed
    if place == "zero3":
        seconds += 2 * shape.parameters() * (ranks - 1) / ranks / speed
    if place == "tensor":  # within a node: two sums of the states a layer
        group = min(ranks, gpu.per_node)
        states = 2 * work.tokens * shape.hidden_size
        seconds += 2 * shape.layers * ring(states, group) / gpu.link
    return seconds


def ring(size: float, ranks: int) -> float:
    """Bytes that each rank sends, and receives, in a ring all-reduce of `size` bytes:
    2 (n - 1) / n of it (a gather or a scatter alone is half)."""
    return 2 * size * (ranks - 1) / ranks


def drafter_traffic(parameters: int, stage: int, ranks: int) -> float:
    """Bytes that each rank receives in a step of one micro-batch for a bf16 drafter: stage 0 sums
    gradients; 1 and 2 scatter gradients and gather weights, which is as much; 3 gathers weights
    for both passes and scatters gradients (Rajbhandari et al. 2020, section 7)."""
    return ring(2 * parameters, ranks) * (1.5 if stage == 3 else 1.0)


def cache_bytes(shape: Shape, taps: int, positions: int) -> dict[str, int]:
    """Disk of an offline cache of all positions: the last state and the taps as fp16 or fp8, or
    the likeliest tokens of each position (of no use to heads, which read states)."""
    width, read = shape.hidden_size, tuple(range(taps))
    kinds = {
        "states in fp16": Kept(width, read, "states", 0, "float16", True),
        "states in fp8": Kept(width, read, "states", 0, "float8", True),
        f"the {TOP_K} likeliest tokens": Kept(width, (), "top_k", TOP_K, "float16", True),
    }
    return {name: positions * kept.bytes for name, kept in kinds.items()}


def table(shape: Shape, work: Work, ranks: int, gpu: Hardware) -> list[str]:
    """A Markdown table: what each placement of the target takes and could give on these GPUs.
    The drafter is under ZeRO 2."""
    mine = held(work.parameters, 2, ranks) + kept(work)
    lines = [
        "| target | weights a GPU | drafter and step | total | fits | tokens/s, at most | by |",
        "|---|---|---|---|---|---|---|",
    ]
    for place in PLACEMENTS:
        weights = target_bytes(shape, place, ranks, gpu.per_node)
        step = mine + (0 if place == "cached" else pass_bytes(shape, work))
        fits = weights + step <= USABLE * gpu.memory
        best = bound(shape, work, place, ranks, gpu)
        lines.append(
            f"| {place} | {gib(weights)} | {gib(step)} | {gib(weights + step)} | "
            f"{'yes' if fits else 'no'} | {best.tokens_per_second:,.0f} | {best.by} |"
        )
    return lines


def stages_table(work: Work, counts: tuple[int, ...], gpu: Hardware) -> list[str]:
    """A Markdown table: what each ZeRO stage of the drafter holds and moves."""
    lines = [
        "| ZeRO | GPUs | drafter's state a GPU | received a step | takes at least |",
        "|---|---|---|---|---|",
    ]
    for stage in range(4):
        for ranks in counts:
            moved = drafter_traffic(work.parameters, stage, ranks)
            speed = gpu.link if ranks <= gpu.per_node else gpu.network
            lines.append(
                f"| {stage} | {ranks} | {gib(held(work.parameters, stage, ranks))} | "
                f"{gib(moved)} | {1000 * moved / speed:,.1f} ms |"
            )
    return lines


COUNTS = (8, 64, 512)  # GPUs of the tables
POSITIONS = 200_000_000  # of the caches in the tables
TARGETS = ("qwen3_8b", "llama_70b", "qwen3_235b")


def page() -> str:
    """The tables of docs/scale.md: EAGLE-3 for three targets on H100s."""
    gpu = _part("hardware", "h100")
    lines: list[str] = []
    for name in TARGETS:
        shape = Shape(**_part("target", name).shape)
        work = _eagle3(shape)
        lines += [
            f"### {name}: {shape.parameters():,} parameters, "
            f"{shape.parameters(active=True):,} read a token; drafter of {work.parameters:,}",
            "",
        ]
        for ranks in COUNTS:
            lines += [f"{ranks} x {gpu.name}:", "", *table(shape, work, ranks, gpu), ""]
        lines += [*stages_table(work, COUNTS, gpu), ""]
        sizes = cache_bytes(shape, work.taps, POSITIONS).items()
        told = ", ".join(f"{gib(size)} for {kind}" for kind, size in sizes)
        lines += [f"A cache of {POSITIONS:,} positions: {told}.", ""]
    return "\n".join(lines)


def _eagle3(shape: Shape) -> Work:
    """conf/drafter/eagle3.yaml with a draft vocabulary of 32,000, two rows of 2,048 tokens."""
    import torch

    from drafters.eagle3 import Eagle3

    with torch.device("meta"):
        drafter = Eagle3(shape, vocabulary=32_000)
    count = sum(p.numel() for p in drafter.parameters())
    return Work(count, drafter.steps, 1, shape.hidden_size, len(drafter.taps), 2, 2048)


def _part(group: str, name: str) -> Any:
    from omegaconf import OmegaConf

    from train.compose import ROOT, build

    return build(OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")))


if __name__ == "__main__":
    print(page())
