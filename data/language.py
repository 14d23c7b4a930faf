"""What language a text is in, and a gate that lets rows of one language through.

The script decides first: it cannot be wrong about Hangul, kana or ideographs. Among the languages
of one script py3langid decides (langid.py's naive Bayes over byte n-grams). On Tatoeba sentences
of 20 to 29 letters it names de, fr and en rightly in more than 99 % and ru in 96 %; with fewer
than 10 letters in 60 to 90 %, which is why Gate does not listen to it there.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from statistics import median
from typing import Any, Literal, NamedTuple

from data.quality import MOJIBAKE, Repeats, is_mojibake, refuse_poor
from data.rows import Row
from data.sources import Source, by_turns

PROBE = 2_000  # rows after which the share of the language is checked
FEW = 20  # letters below which a verdict among the languages of one script is noise
LOOK = 4_000  # characters of a text that are looked at
HUGE = 1_000_000  # characters of a conversation; one of more would fit into no target's context
UNKNOWN = "und"
OTHER = "other language: "

# The languages that are told apart, by the script that nearly all of their text is in.
SCRIPTS = {
    "hangul": "ko",
    "kana": "ja",
    "han": "zh",
    "cyrillic": "ba be bg kk ky mk mn ru sr tg tt uk",
    "latin": "af az br bs ca cs cy da de en eo es et eu fi fo fr fy ga gd gl ha hr ht hu id ig is "
    "it jv ku la lb lg ln lt lv mg ms mt nl nn no oc om pl pt qu ro rw se sk sl sn so sq st sv sw "
    "tk tl tr uz vi wa xh yo zu",
    "other": "am ar as bn dz el fa gu he hi hy ka km kn lo ml mr my ne or pa ps sa si ta te th ug "
    "ur",
}
SCRIPT_OF = {code: script for script, codes in SCRIPTS.items() for code in codes.split()}
MISTAKEN = {"kr": "ko", "jp": "ja", "cn": "zh", "cz": "cs", "dk": "da", "gr": "el", "ua": "uk"}

HANGUL = re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3131-\u318e]")
KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa\u31f0-\u31ff\uff66-\uff9d]")
HAN = re.compile(r"[\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
CYRILLIC = re.compile(r"[\u0400-\u052f]")
LATIN = re.compile(r"[A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]")
LETTER = re.compile(r"[^\W\d_]")


class Verdict(NamedTuple):
    language: str  # ISO 639-1 or "und"
    script: str  # a key of SCRIPTS, or "" without letters
    letters: int  # of that script


def language_of(text: str) -> str:
    """ISO 639-1 code of the language that most of the text is in, "und" if it has no letters.

    Hangul is ko; kana is ja, also where ideographs outnumber it up to nine to one; ideographs
    without kana are zh. Everything else is told by py3langid: Latin, Cyrillic (ru, uk, bg and
    nine more), Arabic and so on. In mixed text the script with most letters decides, where a
    Hangul syllable or a kana counts for two and an ideograph for three, as many as their sounds
    take in Latin letters (a Korean paragraph full of English terms is Korean). Only the first
    4,000 characters are looked at. Short text in Latin script is unreliable: see FEW.
    """
    return judge(text).language


def judge(text: str) -> Verdict:
    """The language and what the verdict rests on."""
    text = text[:LOOK]
    hangul, kana, han = (len(letter.findall(text)) for letter in (HANGUL, KANA, HAN))
    latin, cyrillic = len(LATIN.findall(text)), len(CYRILLIC.findall(text))
    other = len(LETTER.findall(text)) - hangul - kana - han - latin - cyrillic
    asian = {"hangul": 2 * hangul, "kana" if 9 * kana >= han else "han": 2 * kana + 3 * han}
    weights = asian | {"latin": latin, "cyrillic": cyrillic, "other": other}
    script = max(weights, key=weights.__getitem__)
    if weights[script] <= 0:
        return Verdict(UNKNOWN, "", 0)
    if script in ("hangul", "kana", "han"):
        return Verdict(SCRIPTS[script], script, hangul if script == "hangul" else kana + han)
    return Verdict(_identifier().classify(text)[0], script, weights[script])


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    alphabetic = [code for code in SCRIPT_OF if code not in ("ko", "ja", "zh")]
    identifier.set_languages(alphabetic)
    return identifier


class Gate:
    """Lets the rows through that are in `language` and of a fit length, and counts the others.

    of: what of a chat row is judged, by length and language alike: "prompt", the user's turns;
    "answer", the assistant's; "all", every turn. Of a row with `text` it is always the text.
    language: ISO 639-1, None to let every language through.
    min_share: of the first 2,000 rows of fit length (of all, in a smaller source), the share
    that must be in the language; below it something is wrong with the source, not with rows.
    min_chars, max_chars: bounds on the length of what is judged, in characters.

    A row whose script is that of the language but which has fewer than 20 letters of it, in
    Latin, Cyrillic or another script of many languages, is kept without asking for its language:
    the verdict would be noise. Such rows count neither for nor against the share. Rows without
    any letter are in no language ("und") and dropped. A chat row with a blank turn is empty, one of
    more than 1,000,000 characters too long. Rows in broken characters and rows that repeat an
    earlier one are dropped, and many of them refused: see data.quality.
    """

    def __init__(
        self,
        language: str | None,
        *,
        min_share: float = 0.8,
        min_chars: int = 1,
        max_chars: int | None = None,
        of: Literal["prompt", "answer", "all"] = "prompt",
    ) -> None:
        _check_language(language)
        if not 0 <= min_share <= 1:
            raise ValueError(f"min_share is {min_share}, expected 0 to 1: set it, 0.8 is usual")
        if min_chars < 0 or (max_chars is not None and max_chars < max(min_chars, 1)):
            raise ValueError(
                f"min_chars is {min_chars} and max_chars {max_chars}, expected "
                "0 <= min_chars <= max_chars: correct them"
            )
        if of not in ("prompt", "answer", "all"):
            raise ValueError(f"of is {of!r}, expected prompt, answer or all: correct it")
        self.language, self._min_share, self._of = language, min_share, of
        self._min_chars, self._max_chars = min_chars, max_chars
        self._start()

    def __call__(self, rows: Iterable[Row], name: str = "the source") -> Iterator[Row]:
        """Yields the rows that pass; the counts start anew.

        Holds back at most 2,000 rows until the share is known. Raises ValueError when the share
        is below min_share, and at the end when no row passed; `name` is the source's in those.
        """
        self._start()
        held: list[Row] = []
        probing = self.language is not None
        for row in rows:
            if self._passes(row):
                held.append(row)
            if self.read == PROBE:
                refuse_poor(name, self.read, self.dropped)
            if not probing:
                yield from held
                held.clear()
            elif self._found.total() + self.unsure >= PROBE:
                self._check_share(name)
                probing = False
        refuse_poor(name, self.read, self.dropped)
        if probing:
            self._check_share(name)
        self._check_left(name)
        yield from held

    @property
    def kept(self) -> int:
        """Rows that passed."""
        return self.read - self.dropped.total()

    def summary(self) -> str:
        """A sentence with the counts of the last call."""
        told = f"kept {self.kept:,} of {self.read:,} rows"
        told += f": {self._reasons()}" if self.dropped else ""
        told += f"; {self.unsure:,} kept with too few letters to tell" if self.unsure else ""
        return told

    def _start(self) -> None:
        self.read = 0
        self.unsure = 0  # rows kept without a verdict
        self.dropped: Counter[str] = Counter()  # reason -> rows; "other language: en" and so on
        self._found: Counter[str] = Counter()  # language -> rows with a verdict
        self._lengths: dict[str, list[int]] = {"too short": [], "too long": []}
        self._repeats = Repeats()

    def _passes(self, row: Row) -> bool:
        self.read += 1
        text = judged_text(row, self._of)
        reason = self._misfit(row, text) or self._repeats(row) or self._foreign(text)
        if reason is not None:
            self.dropped[reason] += 1
        return reason is None

    def _misfit(self, row: Row, text: str) -> str | None:
        blank = any(not turn["content"].strip() for turn in row.get("messages", []))
        if blank or not text.strip():
            return "empty"
        if is_mojibake(text):
            return MOJIBAKE
        short = len(text) < self._min_chars
        most = HUGE if self._max_chars is None and "messages" in row else self._max_chars
        if not short and (most is None or len(text) <= most):
            return None
        reason = "too short" if short else "too long"
        if len(self._lengths[reason]) < 10_000:  # a median of so many is exact enough
            self._lengths[reason].append(len(text))
        return reason

    def _foreign(self, text: str) -> str | None:
        if self.language is None:
            return None
        verdict = judge(text)
        mine = SCRIPT_OF[self.language]
        one_of_many = mine in ("latin", "cyrillic", "other")
        if one_of_many and verdict.script == mine and verdict.letters < FEW:
            self.unsure += 1
            return None
        self._found[verdict.language] += 1
        right = verdict.language == self.language
        return None if right else OTHER + verdict.language

    def _check_share(self, name: str) -> None:
        total, right = self._found.total(), self._found[self.language or ""]
        if not total or right >= self._min_share * total:
            return
        others = [pair for pair in self._found.most_common(5) if pair[0] != self.language][:4]
        shown = "".join(f", {_percent(n, total)} {code}" for code, n in others)
        raise ValueError(
            f"asked for {self.language}, found {_percent(right, total)} {self.language}{shown} "
            f"in {total:,} rows of {name}: wrong file, column or filter; "
            "set language to what it is, or min_share lower"
        )

    def _check_left(self, name: str) -> None:
        if not self.read:
            raise ValueError(f"{name} has no rows, expected at least one: check its filters")
        if not self.kept:
            raise ValueError(
                f"every row filtered: 0 of {self.read:,} rows of {name} left: {self._reasons()}: "
                "widen min_chars, max_chars or language, or name another column"
            )

    def _reasons(self) -> str:
        plain = {why: n for why, n in self.dropped.most_common() if not why.startswith(OTHER)}
        told = [(n, f"{n:,} {why}{self._median(why)}") for why, n in plain.items()]
        other = [(w, n) for w, n in self.dropped.most_common() if w.startswith(OTHER)]
        if other:
            first = ", ".join(f"{why.removeprefix(OTHER)} {n:,}" for why, n in other[:5])
            more = f" and {len(other) - 5} more" if len(other) > 5 else ""
            total = sum(n for _, n in other)
            told.append((total, f"{total:,} other language ({first}{more})"))
        return ", ".join(text for _, text in sorted(told, key=lambda pair: -pair[0]))

    def _median(self, reason: str) -> str:
        lengths = self._lengths.get(reason)
        return f" (median {median(lengths):,.0f} characters)" if lengths else ""


class Gated:
    """The rows of a source that pass, each part of it behind a gate of its own."""

    def __init__(self, source: Source, of: Literal["prompt", "answer", "all"]) -> None:
        self._gates = [(part, Gate(part.language, of=of)) for part in source.parts()]

    def __iter__(self) -> Iterator[Row]:
        return by_turns(gate(part.rows(), part.name) for part, gate in self._gates)

    def summary(self) -> str:
        """What each gate kept and dropped, a line a part."""
        return "\n".join(f"{part.name}: {gate.summary()}" for part, gate in self._gates)


def judged_text(row: Row, of: Literal["prompt", "answer", "all"]) -> str:
    """The part of the row that `of` names, its turns one a line; the text of a row with text."""
    if "messages" not in row:
        return row["text"]
    role = {"prompt": "user", "answer": "assistant"}.get(of)
    return "\n".join(t["content"] for t in row["messages"] if role in (None, t["role"]))


def _check_language(language: str | None) -> None:
    if language is None or language in SCRIPT_OF:
        return
    meant = MISTAKEN.get(language.lower(), language.lower()[:2])
    hint = f"did you mean {meant}?" if meant in SCRIPT_OF else f"known: {' '.join(SCRIPT_OF)}"
    raise ValueError(
        f"language is {language!r}, expected an ISO 639-1 code that can be told apart, "
        f"such as ko, de or zh: {hint}"
    )


def _percent(part: int, total: int) -> str:
    share = 100 * part / total
    return f"{share:.0f} %" if part == 0 or share >= 1 else f"{share:.1f} %"
