"""Whether a model does what the loop asks of its target: masks, positions and a cache of ours."""

import torch
from torch import Tensor

from decoding.round import Draft
from decoding.target import Target


def probe(target: Target) -> None:
    """A packed pass and a drafted tree of a handful of tokens must give the model's own logits:
    some models scale them on the way, others do not read our mask, positions or cache."""
    model = type(target.model).__name__
    try:
        gaps = _gaps(target)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{target.name}: {model} does not run with a mask, positions and a cache of ours "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); choose a target with "
            "ordinary full attention in every layer"
        ) from error
    what = {
        "head": "changes them on their way from the last state",
        "mask": "does not keep packed documents apart",
        "cache": "does not read a tree of drafted tokens over our cache",
    }
    for key, gap in gaps.items():
        if not gap <= (0.01 if target.dtype.itemsize >= 4 else 0.05):
            raise ValueError(
                f"{target.name}: logits differ from the model's own by {gap:.1%} of their spread "
                f"because {model} {what[key]} in a way that is not supported; choose another target"
            )


@torch.inference_mode()
def _gaps(target: Target) -> dict[str, float]:
    """How far our logits are from the model's own over two sequences that part after three."""
    # spread over the vocabulary: the first ids are bytes and marks that training may never show
    ids_T = torch.arange(1, 8, device=target.device) * target.shape.vocab_size // 8
    ids_BT = ids_T[torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]], device=target.device)]
    own = target.model(input_ids=ids_BT, output_hidden_states=True)
    own_BTV = own.logits.float()
    doc_BT = torch.tensor([[0] * 5 + [1] * 5], device=target.device)
    packed_BTV = target.logits(target(ids_BT.view(1, -1), doc_BT=doc_BT).hidden_BTD)
    cache = target.new_cache(1, 8)
    target.prefill(ids_T[None, :3], [3], cache)
    draft = Draft(ids_T[None, [3, 5, 4, 6]], torch.tensor([[-1, -1, 0, 1]]), [4])
    drafted_MV = target.score(ids_T[2:3], draft, cache).logits_BMV[0].float()
    due_MV = own_BTV[[0, 0, 1, 0, 1], [2, 3, 3, 4, 4]]
    spread = (own_BTV - own_BTV.mean(-1, keepdim=True)).pow(2).mean().sqrt()

    def gap(ours: Tensor, due: Tensor) -> float:
        return ((ours - due).pow(2).mean().sqrt() / spread).item()

    return {
        "head": gap(target.logits(own.hidden_states[-1]).float(), own_BTV),
        "mask": gap(packed_BTV.float().view_as(own_BTV), own_BTV),
        "cache": gap(drafted_MV, due_MV),
    }
