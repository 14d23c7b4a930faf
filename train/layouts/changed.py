"""The target as a drafter changed it (Medusa-2), merged: a model of its own, which engines load in
the place of the original.

Shapes: T tokens, D the target's width, V vocabulary.
"""

from pathlib import Path

from decoding.pretrained import Pretrained
from eval.controls import Failed
from train.layouts.given import Facts, Lent
from train.layouts.proof import CLOSE

ENGINES = ("vllm",)
NOTE = "the target as the heads changed it, merged: serve them with this one"


def write(folder: Path, facts: Facts, dtype: str) -> float:
    """Saves the target that was lent as a Hugging Face model. Returns the largest difference of a
    logit, over the largest logit, between it and what is loaded from the files again. Raises Failed
    where they differ."""
    facts.borrowed.target.model.save_pretrained(folder)
    again = Lent(Pretrained(path=str(folder), dtype=dtype).load())
    worst = 0.0
    for mine, theirs in zip(facts.borrowed.prompts, again.prompts, strict=True):
        true_TV = mine.states_LTD[-1] @ facts.borrowed.head_VD.T
        gap_TV = true_TV - theirs.states_LTD[-1] @ again.head_VD.T
        worst = max(worst, float(gap_TV.abs().max() / true_TV.abs().max()))
    if not worst <= CLOSE:
        raise Failed(
            f"the merged target in {folder.name}, loaded again, is not the one that the drafter "
            f"changed: a logit is off by {worst:.2g} of the largest, expected at most {CLOSE:g}"
        )
    return worst
