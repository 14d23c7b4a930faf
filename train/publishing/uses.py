"""How the card says to use a drafter: code for each engine, and whether it was run."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from eval.engines.snippets import named, snippet
from eval.forms import OWN, TARGET
from eval.markdown import interval
from train.publishing.measured import DRAFTER, plain

if TYPE_CHECKING:
    from train.publishing.card import Facts

Row = dict[str, Any]
FOLDER = "path/to/this/folder"  # what stands for a repository that has no name


def blocks(facts: "Facts") -> Iterator[str]:
    """Markdown: each engine that ran, then those that did not, then this project's own loop."""
    ran, others, nobody = asked(facts)
    for row in ran:
        yield from _ran(facts, row)
    for entry in others:
        yield from _not_run(facts, entry)
    if nobody:
        yield f"Engines: {plain(nobody)}."
    yield (
        "With draftsmith, from a clone of it; this loop made the figures below, and drafts in the "
        "shape that was measured:"
    )
    yield _python(draftsmith(_target(facts), facts.repository or FOLDER, _pinned(facts)))


def asked(facts: "Facts") -> tuple[list[Row], list[Row], str]:
    """What the stage serve ran and what it did not, and why no engine can; without that stage
    nothing was run of what the family's own layout is said to be read by."""
    if facts.served is not None:
        return facts.served["rows"], facts.served["not_run"], facts.served["nobody"]
    if facts.conditions.get("target_change"):
        return [], [], "merge `target_adapter` into the target before serving"
    if facts.family not in OWN:
        return [], [], "none serves this family; only draftsmith's own loop drafts with it"
    name, engines = OWN[facts.family]
    why = "no engine was started for this card"
    return [], [{"engine": engine, "format": name, "why": why} for engine in engines], ""


def _ran(facts: "Facts", row: Row) -> Iterator[str]:
    code, done = code_of(facts, row), row["snippet"] or {"executed": False}
    where = f"With {plain(row['version'])}, from the layout `{row['format']}`"
    if done["executed"]:
        yield f"{where}: executed, [log]({done['log']}):"
    elif code:
        yield f"{where}; this code was not executed here:"
    if code:
        yield _python(code)
    equal, tau = row["answers"]["drafting"], row["tau"]
    yield (
        f"{'There' if code else where}, in {facts.served_dtype}, {equal['identical']} of "
        f"{equal['n']} greedy answers were the target's own, {equal['near_ties']} parted at a near "
        f"tie, {equal['wrong']} were wrong; {tau['there']:.2f} tokens per target call, where "
        f"draftsmith's loop, drafting the same chain of {chain(facts)} on the same prompts, has "
        f"{interval(tau['here'])} ([log]({row['log']}))."
    )


def _not_run(facts: "Facts", entry: Row) -> Iterator[str]:
    code = code_of(facts, entry)
    name = f"{plain(entry['engine'])}, from the layout `{entry['format']}`"
    said = f"not executed here: {plain(entry['why'].partition(':')[0])}"
    yield f"With {name} ({said}):" if code else f"Also said to be read by {name} ({said})."
    if code:
        yield _python(code)


def code_of(facts: "Facts", entry: Row) -> str | None:
    """What the stage serve ran, or would run, with names in the place of folders; None: there is
    none."""
    place = facts.formats.get(entry["format"], {}).get("place", ".")
    drafter = facts.repository or FOLDER
    drafter = drafter if place == "." else f"{drafter}/{place}"
    code = (entry.get("snippet") or {}).get("code")
    try:
        code = code or snippet(entry["engine"], f"{facts.family}/{entry['format']}", chain(facts))
    except ValueError:
        return None
    target = _target(facts)
    if TARGET in facts.formats:  # the one that the drafter changes
        target = f"{facts.repository or FOLDER}/{TARGET}"
    return named(code, target, drafter)


def chain(facts: "Facts") -> int:
    """The draft length for engines, which draft chains: the one that serve asked with, else the
    one that was measured, or the depth of the tree that was."""
    if facts.served is not None:
        return int(facts.served["conditions"]["draft_length"])
    if length := facts.conditions.get("draft", {}).get("draft_length"):
        return int(length)
    rows = [row for row in facts.report["table"] if row["arm"] == DRAFTER]
    return max([len(row["acceptance"]) for row in rows], default=0) or 3


def _target(facts: "Facts") -> str:
    return facts.base or "path/to/target"


def _pinned(facts: "Facts") -> str | None:
    """The target's commit on the Hub, where that is what was measured."""
    revision = facts.provenance["target"]["revision"]
    return revision if facts.base and revision and len(revision) == 40 else None


def draftsmith(target: str, drafter: str, revision: str | None) -> str:
    """This project's loop; `published` fetches, verifies and loads, and runs no code of others."""
    where = f'path="{target}"' + (f', revision="{revision}"' if revision else "")
    return f"""from transformers import AutoTokenizer

from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.published import published

tokenizer = AutoTokenizer.from_pretrained("{drafter}")
target = Pretrained({where}).load()
drafter = published("{drafter}", target)
messages = [{{"role": "user", "content": "Hello! How are you?"}}]
ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
done = decode(drafter.on(target), drafter, [ids], sampling=Sampling(), max_new_tokens=64)
print(tokenizer.decode(done.answers[0].ids))"""


def _python(code: str) -> str:
    return f"```python\n{code.strip()}\n```"
