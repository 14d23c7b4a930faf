"""Stage `shootout`: several families on one target, data and token budget, in one table.

Each family was trained and measured by stages of its own, on the same prompts and each beside
autoregressive decoding in its own process; this puts their reports together.
"""

import json
from pathlib import Path
from typing import Any

from drafters.base import write_json
from eval.markdown import interval, number, times

Row = dict[str, Any]
HEAD = ("family", "T", "speedup", "tau", "acceptance by position", "draft", "trained parameters",
        "training tokens", "last quarter", "tokens/s", "peak memory")  # fmt: skip


class Shootout:
    """Compares what bench stages found; `needs` maps each family's name to its bench stage."""

    def run(self, out: Path, **reports: Path) -> dict[str, float]:
        """Writes artifact/: shootout.json, shootout.md and shootout.png; returns each family's
        speedup at the lowest temperature."""
        if not reports:
            raise ValueError("shootout needs the bench stage of each family: needs: {medusa: ...}")
        rows = [row for name, report in reports.items() for row in _rows(name, report)]
        if not rows:
            raise ValueError("no family was measured at batch 1: add 1 to the benches' batch_sizes")
        folder = out / "artifact"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "shootout.json", {"rows": rows})
        text = table(rows)
        (folder / "shootout.md").write_text(text + "\n", encoding="utf-8")
        draw(rows, folder / "shootout.png")
        print(text, flush=True)
        cold = min(row["temperature"] for row in rows)
        return {
            f"speedup_{row['family']}": row["speedup"]["value"]
            for row in rows
            if row["temperature"] == cold and row["speedup"]["value"] is not None
        }


def _rows(name: str, report: Path) -> list[Row]:
    """One family's headline at each temperature, and what its training took."""
    measured = json.loads((report / "report.json").read_text(encoding="utf-8"))
    note = json.loads((report.parent / "stage.json").read_text(encoding="utf-8"))
    stage = Path(note["inputs"]["drafter"]).parent
    training = json.loads((stage / "result.json").read_text(encoding="utf-8"))
    config = json.loads((stage / "stage.json").read_text(encoding="utf-8"))["config"]
    cells = {
        (row["temperature"]): row
        for row in measured["table"]
        if row["arm"] == "drafter" and row["batch"] == 1
    }
    return [
        {
            "family": name,
            "temperature": entry["temperature"],
            "speedup": entry["speedup"],
            "tau": entry["tau"],
            "n": entry["n"],
            "acceptance": [
                p["conditional"]["value"] for p in cells[entry["temperature"]]["acceptance"]
            ],
            "draft": measured["conditions"]["draft_shape"],
            "parameters": measured["conditions"]["parameters_drafter"],
            "training_tokens": _tokens(stage),
            "learning_rate": config["optim"]["lr"],
            "tokens_per_second": training.get("tokens_per_second"),
            "peak_memory_mib": training.get("peak_memory_mib"),
            "last_quarter_gain": training.get("last_quarter_gain"),
            "passed": measured["passed"],
            "changed": "target_change" in measured["conditions"],
        }
        for entry in measured["headline"]
    ]


def _tokens(stage: Path) -> int:
    """Of this training and those that it started from."""
    note = json.loads((stage / "stage.json").read_text(encoding="utf-8"))
    before = note["inputs"].get("drafter")
    tokens = int(note["config"]["schedule"]["tokens"])
    return tokens + (_tokens(Path(before).parent) if before else 0)


def _name(row: Row) -> str:
    name = row["family"] + (" (target CHANGED)" if row["changed"] else "")
    return name if row["passed"] else f"{name} (a control FAILED)"


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, the fastest first."""
    ordered = sorted(rows, key=lambda row: (row["temperature"], -(row["speedup"]["value"] or 0)))
    lines = [HEAD, ["---"] * len(HEAD)]
    for row in ordered:
        accepted = " ".join("-" if a is None else f"{a:.2f}" for a in row["acceptance"])
        memory = row["peak_memory_mib"]
        lines.append(
            (
                *(_name(row), f"{row['temperature']:g}", interval(row["speedup"], times)),
                *(interval(row["tau"], number), accepted, row["draft"], f"{row['parameters']:,}"),
                f"{row['training_tokens']:,}",
                "-" if row["last_quarter_gain"] is None else f"{row['last_quarter_gain']:+.1%}",
                f"{row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else "-",
                f"{memory:,.0f} MiB" if memory else "-",
            )
        )
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def draw(rows: list[Row], path: Path) -> None:
    """Speedup and tau of each family, with their intervals, a colour a temperature."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from eval.picture import COLOURS, GREY

    names = list(dict.fromkeys(_name(row) for row in rows))
    figure = Figure(figsize=(12, 1.6 + 0.55 * len(names)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    temperatures = sorted({row["temperature"] for row in rows})
    for panel, key, said in zip(
        panels, ("speedup", "tau"), ("times as fast as no drafting", "tokens per target call"),
        strict=True,
    ):  # fmt: skip
        for i, t in enumerate(temperatures):
            for row in (row for row in rows if row["temperature"] == t):
                value, low, high = (row[key][k] for k in ("value", "low", "high"))
                if value is None:
                    continue
                place = names.index(_name(row)) + (i - (len(temperatures) - 1) / 2) * 0.35
                error = None  # one prompt has no interval
                if low is not None:
                    error = [[max(0, value - low)], [max(0, high - value)]]
                panel.barh(place, value, height=0.32, color=COLOURS[i], xerr=error, capsize=3)
        panel.axvline(1, color=GREY, linestyle="dashed", linewidth=1)
        panel.set(xlabel=f"{said} (95 % intervals)", xlim=(0, None))
        panel.set_yticks(range(len(names)), names)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    figure.legend(
        handles=[_patch(COLOURS[i], f"T={t:g}") for i, t in enumerate(temperatures)],
        loc="outside lower center", ncols=len(temperatures), frameon=False,
    )  # fmt: skip
    figure.savefig(path, format="png")


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)
