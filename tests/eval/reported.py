"""Reports of sweeps that are made up."""

import json
from pathlib import Path
from typing import Any

from eval.joint import Interval, Known


def write_laws(root: Path, name: str, runs: list[Known], target: str = "t", **more: Any) -> Path:
    """laws.json as `python -m eval.sweep` writes it."""
    rows = [row(run, **more) for run in runs]
    folder = root / "sweeps" / name / "report"
    folder.mkdir(parents=True)
    told = {"target": target, "conditions": {}, "laws": [], "runs": rows}
    (folder / "laws.json").write_text(json.dumps(told))
    return folder


def row(run: Known, **more: Any) -> dict[str, Any]:
    def cells(found: Interval | None) -> list[dict[str, Any]]:
        first = {"temperature": 0.0, "batch": 1, **found._asdict(), "n": 9} if found else {}
        other = {"temperature": 0.0, "batch": 8, "value": 9.0, "low": 9.0, "high": 9.0, "n": 9}
        return [other | {"temperature": 1.0, "batch": 1}, other, first or other]

    trained = {"finetune": run.of.tokens} | ({"pretrain": run.of.before} if run.of.before else {})
    name, _, threads = run.machine.rpartition(", ")
    verify = {str(m): ms for m, ms in run.verify.items()}
    prompts, _, tokens = run.prompts.partition(", ")
    return {
        **{"name": "n", "overrides": {"stages.finetune.schedule.tokens": "3"}, "code": 0},
        **{"family": run.of.family, "parameters": run.of.parameters, "depth": run.of.depth or 1},
        **{"trained": trained, "bench": run.bench, "draft_length": run.length},
        **{"draft_shape": f"chain of {run.length}", "tau": cells(run.tau)},
        **{"speedup": cells(run.speedup), "train_tokens_per_second": run.rate},
        "fixed": run.fixed,
        "costs": {
            "draft_ms": (run.token or 0) * run.length,
            "verify_ms": verify,
            "overhead_ms": run.overhead,
        },
        "conditions": {
            **{"machine": name, "threads": int(threads.split()[0])},
            **{"prompts": prompts, "max_new_tokens": int(tokens.split()[0])},
        },
    } | more
