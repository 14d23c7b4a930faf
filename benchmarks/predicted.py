"""Does the cost model predict the speedup that is measured?

    .venv/bin/python -m benchmarks.predicted --target FOLDER --data ko_nli \\
        --arm lm=outputs/stages/finetune-.../artifact --length 2 --length 4 --length 6 \\
        --tree '{"kind": "dynamic", "top_k": 4, "depth": 4, "nodes": 16}' --batch 1 --batch 4

Each drafter in each shape and batch is a point. The costs (eval/cost.py) are measured on made-up
text just before the prompts are decoded, plain and drafting in turn; tau is plain decoding's rounds
a token over the drafting ones. Prints predicted beside measured speedup and their ratio, and where
they differ by more than 10 %, the part of the round whose time is furthest from what was predicted.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.arms import source, told
from decoding.loop import Decoded, decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.base import Trained, cast, load, write_json
from eval.cost import Costs, measure
from eval.prompts import Prompt, collect
from eval.shapes import Shape, shapes_of
from train.compose import resolvers
from train.processes.worker import environment

CLOSE = 0.1  # of the measured speedup


def main() -> None:
    asked = arguments()
    resolvers()
    spec = Pretrained(path=asked.target, dtype=asked.dtype)
    target, tokenizer = spec.load(), spec.tokenizer()
    prompts, origin = collect(
        {asked.data: source(asked.data)}, tokenizer, limit=asked.limit, most_tokens=256,
        heldout_only=False, trained_on=None,
    )  # fmt: skip
    points = []
    for pair in asked.arm:
        name, _, folder = pair.partition("=")
        drafter: Any = cast(load(Path(folder), target.shape), target.dtype).to(target.device)
        trees = [json.loads(tree) for tree in asked.tree]
        for shape in shapes_of(drafter, asked.length, trees, None):
            points += of_shape(asked, target, drafter, name, shape, prompts)
    print(*lines(points), sep="\n")
    conditions = told(asked) | {"origin": origin, "threads": torch.get_num_threads()}
    report = {"points": points, "conditions": conditions, "environment": environment()}
    write_json(Path(f"{asked.out}.json"), report)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", required=True, help="a name in conf/data")
    parser.add_argument("--arm", action="append", required=True, help="NAME=drafter folder")
    parser.add_argument("--length", action="append", type=int, required=True, help="of a chain")
    parser.add_argument("--tree", action="append", default=[], help="JSON, see drafters/trees.py")
    parser.add_argument("--batch", action="append", type=int, required=True)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--limit", type=int, default=32, help="prompts")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/predicted")
    return parser.parse_args()


def of_shape(
    asked: argparse.Namespace,
    target: Target,
    drafter: Trained,
    name: str,
    shape: Shape,
    prompts: list[Prompt],
) -> list[dict[str, Any]]:
    """The points of one drafter in one shape, one for each batch."""
    sampling = Sampling(temperature=asked.temperature)
    long = sum(len(p.ids) for p in prompts) / len(prompts)
    context = round(long + asked.max_new_tokens / 2)
    costs = measure(target, drafter, shape, asked.batch, sampling=sampling, context=context)
    points = []
    for batch in asked.batch:
        groups = [prompts[a : a + batch] for a in range(0, len(prompts) - batch + 1, batch)]
        arms: list[tuple[Target, Trained | None]] = [(target, None), (drafter.on(target), drafter)]
        done: tuple[list[Decoded], ...] = ([], [])
        for group in tqdm([groups[0], *groups], desc=f"{name}, {shape}, batch {batch}"):
            for runs, (model, ours) in zip(done, arms, strict=True):
                ids = [prompt.ids for prompt in group]
                new = asked.max_new_tokens
                runs.append(decode(model, ours, ids, sampling=sampling, max_new_tokens=new))
        place = {"arm": name, "shape": str(shape), "batch": batch}
        points.append(place | point(costs, batch, long, done[0][1:], done[1][1:]))
    return points


def point(
    costs: Costs, batch: int, prompt_tokens: float, plain: list[Decoded], drafted: list[Decoded]
) -> dict[str, Any]:
    """Predicted and measured speedup, and milliseconds a round of each part, by both."""
    slow, fast = sums(plain), sums(drafted)
    tau = (slow["rounds"] / slow["tokens"]) / (fast["rounds"] / fast["tokens"])
    measured = (slow["seconds"] / slow["tokens"]) / (fast["seconds"] / fast["tokens"])
    predicted = costs.predict(tau, batch, slow["rounds"] / len(plain), prompt_tokens)
    parts = {
        "draft": (costs.draft[batch], fast["draft_seconds"] / fast["rounds"]),
        "verify": (costs.verify[batch][costs.tokens], fast["verify_seconds"] / fast["rounds"]),
        "plain": (costs.verify[batch][1], slow["verify_seconds"] / slow["rounds"]),
    }
    return {
        **{"tau": tau, "predicted": predicted, "measured": measured},
        **{"ratio": predicted / measured, "groups": len(plain)},
        "ms": {part: {"predicted": a, "measured": 1000 * b} for part, (a, b) in parts.items()},
    }


def sums(runs: list[Decoded]) -> dict[str, float]:
    names = ("tokens", "rounds", "seconds", "draft_seconds", "verify_seconds")
    return {name: sum(getattr(run, name) for run in runs) for name in names}


def lines(points: list[dict[str, Any]]) -> list[str]:
    """A line for each point, and how many are close."""
    found = []
    for p in points:
        said = (
            f"{p['arm']}, {p['shape']}, batch {p['batch']}: predicted {p['predicted']:.2f}x, "
            f"measured {p['measured']:.2f}x, ratio {p['ratio']:.2f} (tau {p['tau']:.2f})"
        )
        if abs(p["ratio"] - 1) > CLOSE:
            away = {part: ms["measured"] / ms["predicted"] for part, ms in p["ms"].items()}
            worst = max(away, key=lambda part: abs(away[part] - 1))
            said += f"; {worst} took {away[worst]:.2f} of its predicted time"
        found.append(said)
    close = sum(abs(p["ratio"] - 1) <= CLOSE for p in points)
    return [*found, f"{close} of {len(points)} within {CLOSE:.0%}"]


if __name__ == "__main__":
    main()
