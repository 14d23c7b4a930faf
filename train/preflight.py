"""Before anything starts: is there the disk, the memory, the access that later stages will need?

It takes seconds. What it cannot know (a Hub that does not answer) it says and lets pass.
"""

import netrc
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data.sources import Hub
from decoding.pretrained import Pretrained
from train import versions
from train.compose import build, classes
from train.estimate import estimate, shape_of_target
from train.launch import Launch
from train.machine import gib, memory_free, neighbours
from train.passes import SHORT, Estimate
from train.plan import Planned
from train.track import Wandb

SMALL = 64 * 2**20  # bytes of logs, tokenizers and reports that nobody counts
PATIENCE = 10.0  # seconds that the Hub has for an answer
PUBLISH = "train.publish.Publish"
GENERATE = "data.generate.Generate"
LOWER = {
    "train.base.BaseTarget": "lower its schedule.micro_batch, or its layers and width",
    "train.distill.Distill": (
        "lower its schedule.micro_batch (a step stays batch_tokens), raise deepspeed.zero_stage, "
        "or divide the target (target.parallel=zero3) or do without it (a cache, docs/scale.md)"
    ),
    GENERATE: "lower its batch_size, or divide the target (target.parallel=zero3)",
    "eval.bench.Bench": "choose a smaller target, or divide it (target.parallel=zero3)",
    "train.cache.CacheStates": "lower its batch_size, or divide the target (target.parallel=zero3)",
    "eval.tune_tree.TuneTree": "choose a smaller target, lower its batch_size, or leave it out",
}
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Refused(ValueError):
    """The Hub answered, and the answer is no."""


def preflight(
    config: dict[str, Any], stages: list[Planned], launch: Launch, root: Path
) -> list[str]:
    """Lines to print before a recipe starts. Raises OSError where disk or memory cannot suffice,
    ValueError where a credential is missing that was plainly asked for."""
    shape = shape_of_target(config["target"], stages)
    todo = [stage for stage in stages if not stage.done]
    found = {s.name: estimate(s, shape, launch.world, rehearsed=False) for s in todo}
    lines = []
    for check in _checks(todo, launch, root, found):
        lines += check()
    return lines


def findings(
    stages: list[Planned], launch: Launch, root: Path, found: dict[str, Estimate]
) -> Iterator[str]:
    """The same for plan=true, from estimates that are there: what would stop is a line as well."""
    yield from versions.shown()
    for check in _checks([s for s in stages if not s.done], launch, root, found):
        try:
            yield from check()
        except (ValueError, OSError) as error:
            yield f"would not start here: {error}"


def _checks(
    stages: list[Planned], launch: Launch, root: Path, found: dict[str, Estimate]
) -> list[Callable[[], list[str]]]:
    return [
        lambda: disk(root, stages, found),
        lambda: memory(stages, found, launch),
        lambda: tracking(stages),
        lambda: hub(stages),
    ]


def disk(root: Path, stages: list[Planned], found: dict[str, Estimate]) -> list[str]:
    """What the stages will leave, with the checkpoint that stands beside two others while it is
    written, against what is free. Raises OSError where it is too little even if answers are
    short."""
    if not stages:
        return []
    there = next(p for p in [root, *root.parents] if p.is_dir())
    free = shutil.disk_usage(there).free
    sizes = {s.name: found[s.name].disk or 0 for s in stages}
    answers = sum(sizes[s.name] for s in stages if s.config["_target_"] == GENERATE)
    aside = max(found[s.name].aside for s in stages)
    most = sum(sizes.values()) + aside
    said = f"disk: {gib(most)} needed ({gib(aside)} of it for a moment), {gib(free)} free"
    if most + SMALL <= free:
        return [said]
    large = max(sizes, key=lambda name: sizes[name])
    said += (
        f" in {there}; most is for stage {large} ({gib(sizes[large])}): free some, or set "
        "output_dir to another disk"
    )
    if most - (1 - SHORT) * answers + SMALL > free:
        raise OSError(said)
    return [f"warning: {said}. It may suffice, if answers are short"]


