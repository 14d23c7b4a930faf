"""Data and chat models small enough to train within a second; nothing here leaves the machine."""

import json
import random
from pathlib import Path
from typing import Any

WORDS = ["Hund", "sieht", "eine", "Katze", "trinkt", "Milch", "am", "Abend", "im", "Garten", "Haus"]


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 12)))


def write_texts(folder: Path, rows: int = 400, name: str = "text.jsonl") -> str:
    """JSON lines with `text`, no two alike; returns the file's name."""
    rng = random.Random(1)
    texts = [f"{i}: {sentence(rng)}." for i in range(rows)]
    return _lines(folder / name, [{"text": text} for text in texts])


def write_chats(folder: Path, rows: int = 400, name: str = "chat.jsonl") -> str:
    """JSON lines with `question` and `answer`."""
    rng = random.Random(2)
    return _lines(
        folder / name,
        [{"question": f"{i}? {sentence(rng)}", "answer": sentence(rng)} for i in range(rows)],
    )


def _lines(file: Path, records: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
    file.write_text(text, encoding="utf-8")
    return str(file)


def tokenizer(file: str) -> Any:
    """The tokenizer that the stage `target` would make of this file: 300 tokens, chat template."""
    from data.sources import Local
    from train.base import BaseTarget
    from train.schedule import AdamW, Schedule

    stage = BaseTarget(
        data=Local(files=[file], text="{text}"),
        schedule=Schedule(tokens=64, batch_tokens=64, sequence_length=64),
        optim=AdamW(),
        vocab_size=300,
    )
    return stage.make_tokenizer()


def write_target(folder: Path, file: str, *, ends: int = 0, dtype: str = "float32") -> str:
    """A random chat model over `file`'s tokenizer, 2 layers of 64; returns the folder's name.

    ends: that many ordinary tokens end an answer too, so that a random model comes to an end.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    made = tokenizer(file)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=made.bos_token_id,
        eos_token_id=made.eos_token_id,
        pad_token_id=made.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    last = [made.eos_token_id, *range(len(made) - ends, len(made))]
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=last)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)
