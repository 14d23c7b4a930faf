"""The arms of a measurement: autoregressive decoding, the drafter, and other ways to draft."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

from data.sources import prompt_key
from decoding.constraint import Constraint, Grammars
from decoding.loop import Decoded, decode
from decoding.sampling import Sampling
from decoding.target import Target
from decoding.verify import Rule
from drafters.base import Drafter
from eval.prompts import Prompt

AUTOREGRESSIVE, DRAFTER = "autoregressive", "drafter"
LOSSY = "drafter, typical acceptance (LOSSY)"
COLD, WARM = "(cold)", "(warm)"


@dataclass(frozen=True)
class Arm:
    """Who answers: a target, what drafts for it (None: nobody), and a rule of its own.

    A warm arm keeps what its drafter learnt from the prompts before it; every other begins each
    prompt cold. grammars: answers to prompts with a JSON schema must match it (None: anything may
    be said).
    """

    target: Target
    drafter: Drafter | None = None
    rule: Rule | None = None
    warm: bool = False
    grammars: Grammars | None = None

    def answer(self, prompts: list[Prompt], sampling: Sampling, max_new_tokens: int) -> Decoded:
        """A prompt's randomness is its own, whatever it is decoded with."""
        if self.drafter is not None and not self.warm:
            self.drafter.forget()
        return decode(
            self.target,
            self.drafter,
            [p.ids for p in prompts],
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            rule=self.rule,
            requests=[int(prompt_key(p.text)[:8], 16) for p in prompts],
            constraints=[self._constraint(p) for p in prompts],
        )

    def _constraint(self, prompt: Prompt) -> Constraint | None:
        if self.grammars is None or prompt.schema is None:
            return None
        return self.grammars.json(prompt.schema)


def beside(
    target: Target, baselines: Mapping[str, Drafter], grammars: Grammars | None = None
) -> dict[str, Arm]:
    """The arms of other drafters; one that remembers is measured cold and warm."""
    arms = {}
    for name, drafter in baselines.items():
        if drafter.remembers:
            arms[f"{name} {COLD}"] = Arm(target, drafter, grammars=grammars)
            taught = copy.deepcopy(drafter)
            arms[f"{name} {WARM}"] = Arm(target, taught, warm=True, grammars=grammars)
        else:
            arms[name] = Arm(target, drafter, grammars=grammars)
    return arms