def memory(stages: list[Planned], found: dict[str, Estimate], launch: Launch) -> list[str]:
    """What each stage certainly needs against what this machine has left, and a warning for each
    that may need more. Several nodes, or a job that a scheduler places, are other machines: each
    stage's own first step finds out there."""
    if not stages:
        return []
    if launch.how == "slurm" or launch.nodes > 1:
        return ["memory: the stages run on other machines; each measures a step before it trains"]
    free, here = memory_free(), neighbours(launch.world)
    large = max((s.name for s in stages), key=lambda name: found[name].floor)
    floor = found[large].floor
    said = f"memory: {gib(free)} free for {here} rank(s) here"
    if floor * here > free:
        raise OSError(
            f"{said}, and stage {large} needs {gib(floor)} on each before it makes one step; "
            "raise deepspeed.zero_stage, or choose a smaller target or drafter, fewer ranks on "
            "this machine or a cache (docs/scale.md)"
        )
    most = max((s.name for s in stages), key=lambda name: found[name].memory or 0)
    told = gib(found[most].memory or 0)
    lines = [f"{said}; the most is needed by stage {most}, about {told} each"]
    for stage in stages:
        need = found[stage.name].memory or 0
        if need * here > free:
            lines.append(scarce(stage, need, f"each of {here} rank(s) here", free / here))
    return lines


def scarce(stage: Planned, need: float, where: str, have: float) -> str:
    """The warning for a stage that may not fit."""
    return (
        f"warning: stage {stage.name} needs about {gib(need)} of memory on {where}, and there are "
        f"{gib(have)}: {LOWER.get(stage.config['_target_'], 'choose a smaller target')}"
    )


def tracking(stages: list[Planned]) -> list[str]:
    """Raises ValueError where wandb shall go online and has no key."""
    named = [s for s in stages if isinstance(build(s.config.get("tracker")), Wandb)]
    if not named:
        return []
    mode = build(named[0].config["tracker"]).mode
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _in_netrc("api.wandb.ai")):
        raise ValueError(
            "tracker.mode is online and wandb has no key: set WANDB_API_KEY, run `wandb login`, or "
            "set tracker.mode=offline"
        )
    return [f"tracker: wandb, {mode}"]


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def hub(stages: list[Planned]) -> list[str]:
    """Whether the Hub lets us read what the stages read and is not here, and knows us where one
    publishes. Raises ValueError for what it refuses; that it does not answer stops nothing."""
    publishing = [build(s.config) for s in stages if s.config["_target_"] == PUBLISH]
    asks = [partial(_readable, name, kind) for name, kind in sorted(_repositories(stages).items())]
    return _answers([*asks, *(partial(_rehearsed, p) for p in publishing if p.repository)])


def _rehearsed(publishing: Any) -> str:
    """Raises Refused for what the Hub would refuse."""
    try:
        return publishing.rehearse()
    except ValueError as error:
        raise Refused(str(error)) from None


def _repositories(stages: list[Planned]) -> dict[str, str]:
    """Hub ids that the stages read and that are not in the cache -> model or dataset."""
    from huggingface_hub import try_to_load_from_cache

    found = {}
    for stage in stages:
        for cls, body in classes(stage.config):
            if cls is Hub:
                found[body["path"]] = "dataset"
            model = body.get("path") if cls is Pretrained else body.get("checkpoint")
            if not (isinstance(model, str) and HUB_ID.fullmatch(model)) or Path(model).exists():
                continue
            if not isinstance(try_to_load_from_cache(model, "config.json"), str):
                found[model] = "model"
    return found


def _readable(name: str, kind: str) -> str:
    """Raises Refused for a repository that is gated or not there."""
    from huggingface_hub import auth_check
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        auth_check(name, repo_type=kind)
    except GatedRepoError:
        raise Refused(
            f"the Hub does not give {name} to this account: ask for access on its page, then log "
            "in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise Refused(
            f"the Hub has no {kind} {name}, or it is private and the token here may not read it: "
            "check the id, log in with `hf auth login` or set HF_TOKEN"
        ) from None
    return f"Hub: {name} can be read"


def _answers(asks: list[Callable[[], str]]) -> list[str]:
    """What each says, all asked at once; raises the first Refused."""
    heard: list[str | Refused] = ["Hub: no answer"] * len(asks)

    def go(number: int) -> None:
        try:
            heard[number] = asks[number]()
        except Refused as error:
            heard[number] = error
        except Exception as error:  # offline, a proxy, a server's fault: the stage will find out
            heard[number] = f"Hub: not asked ({type(error).__name__})"

    threads = [threading.Thread(target=go, args=(n,), daemon=True) for n in range(len(asks))]
    for thread in threads:
        thread.start()
    until = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    for said in heard:
        if isinstance(said, Refused):
            raise said
    return list(dict.fromkeys(str(said) for said in heard))
