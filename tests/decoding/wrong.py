"""Wrong drafters (mix into LM or TableLM), rules and numbers, which the law must show."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from decoding.round import Draft, Verdict
from decoding.sampling import Purpose, Sampling, draw
from decoding.verify import Block
from decoding.verify import Chain as ChainRule
from drafters.trees import Chain


class _Draws:
    """Draws by `law` and records q as it was."""

    def chain(self) -> Chain:
        chain = super().chain()  # type: ignore[misc]
        chain.draw = lambda law_BV, u_B: draw(self.law(law_BV), u_B)
        return chain

    def law(self, law_BV: Tensor) -> Tensor:
        raise NotImplementedError


class DrawsArgmax(_Draws):
    """Takes the likeliest token but says that it was drawn from q."""

    def law(self, law_BV: Tensor) -> Tensor:
        return (law_BV == law_BV.amax(-1, keepdim=True)).float()


class DrawsCooler(_Draws):
    """Draws at temperature 0.7 and records q at temperature 1."""

    def law(self, law_BV: Tensor) -> Tensor:
        return law_BV ** (1 / 0.7)


class DrawsTopTwo(_Draws):
    """Draws among its two likeliest tokens and records q before that filter."""

    def law(self, law_BV: Tensor) -> Tensor:
        return law_BV.where(law_BV >= law_BV.topk(2, dim=-1).values[:, 1:], 0.0)


class DropsTrigger:
    """Leaves out the token whose low probability stopped the draft."""

    def propose(self, state, seen, target) -> Draft:
        draft = super().propose(state, seen, target)  # type: ignore[misc]
        assert draft.q_BMV is not None
        size = list(draft.size)
        for b, n in enumerate(size):
            if draft.q_BMV[b, n - 1, draft.ids_BN[b, n - 1]] < self.stop_below:  # type: ignore
                size[b] = n - 1
        return replace(draft, size=size)


class _WrongResidual(ChainRule):
    def _verify(self, logits_BMV, draft, dice) -> Verdict:
        verdict = super()._verify(logits_BMV, draft, dice)
        p_BMV = dice.sampling.law(logits_BMV)
        count = [len(path) for path in verdict.path]
        u_B = dice.next(torch.tensor(count)[:, None])[:, 0]
        following = list(verdict.next)
        for b, n in enumerate(count):
            if n < draft.size[b]:
                assert draft.q_BMV is not None
                law_V = self.residual(p_BMV[b, n], draft.q_BMV[b, n])
                following[b] = int(draw(law_V, u_B[b]))
        return Verdict(verdict.path, following)

    def residual(self, p_V: Tensor, q_V: Tensor) -> Tensor:
        raise NotImplementedError


class ResamplesFromP(_WrongResidual):
    def residual(self, p_V: Tensor, q_V: Tensor) -> Tensor:
        return p_V


class SoftmaxOfResidual(_WrongResidual):
    def residual(self, p_V: Tensor, q_V: Tensor) -> Tensor:
        return (p_V - q_V).clamp(min=0).softmax(-1)


class AcceptsByP(ChainRule):
    """Accepts with p where the rule says p / q."""

    def _verify(self, logits_BMV, draft, dice) -> Verdict:
        certain = replace(draft, q_BMV=torch.ones_like(draft.q_BMV))
        return super()._verify(logits_BMV, certain, dice)


class BlockForgetsWeight(Block):
    """Draws from norm((p - q)+) where block verification needs norm((pi p - q)+)."""

    def _verify(self, logits_BMV, draft, dice) -> Verdict:
        import decoding.verify as verify

        true = verify._finish
        verify._finish = lambda p, q, weight, *rest: true(p, q, torch.ones_like(weight), *rest)
        try:
            return super()._verify(logits_BMV, draft, dice)
        finally:
            verify._finish = true


class SharedPurposes(Sampling):
    """Decides acceptance with the numbers that the draft was drawn with."""

    def uniforms(self, purpose, requests, starts, n) -> Tensor:
        return super().uniforms(Purpose.DRAFT, requests, starts, n)


class SamePosition(Sampling):
    """Draws the target's own token with one number a request: each first token is right."""

    def uniforms_at(self, requests, positions_BM) -> Tensor:
        return super().uniforms_at(requests, torch.zeros_like(positions_BM))


class KeyedByPosition(Sampling):
    """Keys accept and draft numbers by absolute position: a later round meets them again."""

    def uniforms(self, purpose, requests, starts, n) -> Tensor:
        places = np.array(starts)[:, None] + np.arange(n)[None, :]
        return self._hash(purpose, requests, places, np.zeros((1, 1)))
