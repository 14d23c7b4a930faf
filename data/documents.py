"""Rows of a source or of the generate stage -> documents to pack."""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, cast

from data.chat import Unrenderable, render
from data.pack import Document
from data.rows import Row, Sample
from data.sources import prompt_key, prompt_of

MOST_DROPPED = 0.05  # share of conversations that may be unrenderable before it is an error
PIECE = 100_000  # characters that are tokenised at once
VALIDATION = 100  # one row in so many, by hash, measures and is never trained on


class Documents:
    """Tokenised rows, split into training and validation by a hash of the prompt (or the text).

    All answers to one prompt fall on one side. Counts what it drops, and raises ValueError when
    more than 5 % of the rows cannot be rendered with a loss mask.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self.tokenizer, self.name = tokenizer, name
        self.rows = 0
        self.dropped: Counter[str] = Counter()
        self.supervised = self.tokens = 0

    def __call__(self, rows: Iterable[Row | Sample], validation: bool) -> Iterator[Document]:
        """The documents of one side of the split."""
        for row in rows:
            if is_validation(row) != validation:
                continue
            self.rows += 1
            document = self._document(row)
            if document is not None:
                self.tokens += len(document.ids)
                self.supervised += sum(document.mask)
                yield document
        if not validation:  # a few rows, whose share says little
            self.complain()

    def _document(self, row: Row | Sample) -> Document | None:
        if "answer_ids" in row:
            sample = cast(Sample, row)
            prompt, answer = sample["prompt_ids"], sample["answer_ids"]
            return Document(prompt + answer, [False] * len(prompt) + [True] * len(answer))
        if "messages" in row:
            try:
                return Document(*render(self.tokenizer, row["messages"]))
            except Unrenderable as why:
                self.dropped[str(why)] += 1
                return None
        pieces = self.tokenizer(list(_pieces(row["text"])), add_special_tokens=False)["input_ids"]
        ids = [token for piece in pieces for token in piece]
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        if self.tokenizer.eos_token_id is not None:
            ids = [*ids, self.tokenizer.eos_token_id]
        if len(ids) < 2:
            self.dropped["it has fewer than two tokens, so none is predicted"] += 1
            return None
        return Document(ids, [True] * len(ids), splittable=True)

    def complain(self) -> None:
        """Raises ValueError when too many conversations were dropped."""
        dropped = sum(self.dropped.values())
        if dropped > MOST_DROPPED * max(1, self.rows):
            reasons = ", ".join(f"{n:,} because {why}" for why, n in self.dropped.most_common())
            raise ValueError(
                f"{dropped:,} of {self.rows:,} rows of {self.name} cannot be rendered "
                f"with a loss mask: {reasons}; check the rows and the target's chat template with "
                "view=true"
            )


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of at most PIECE characters, cut in front of white space where there is
    some: a tokenizer takes time and memory for each word that grow faster than its length."""
    while len(text) > PIECE:
        at = max(text.rfind(blank, PIECE // 2, PIECE) for blank in ("\n", " "))
        at = PIECE if at < 0 else at
        yield text[:at]
        text = text[at:]
    yield text


def is_validation(row: Row | Sample) -> bool:
    """Whether a row measures; independent of `heldout`, which keeps whole prompts for the bench."""
    if "answer_ids" in row:
        said = cast(Sample, row)["prompt"]
    else:
        said = row["text"] if "text" in row else prompt_of(row)
    key = prompt_key("validation:" + said)
    return int(key[:8], 16) % VALIDATION == 0
