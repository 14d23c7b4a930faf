"""Whether a drafter's tokenizer is its target's: by ids and texts, never by sizes alone.

Shapes: R rows of the drafter's matrices, V of the target's, D width.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from data.chat import PROBE, require_same_tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class Vocabulary:
    """identical; suffix-padded: ids mean the same up to some id, and from there on one of the two
    has rows or tokens that the other lacks; untold: no tokenizer came with the drafter. tokens: how
    many ids are in common; said: a sentence."""

    verdict: Literal["identical", "suffix-padded", "untold"]
    tokens: int
    said: str


def compare(ours: Any, folder: Path, rows: int | None, target_rows: int) -> Vocabulary:
    """The target's tokenizer against the one in a drafter's folder. rows: R of its matrices, None
    where it has none with a row for each token; target_rows: V.

    Raises ValueError, naming the first difference, where they are incompatible.
    """
    if not any((folder / name).is_file() for name in FILES):
        if rows not in (None, target_rows):
            raise ValueError(
                f"the drafter has {rows:,} tokens and the target {target_rows:,}, and no tokenizer "
                f"says which are the same: put that of its own target into {folder}"
            )
        said = "it comes without a tokenizer, so only the number of its tokens could be compared"
        return Vocabulary("untold", target_rows, said)
    theirs = _tokenizer(folder)
    mine, its = ({i: t for t, i in each.get_vocab().items()} for each in (ours, theirs))
    if mine == its:
        require_same_tokenizer(ours, str(folder))  # many texts, and a word on chat templates
    elif difference := _first_difference(mine, its) or _other_cut(ours, theirs):
        raise ValueError(
            f"the tokenizer of the drafter is not the target's: {difference}; a drafter reads and "
            "guesses ids, so it must share its target's tokenizer"
        )
    shared = max(mine.keys() & its.keys()) + 1
    if rows is not None and rows < shared:
        raise ValueError(
            f"the drafter has {rows:,} rows for the {shared:,} tokens of its tokenizer: its files "
            "do not belong together; get them again"
        )
    same = mine == its and rows in (None, target_rows)
    told = [_shared(mine, its, shared)]
    if rows not in (None, target_rows):
        told.append(f"its {rows:,} rows become {target_rows:,}")
    told += _other_special(ours, theirs)
    return Vocabulary("identical" if same else "suffix-padded", shared, "; ".join(told))


def resized(matrix: Tensor, rows: int) -> Tensor:
    """The first V rows of an [R, ...] tensor; rows that it lacks are the mean of those it has, so
    that such a token is never the likeliest (False where it says which tokens are drafted)."""
    if rows <= len(matrix):
        return matrix[:rows].clone()
    if matrix.dtype == torch.bool:
        added = matrix.new_zeros(matrix[:1].shape)
    else:
        added = matrix.float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, added.expand(rows - len(matrix), *matrix.shape[1:])])


def _shared(mine: dict[int, str], its: dict[int, str], shared: int) -> str:
    if mine == its:
        return f"all its {len(its):,} tokens are the target's"
    lacks = [len(a.keys() - b.keys()) for a, b in ((its, mine), (mine, its))]
    return (
        f"its first {shared:,} tokens are the target's; behind them it has {lacks[0]:,} and the "
        f"target {lacks[1]:,} that the other lacks"
    )


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _first_difference(mine: dict[int, str], its: dict[int, str]) -> str | None:
    """The first id that means two things, or that one of the two lacks before it ends."""
    both = mine.keys() & its.keys()
    if not both:
        return "they have no id in common"
    wrong = [i for i in both if mine[i] != its[i]]
    wrong += [i for i in mine.keys() ^ its.keys() if i < max(both)]
    if not wrong:
        return None
    at = min(wrong)
    its_token, my_token = (repr(t[at]) if at in t else "nothing" for t in (its, mine))
    return f"id {at} is {its_token} in it and {my_token} in the target's"


def _other_cut(ours: Any, theirs: Any) -> str | None:
    its, mine = (t(PROBE, add_special_tokens=False)["input_ids"] for t in (theirs, ours))
    if its == mine:
        return None
    at = next((i for i, (a, b) in enumerate(zip(its, mine, strict=False)) if a != b), 0)
    return f"the same text is {its[at : at + 4]} in it and {mine[at : at + 4]} in the target's"


def _other_special(ours: Any, theirs: Any) -> list[str]:
    """Ids may mark an end or a beginning in one of the two alone: the target's count."""
    return [
        f"its {name} is {getattr(theirs, name)} and the target's, which counts, "
        f"{getattr(ours, name)}"
        for name in SPECIAL
        if getattr(ours, name) != getattr(theirs, name)
    ]
