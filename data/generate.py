"""Stage `generate`: the frozen target answers prompts, giving the drafter's distillation set.

Shards of JSON lines, each written whole; a shard that is there is not made again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.chat import Unrenderable, prompt_ids, require_template, template_hash
from data.language import Gated, judged_text, language_of
from data.repetition import is_repetitive
from data.rows import Message, Row, Sample
from data.sources import Source, heldout, prompt_key, prompt_of
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.pulse import item
from decoding.ranks import Ranks
from decoding.sampling import Sampling
from decoding.target import Target
from drafters.files import damage, digests, whole, write_json

NOTE = ".counts.json"  # beside each shard
SURE = 40  # characters from which an answer's language is judged


class Generate:
    """Asks the target the prompts of the training side of the split.

    Prompt i gets `answers_per_prompt` answers, the j-th at temperatures[(i + j) mod n] (Yi et al.
    2024 use 0, 0.3, 0.7, 1.0). Answers that were truncated, are degenerate or in another language
    than `language` are counted and dropped. A row keeps the exact ids, so training never
    re-tokenises what the target wrote. Several ranks share the shards of `shard_size` answers.
    """

    free = frozenset({"batch_size"})

    def __init__(
        self,
        *,
        target: Pretrained,
        prompts: Source,
        temperatures: list[float],
        language: str | None = None,
        answers_per_prompt: int = 1,
        limit: int | None = None,
        max_new_tokens: int = 512,
        max_prompt_tokens: int = 1024,
        batch_size: int = 32,
        shard_size: int = 512,
        seed: int = 0,
    ) -> None:
        for temperature in temperatures:
            Sampling(temperature=temperature)  # its own checks, before anything starts
        if limit is not None and limit < 1:
            raise ValueError(f"generate.limit is {limit}; it must be at least 1, or null for all")
        counts = (answers_per_prompt, max_new_tokens, max_prompt_tokens, batch_size, shard_size)
        if min(counts) < 1 or not temperatures:
            raise ValueError(
                "generate needs at least one temperature, and answers_per_prompt, max_new_tokens, "
                f"max_prompt_tokens, batch_size, shard_size of at least 1; got {counts}"
            )
        self.target = target.for_decoding()
        self.prompts, self.temperatures = prompts, temperatures
        self.language, self.answers_per_prompt, self.limit = language, answers_per_prompt, limit
        self.max_new_tokens, self.max_prompt_tokens = max_new_tokens, max_prompt_tokens
        self.batch_size, self.shard_size, self.seed = batch_size, shard_size, seed

    def run(self, out: Path, *, target: Path | None = None) -> dict[str, float]:
        """Writes artifact/shard-*.jsonl and data.json (counts and the template of origin)."""
        tokenizer = self.target.tokenizer(target)
        require_template(tokenizer, self.target.path or "the target")
        ranks = Ranks.here(together=self.target.parallel is not None)
        questions = ranks.decide(self._asked, alone=True)
        folder = out / "artifact"
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
        jobs = [(i, j) for i in range(len(questions)) for j in range(self.answers_per_prompt)]
        shards = [jobs[a : a + self.shard_size] for a in range(0, len(jobs), self.shard_size)]
        notes = [folder / f"shard-{number:05d}{NOTE}" for number in range(len(shards))]
        done = ranks.decide(lambda: [_done(note) for note in notes], alone=True)
        mine = [n for n in range(len(shards)) if ranks.has(n)]
        model = self.target.load(target) if not all(done[n] for n in mine) else None
        most = sum(len(shards[n]) for n in mine)
        with tqdm(total=most, unit="answer", desc="generate", disable=not ranks.first) as bar:
            for number in mine:
                if model is None or done[number]:
                    bar.update(len(shards[number]))
                    continue
                talks = self._answer(model, tokenizer, questions, shards[number], bar)
                if ranks.first or not ranks.together:
                    self._write(notes[number], talks, model, template_hash(tokenizer))
        ranks.barrier()
        return ranks.decide(lambda: self._finish(folder, notes, tokenizer), alone=True)

    def _asked(self) -> list[Row]:
        """The prompts, no two alike."""
        prompts = Gated(self.prompts, of="prompt")
        questions = list(islice(self._questions(prompts), self.limit))
        print(prompts.summary(), flush=True)
        return questions

    def _questions(self, prompts: Gated) -> Iterator[Row]:
        seen = set()
        for row in prompts:
            if "messages" not in row:
                raise ValueError(
                    f"{self.prompts.name} gives text, expected prompts: set its prompt"
                )
            key = prompt_key(judged_text(row, "prompt"))
            if key not in seen and not heldout(prompt_of(row)):
                seen.add(key)
                yield row

    def _answer(
        self,
        model: Target,
        tokenizer: Any,
        questions: list[Row],
        jobs: list[tuple[int, int]],
        bar: tqdm,
    ) -> list["_Talk"]:
        """One shard: all its conversations, turn by turn, grouped by temperature."""
        most = min(self.max_prompt_tokens, model.shape.max_positions - self.max_new_tokens)
        if most < 1:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens:,} leaves no room for a prompt in the "
                f"{model.shape.max_positions:,} positions of {model.name}; lower it"
            )
        talks = [_Talk(questions[i], self._temperature(i, j), i, j) for i, j in jobs]
        while waiting := [talk for talk in talks if talk.waiting]:
            for talk in waiting:
                talk.ask(tokenizer, most)
            ready = [talk for talk in waiting if talk.fault is None]
            ready.sort(key=lambda talk: (talk.temperature, len(talk.ids)))
            for temperature in sorted({t.temperature for t in ready}):
                group = [t for t in ready if t.temperature == temperature]
                for a in range(0, len(group), self.batch_size):
                    with item("a batch of answers"):
                        self._batch(model, tokenizer, group[a : a + self.batch_size])
                    bar.update(sum(not t.waiting for t in group[a : a + self.batch_size]))
        unasked = ("prompt too long", "refused by the chat template")
        bar.update(sum(talk.fault in unasked for talk in talks))
        return talks

    def _batch(self, model: Target, tokenizer: Any, talks: list["_Talk"]) -> None:
        sampling = Sampling(temperature=talks[0].temperature, seed=self.seed)
        done = decode(
            model,
            None,
            [talk.ids for talk in talks],
            sampling=sampling,
            max_new_tokens=self.max_new_tokens,
            requests=[talk.request for talk in talks],
        )
        for talk, answer in zip(talks, done.answers, strict=True):
            text = tokenizer.decode(answer.ids, skip_special_tokens=True)
            talk.hear(answer.ids, text, self._fault(answer.ids, text, answer.ended))

    def _fault(self, ids: list[int], text: str, ended: bool) -> str | None:
        if is_repetitive(ids):
            return "degenerate"
        if not ended:
            return "truncated"
        if not text.strip():
            return "empty"
        if self.language and len(text) >= SURE and language_of(text) != self.language:
            return "wrong language"
        return None

    def _temperature(self, i: int, j: int) -> float:
        return self.temperatures[(i + j) % len(self.temperatures)]

    def _write(self, note: Path, talks: list["_Talk"], model: Target, template: str) -> None:
        """The shard, and then its counts with its hash: a shard without is made again."""
        origin = {"target": model.name, "revision": model.revision, "template": template}
        counts: Counter[str] = Counter()
        file = _shard(note)
        with whole(file) as stream:
            for talk in talks:
                counts[talk.fault or "kept"] += 1
                if talk.samples:
                    counts["tokens"] += sum(len(s["answer_ids"]) for s in talk.samples)
                    row = talk.row() | {"seed": self.seed} | origin
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        known = {"files": digests(file.parent, [file.name]), "sha256": _hash(dict(counts))}
        write_json(note, {"counts": dict(counts)} | known)

    def _finish(self, folder: Path, notes: list[Path], tokenizer: Any) -> dict[str, float]:
        total = Counter[str]()
        for file in notes:
            total.update(json.loads(file.read_text(encoding="utf-8"))["counts"])
        tokens = total.pop("tokens", 0)
        counts = ", ".join(f"{n:,} {why}" for why, n in total.most_common())
        print(f"answers: {counts}; {tokens:,} tokens kept", flush=True)
        if not total["kept"]:
            raise ValueError(
                f"the target gave no usable answer: {counts}; raise max_new_tokens if they were "
                "truncated, look at the target itself if they are degenerate, at its chat template "
                "if that refuses the prompts"
            )
        note = {"rows": total["kept"], "tokens": tokens, "counts": dict(total)}
        write_json(folder / "data.json", note | {"template": template_hash(tokenizer)})
        everything = sum(total.values())
        return {
            "answers": total["kept"],
            "tokens": tokens,
            "kept_share": total["kept"] / everything,
        }


class _Talk:
    """One conversation being answered, turn by turn; a fault ends it before the faulty answer."""

    def __init__(self, question: Row, temperature: float, i: int, j: int) -> None:
        self.prompt = prompt_of(question)
        self.temperature, self.request = temperature, i * 1000 + j
        self.turns: list[Message] = []
        self.samples: list[dict[str, list[int]]] = []
        self.fault: str | None = None
        self.ids: list[int] = []
        self._todo = [m for m in question["messages"] if m["role"] != "assistant"]

    @property
    def waiting(self) -> bool:
        return self.fault is None and bool(self._todo)

    def ask(self, tokenizer: Any, most: int) -> None:
        """Puts the next user turn, with any system turn before it."""
        while self._todo:
            self.turns.append(self._todo.pop(0))
            if self.turns[-1]["role"] == "user":
                break
        try:
            self.ids = prompt_ids(tokenizer, self.turns)
        except Unrenderable:  # some templates know no system turn, or want user and assistant
            self.fault = "refused by the chat template"
            return
        if len(self.ids) > most:
            self.fault = "prompt too long"

    def hear(self, ids: list[int], text: str, fault: str | None) -> None:
        """Takes the target's answer to the last turn, unless something is wrong with it."""
        self.fault = fault
        if fault is None:
            self.turns.append({"role": "assistant", "content": text})
            self.samples.append({"prompt_ids": self.ids, "answer_ids": ids})

    def row(self) -> dict[str, Any]:
        answer = next(m["content"] for m in reversed(self.turns) if m["role"] == "assistant")
        return {
            "prompt": self.prompt,
            "turns": self.turns,
            "answer": answer,
            "temperature": self.temperature,
            "samples": self.samples,
        }


