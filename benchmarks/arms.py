"""Which of several drafters is best for one target, on the same prompts, with paired intervals?

    .venv/bin/python -m benchmarks.arms --target FOLDER --data ko_nli --data ko_sts \\
        --arm P=outputs/stages/pretrain-.../artifact --arm F=... --out benchmarks/results/x

An arm named twice (other seeds) is one arm: its runs are pooled by prompt. Decodes every prompt
with every arm in turn, batch 1, and with plain decoding; prints tokens per target call (tau),
speedup and the difference between arms, bootstrapped over prompts.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tqdm import tqdm

from data.repetition import is_repetitive
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.base import Drafter, cast, load, write_json
from drafters.ngram import Ngram
from eval.prompts import collect
from train.compose import ROOT, bind, build, resolvers
from train.processes.worker import environment

RESAMPLES = 10_000
FOLDERS = ("target", "drafter", "trained_on", "packed")


def main() -> None:
    asked = arguments()
    resolvers()
    spec = Pretrained(path=asked.target, dtype=asked.dtype)
    target, tokenizer = spec.load(), spec.tokenizer()
    sources = {name: source(name) for name in asked.data}
    prompts, origin = collect(
        sources, tokenizer, limit=asked.limit, most_tokens=256, heldout_only=False,
        trained_on=asked.trained_on,
    )  # fmt: skip
    arms: list[tuple[str, Drafter | None]] = [("autoregressive", None), ("ngram", Ngram())]
    for pair in asked.arm:
        name, _, folder = pair.partition("=")
        drafter = cast(load(Path(folder), target.shape), target.dtype)
        drafter.draft_length = asked.draft_length
        arms.append((name, drafter))
    rows = []
    for temperature in (0.0, 1.0):
        for _, drafter in arms:  # warm-up
            decode(target, drafter, [prompts[0].ids], sampling=Sampling(), max_new_tokens=16)
        for i, prompt in enumerate(tqdm(prompts, desc=f"T={temperature:g}", mininterval=5)):
            for name, drafter in arms:
                done = decode(
                    target, drafter, [prompt.ids],
                    sampling=Sampling(temperature), max_new_tokens=asked.max_new_tokens,
                    requests=[i],
                )  # fmt: skip
                answer = done.answers[0]
                rows.append({
                    "arm": name, "prompt": i, "temperature": temperature,
                    "tokens": len(answer.ids), "calls": len(answer.accepted),
                    "seconds": done.seconds, "repetitive": is_repetitive(answer.ids),
                })  # fmt: skip
    report = summarise(rows)
    report |= {"conditions": told(asked) | {"origin": origin}}
    write_json(Path(f"{asked.out}.json"), report | {"environment": environment()})
    print(json.dumps(report, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--data", action="append", required=True, help="names in conf/data")
    parser.add_argument("--arm", action="append", default=[], help="NAME=drafter folder")
    parser.add_argument("--trained-on", type=Path, help="a generate stage's artifact")
    parser.add_argument("--limit", type=int, default=180, help="prompts of each data set")
    parser.add_argument("--draft-length", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--out", default="benchmarks/results/arms")
    return parser.parse_args()


def told(asked: argparse.Namespace) -> dict[str, str]:
    """The arguments without folders, which say nothing on another machine."""
    values = {key: value for key, value in vars(asked).items() if key != "out"}
    values["arm"] = [pair.partition("=")[0] for pair in values.get("arm", [])]
    shown = {key: Path(v).name if key in FOLDERS and v else v for key, v in values.items()}
    return {key: str(value) for key, value in shown.items()}


def source(name: str) -> object:
    """A data source by its name in conf/data."""
    with initialize_config_dir(str(ROOT / "conf" / "data"), version_base="1.3"):
        config = OmegaConf.to_container(compose(name), resolve=True)
    bind(config, name)
    return build(config)


def summarise(rows: list[dict]) -> dict:
    """Per temperature: each arm's tau and speedup, and all differences of tau between arms."""
    report: dict = {}
    for temperature in sorted({row["temperature"] for row in rows}):
        here = [row for row in rows if row["temperature"] == temperature]
        odd = {row["prompt"] for row in here if row["repetitive"]}
        kept = sorted({row["prompt"] for row in here} - odd)
        sums = {name: totals(here, name, kept) for name in dict.fromkeys(r["arm"] for r in here)}
        weights = np.random.default_rng(0).multinomial(
            len(kept), np.full(len(kept), 1 / len(kept)), size=RESAMPLES
        )
        tau = {name: ratio(s[:, 0], s[:, 1], weights) for name, s in sums.items()}
        cost = {name: ratio(s[:, 2], s[:, 0], weights) for name, s in sums.items()}
        names = [name for name in sums if name != "autoregressive"]
        report[f"T={temperature:g}"] = {
            "prompts": len(kept),
            "repetitive_left_out": len(odd),
            "tau": {name: interval(tau[name]) for name in names},
            "speedup": {name: interval(cost["autoregressive"] / cost[name]) for name in names},
            "tau_difference": {
                f"{a} - {b}": interval(tau[a] - tau[b])
                for i, a in enumerate(names)
                for b in names[i + 1 :]
                if "ngram" not in (a, b)
            },
        }
    return report


def totals(rows: list[dict], arm: str, prompts: list[int]) -> np.ndarray:
    """[prompts, 3]: tokens, target calls and seconds of an arm, summed over its seeds."""
    place = {prompt: i for i, prompt in enumerate(prompts)}
    sums = np.zeros((len(prompts), 3))
    for row in rows:
        if row["arm"] == arm and row["prompt"] in place:
            sums[place[row["prompt"]]] += row["tokens"], row["calls"], row["seconds"]
    return sums


def ratio(top: np.ndarray, bottom: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The ratio of sums, over all prompts first and then over each resample."""
    return np.concatenate([[top.sum() / bottom.sum()], (weights @ top) / (weights @ bottom)])


def interval(values: np.ndarray) -> list[float]:
    """[value, low, high], 95 % percentile bootstrap."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return [round(float(v), 4) for v in (values[0], low, high)]


if __name__ == "__main__":
    main()
