"""How far a changed target is from the original: perplexity and greedy agreement.

Shapes: T tokens, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from decoding.loop import decode
from decoding.sampling import Sampling
from decoding.target import Target


@torch.no_grad()
def changed(
    original: Target, adapted: Target, prompts: list[list[int]], tokens: int, seed: int
) -> dict[str, Any]:
    """Over answers of up to `tokens` tokens: perplexity of the original's sampled answers (T=1)
    under both; of its greedy answers' tokens, the share that the changed target would choose too
    after the same text, and how many of its own greedy answers are the same throughout."""
    loss, count = {"original": 0.0, "adapted": 0.0}, 0
    agree, seen, same = 0, 0, 0
    for number, prompt in enumerate(prompts):
        drawn = _answer(original, prompt, Sampling(1.0, seed=seed + number), tokens)
        for name, model in (("original", original), ("adapted", adapted)):
            log_TV = _log_law(model, prompt, drawn)
            loss[name] -= float(log_TV.gather(1, torch.tensor(drawn)[:, None]).sum())
        count += len(drawn)
        best, mine = (_answer(m, prompt, Sampling(), tokens) for m in (original, adapted))
        choice_T = _log_law(adapted, prompt, best).argmax(-1)
        agree += int((choice_T == torch.tensor(best)).sum())
        seen += len(best)
        same += best == mine
    perplexity = {name: float(torch.tensor(v / count).exp()) for name, v in loss.items()}
    found = {
        "perplexity": perplexity,
        "greedy_agreement": agree / seen,
        "same_answers": same,
        "prompts": len(prompts),
    }
    return found | {"said": _said(found)}


def _answer(model: Target, prompt: list[int], sampling: Sampling, tokens: int) -> list[int]:
    done = decode(model, None, [prompt], sampling=sampling, max_new_tokens=tokens)
    return done.answers[0].ids


def _log_law(model: Target, prompt: list[int], answer: list[int]) -> Tensor:
    """log p of what follows at each token of the answer, [T, V], on the CPU."""
    ids = torch.tensor([prompt + answer], device=model.device)
    hidden_TD = model(ids).hidden_BTD[0, len(prompt) - 1 : -1]
    return model.logits(hidden_TD).float().log_softmax(-1).cpu()


def _said(found: dict[str, Any]) -> str:
    was, now = found["perplexity"]["original"], found["perplexity"]["adapted"]
    return (
        "the target was changed (LoRA matrices merged), and answers are exact for the changed one: "
        f"perplexity of the original's own sampled answers {was:.2f} before, {now:.2f} after; it "
        f"agrees with {found['greedy_agreement']:.1%} of the original's greedy tokens and gives "
        f"{found['same_answers']} of {found['prompts']} greedy answers unchanged"
    )