def read(folder: Path) -> Iterator[Sample]:
    """Every answered turn of a generate stage's artifact: prompt, prompt_ids, answer_ids.

    Raises ValueError for a shard that is not as it was written; one without counts was made by
    other means, and is read as it is.
    """
    for file in sorted(folder.glob("shard-*.jsonl")):
        note = file.with_suffix(NOTE)
        why = _fault(note) if note.is_file() else None
        if why:
            raise ValueError(f"{file} is damaged: {why}; the same command makes that shard again")
        with file.open(encoding="utf-8") as stream:
            for row in map(json.loads, stream):
                for s in row["samples"]:
                    yield Sample(
                        prompt=row["prompt"],
                        prompt_ids=s["prompt_ids"],
                        answer_ids=s["answer_ids"],
                    )


def _shard(note: Path) -> Path:
    return note.with_name(note.name.removesuffix(NOTE) + ".jsonl")


def _done(note: Path) -> bool:
    """Whether the shard of these counts is whole; says so where it was and is no longer."""
    why = _fault(note) if note.is_file() else None
    if why:
        print(f"{_shard(note).name} is made again: {why}", flush=True)
    return note.is_file() and not why


def _fault(note: Path) -> str | None:
    """What a shard lacks of what its counts say of it, or None."""
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
        mine = saved["sha256"] == _hash(saved["counts"]) and [_shard(note).name] == [
            *saved["files"]
        ]
    except (ValueError, KeyError, TypeError):
        mine = False
    return damage(note.parent, saved["files"]) if mine else f"{note.name} is not as it was written"


def _hash(counts: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()
