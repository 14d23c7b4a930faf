"""Engines in environments of their own, and drafters that guess well enough for them to be told
apart. A test whose engine is not installed is skipped and says so; `make interop` installs some."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from data.sources import Local
from decoding.loop import decode
from decoding.pretrained import Pretrained
from decoding.sampling import Sampling
from drafters.base import Batch, Trained, save
from drafters.eagle import Eagle
from drafters.eagle3 import Eagle3
from drafters.lm import LM
from drafters.medusa import Medusa
from eval.serve import Serve
from tests import tiny
from train.objectives import CE

ROOT = Path(__file__).resolve().parents[2]
PROMPTS, TOKENS, LENGTH = 6, 24, 3
FAMILIES: dict[str, tuple[type[Trained], dict[str, Any]]] = {
    "lm": (LM, {"layers": 1, "width": 64}),
    "medusa": (Medusa, {"heads": LENGTH}),
    "medusa2": (Medusa, {"heads": LENGTH, "target_lora": {"rank": 4, "alpha": 8}}),
    "eagle": (Eagle, {"noise": 0.0, "steps": 3, "objective_weight": 1.0}),
    "eagle3": (Eagle3, {"steps": LENGTH}),
}


def python_of(engine: str) -> Path:
    """The Python of the engine's environment; skips where there is none."""
    name = f"DRAFTSMITH_{engine.upper()}"
    python = Path(os.environ.get(name, ROOT / f".venv-{engine}" / "bin" / "python"))
    if not python.is_file():
        pytest.skip(
            f"{engine} is not installed: {python} is not there; make interop, or set {name} to the "
            "Python of an environment that has it"
        )
    return python


@pytest.fixture(scope="session")
def vllm() -> Path:
    return python_of("vllm")


@pytest.fixture(scope="session")
def openvino() -> Path:
    return python_of("openvino")


@pytest.fixture(scope="session")
def llama_cpp() -> Path:
    return python_of("llama_cpp")


@pytest.fixture(scope="session")
def speculators() -> Path:
    return python_of("speculators")


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Pretrained:
    """A random target of eight layers, as many as three taps want, its chats beside it."""
    folder = tmp_path_factory.mktemp("interop")
    path = tiny.write_target(folder / "target", tiny.write_texts(folder))
    config = AutoConfig.from_pretrained(path, num_hidden_layers=8)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tiny.write_chats(folder)
    return Pretrained(path=path, dtype="float32")


@pytest.fixture(scope="session")
def serving(spec: Pretrained) -> Callable[..., Serve]:
    """The stage, asking every engine the same few prompts."""

    def make(engines: dict[str, str | None] | None = None, **more: Any) -> Serve:
        chat = Path(str(spec.path)).with_name("chat.jsonl")
        settings = {"limit": PROMPTS, "max_new_tokens": TOKENS, "draft_length": LENGTH} | more
        return Serve(
            target=spec,
            prompts={"chat": Local(files=[str(chat)], prompt="{question}")},
            engines=engines,
            heldout_only=False,
            **settings,
        )

    return make


@pytest.fixture(scope="session")
def trained(
    spec: Pretrained, serving: Callable[..., Serve], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of a drafter that has learnt half of what the target answers to those prompts;
    made once for each family."""
    done: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in done:
            done[family] = tmp_path_factory.mktemp("drafters") / family
            save(_learnt(family, spec, serving()), done[family], FAMILIES[family][1])
            spec.tokenizer().save_pretrained(done[family])
        return done[family]

    return make


def _learnt(family: str, spec: Pretrained, stage: Serve) -> Trained:
    target, (cls, arguments) = spec.load(), FAMILIES[family]
    prompts, _ = stage._asked(200, None, None)
    done = decode(
        target, None, prompts, sampling=Sampling(), max_new_tokens=TOKENS, end_ids=frozenset()
    )
    half = list(zip(prompts, (a.ids for a in done.answers), strict=True))[: PROMPTS // 2]
    batch = Batch.of(half, target.device)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        drafter: Any = cls(target.shape, **arguments)
        drafter.initialise(target, lambda: torch.ones(target.shape.vocab_size))
        for name, parameter in drafter.named_parameters():
            if name.endswith("bias"):  # large enough to be missed
                torch.nn.init.normal_(parameter, std=3.0)
        optimiser = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
        learning = drafter.learning(target)
        for _ in range(100):
            optimiser.zero_grad()
            drafter(batch, learning, CE())[0].backward()
            optimiser.step()
    return drafter.eval()
