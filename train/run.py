"""A composed recipe -> its stages run, or planned, or viewed."""

import json
import os
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from drafters.base import write_json
from train import versions
from train.compose import bind, build
from train.launch import Launch
from train.plan import Planned, plan
from train.preflight import preflight
from train.processes.crew import Crew
from train.processes.watch import FAILED
from train.seal import reopen
from train.sweep import PAUSED, STOPPED, Job

BAD_INPUT, ENVIRONMENT = 2, 4
TRAINING = ("train.distill.Distill", "train.base.BaseTarget")
DECODING = ("eval.bench.Bench", "data.generate.Generate")  # also with a sharded target
ALONE = ("eval.tune_tree.TuneTree", "eval.skip_layers.SkipLayers")  # which load one, on one rank
SEVERAL_RANKS = (*TRAINING, *DECODING, "train.cache.CacheStates")


def run_recipe(
    name: str, config: dict[str, Any], job: Job | None = None
) -> tuple[int, dict[str, str]]:
    """Does what the switches ask; returns the exit code and, of stages that are done, the folders.
    job: of a sweep, which notes how it goes, and waits for stages that others are making.

    Where a launcher has started this command several times, that of rank 0 does it, and the others
    run its stages with it."""
    crew = Crew.here()
    if crew and not crew.leads:
        return crew.follow(config), {}
    code, stages = _run_recipe(name, config, crew, job)
    if crew:
        crew.end(code)
    return code, stages


def _run_recipe(
    name: str, config: dict[str, Any], crew: Crew | None, job: Job | None
) -> tuple[int, dict[str, str]]:
    if config["plan"]:  # priced from what is at hand: no waiting for a Hub that may not answer
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        launch, stages, root = planned(config)
        if config["plan"]:
            from train.show import show

            show(name, config, stages, root)
            return 0, {}
        if config["view"]:
            from train.view import view

            view(config, stages)
            return 0, {}
        launch.check(sys.argv[1:])
        _writable(root)
        print(*versions.shown(), sep="\n", flush=True)
        print(*preflight(config, stages, launch, root), sep="\n", flush=True)
        if crew:
            crew.begin(config)
        return _run(name, launch, stages, root, crew, job)
    except ValueError as error:
        return _say(BAD_INPUT, error, job), {}
    except OSError as error:
        return _say(ENVIRONMENT, error, job), {}
    except KeyboardInterrupt:
        return _say(130, "stopped; the same command goes on where it was", job), {}


def planned(config: dict[str, Any]) -> tuple[Launch, list[Planned], Path]:
    """The launch, stages and output folder of a resolved recipe; nothing is started or written.
    Raises ValueError for what cannot be, OSError for what cannot be read."""
    root = Path(str(config["output_dir"] or "outputs")).resolve()
    bind(config["launch"], "launch")
    launch: Launch = build(config["launch"])
    stages = plan(config, root)
    for stage in stages:
        _refuse_sharding(stage, launch.world)
        if stage.config["_target_"] in TRAINING:
            build(stage.config).schedule.micro(launch.world)  # refuses what cannot be shared
    return launch, stages, root


def _refuse_sharding(stage: Planned, ranks: int) -> None:
    """Raises ValueError for a stage that cannot use a target sharded in this way."""
    kind, parallel = stage.config["_target_"], (stage.config.get("target") or {}).get("parallel")
    if not parallel:
        return
    if kind in ALONE:
        raise ValueError(
            f"stages.{stage.name} cannot use a sharded target (target.parallel={parallel}): leave "
            f"it out (stages.{stage.name}=null), or set target.parallel=null"
        )
    trains = kind == "train.distill.Distill" and "cache" not in stage.needs
    if ranks == 1 and (kind in DECODING or (trains and build(stage.config).reads_target)):
        raise ValueError(
            f"target.parallel is {parallel}, which shards the target over several ranks, and there "
            "is one; set launch=torchrun launch.ranks=2 (or more), or target.parallel=null"
        )


