"""Wrong drafters (mix into LM or TableLM), rules and numbers, which the law must show."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from decoding.round import Draft, Verdict
from decoding.sampling import Purpose, Sampling, draw
from decoding.verify import Block, Chain


class DrawsArgmax:
    """Takes the likeliest token but says that it was drawn from q."""

    def _guess(self, guesses, logits_BV, sampling, u_B) -> None:
        super()._guess(guesses, logits_BV, sampling, u_B)  # type: ignore[misc]
        guesses.ids[-1] = logits_BV.argmax(-1)


class DrawsCooler:
    """Draws at temperature 0.7 and records q at temperature 1."""

    def _guess(self, guesses, logits_BV, sampling, u_B) -> None:
        super()._guess(guesses, logits_BV, sampling, u_B)  # type: ignore[misc]
        guesses.ids[-1] = draw((logits_BV / 0.7).softmax(-1), u_B)


class DrawsTopTwo:
    """Draws among its two likeliest tokens and records q before that filter."""

    def _guess(self, guesses, logits_BV, sampling, u_B) -> None:
        super()._guess(guesses, logits_BV, sampling, u_B)  # type: ignore[misc]
        second = logits_BV.topk(2, dim=-1).values[:, 1:]
        few_BV = logits_BV.masked_fill(logits_BV < second, -torch.inf)
        guesses.ids[-1] = draw(few_BV.softmax(-1), u_B)


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


class _WrongResidual(Chain):
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