def _run(
    name: str,
    launch: Launch,
    stages: list[Planned],
    root: Path,
    crew: Crew | None,
    job: Job | None,
) -> tuple[int, dict[str, str]]:
    reopen(stages)
    if job:
        job.planned(stages)
    else:
        write_json(root / f"{name}.json", {s.name: str(s.folder) for s in stages})
    for number, stage in enumerate(stages, 1):
        head = f"[{number}/{len(stages)}] {stage.name}"
        head = f"run {job.number}: {head}" if job else head
        with job.turn(stage.folder) if job and not stage.done else nullcontext():
            code = _make(head, launch, stage, crew)
        if code or not stage.done:
            return _ended(head, stage, code, job), {}
    _summary(name, stages)
    return 0, {stage.name: str(stage.folder) for stage in stages}


def _make(head: str, launch: Launch, stage: Planned, crew: Crew | None) -> int:
    """Runs a stage, unless it is done; its exit code."""
    if stage.done:
        print(f"{head}: done before, {_shown(stage.folder)}", flush=True)
        return 0
    print(f"{head}: {_shown(stage.folder)}", flush=True)
    _write(stage)
    parallel = stage.config["_target_"] in SEVERAL_RANKS
    start = crew.announce(stage.folder, launch.hang_seconds) if crew and parallel else None
    return launch.run(stage.folder, parallel, start)


def _ended(head: str, stage: Planned, code: int, job: Job | None) -> int:
    """Tells of a stage that is not done; the command's exit code."""
    if code == PAUSED:
        return code
    print(
        f"{head} ended with exit code {code}; what it has made is kept, and the same "
        "command goes on from there",
        file=sys.stderr,
    )
    if job:
        job.failed(_left(stage.folder) or f"{stage.name} ended with exit code {code}")
    return _exit_code(code)


def _left(stage: Path) -> str:
    """The sentence of a stage that failed, if it left one."""
    try:
        return str(json.loads((stage / FAILED).read_text(encoding="utf-8"))["error"])
    except (OSError, ValueError, KeyError):
        return ""


def _exit_code(code: int) -> int:
    """A launcher may report a signal or a code of its own; ours pass through."""
    return code if code in (2, 3, 4, *STOPPED) else 1


def _write(stage: Planned) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    note = {
        "name": stage.name,
        "fingerprint": stage.fingerprint,
        "config": stage.config,
        "inputs": {k: str(v) for k, v in stage.inputs.items()},
    }
    write_json(stage.folder / "stage.json", note)
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(stage.config), stage.folder / "config.yaml")


def _summary(name: str, stages: list[Planned]) -> None:
    """What was made, where it is, how fast, and the next command to type."""
    results = {s.name: json.loads((s.folder / "result.json").read_text("utf-8")) for s in stages}
    seconds = sum(r.get("seconds", 0) for r in results.values())
    print(f"\n{name}: {len(stages)} stages, {seconds / 60:.1f} minutes of work in all")
    for stage in stages:
        kind = stage.config["_target_"]
        artifact = stage.folder / "artifact"
        if kind == "eval.bench.Bench":
            from eval.report import headline_lines

            report = json.loads((artifact / "report.json").read_text(encoding="utf-8"))
            print(*(f"  {line}" for line in headline_lines(report)), sep="\n")
            print(f"  report: {_shown(artifact / 'report.md')}, {_shown(artifact / 'report.html')}")
        elif kind in ("train.publish.Publish", "train.base.BaseTarget"):
            print(f"  {stage.name}: {_shown(artifact)}")
    drafters = [s for s in stages if s.config["_target_"] == "train.distill.Distill"]
    if drafters:
        print(f"  drafter: {_shown(drafters[-1].folder / 'artifact')}")
    print("  next: the same command with view=true shows what it was trained on")


def _writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = root / f".probe-{os.getpid()}"
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"output_dir {root} cannot be written to ({error.strerror}); set output_dir=... to a "
            "folder of yours"
        ) from None
    free = shutil.disk_usage(root).free
    if free < 2**30:
        print(f"warning: {free / 2**20:.0f} MiB are free in {root}", file=sys.stderr)


def _shown(path: Path) -> str:
    """A path as short as it can be said from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _say(code: int, error: object, job: Job | None = None) -> int:
    print(f"error: {error}", file=sys.stderr)
    if job:
        job.failed(error)
    return code
