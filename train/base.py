"""Stage `target`: a small causal LM and its tokenizer from scratch, through distill's own loop.

It exists so that the whole pipeline runs where no model can be downloaded.
"""

import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.documents import Documents
from data.sources import Row, Source
from decoding.target import Shape
from drafters.base import Batch, Metrics
from drafters.lm import LM
from train.distill import prepare, rows_of
from train.engine import barrier, join
from train.loop import Loop
from train.objectives import CE
from train.schedule import AdamW, Schedule
from train.track import Jsonl, Tracker

SPECIAL = ["<|pad|>", "<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


class BaseTarget:
    """A Llama-architecture chat model of `layers` x `width`, in Hugging Face format.

    tokenizer_rows: rows of the data that the byte-level BPE of `vocab_size` is learnt from.
    """

    free = frozenset({"tracker"})

    def __init__(
        self,
        *,
        data: Source,
        schedule: Schedule,
        optim: AdamW,
        layers: int = 8,
        width: int = 384,
        vocab_size: int = 4096,
        max_positions: int = 1024,
        tokenizer_rows: int = 4000,
        tracker: Jsonl | None = None,
    ) -> None:
        if vocab_size < 256 + len(SPECIAL):
            raise ValueError(
                f"vocab_size is {vocab_size}; a byte-level tokenizer needs {256 + len(SPECIAL)}"
            )
        self.data, self.schedule, self.optim, self.tracker = data, schedule, optim, tracker
        self.layers, self.width, self.vocab_size = layers, width, vocab_size
        self.max_positions, self.tokenizer_rows = max_positions, tokenizer_rows

    def run(self, out: Path) -> dict[str, float]:
        """Trains tokenizer and model, and saves both to artifact/."""
        rank, _ = join()
        if rank == 0 and not (out / "tokenizer").is_dir():
            shutil.rmtree(out / "tokenizer.part", ignore_errors=True)
            self.make_tokenizer().save_pretrained(out / "tokenizer.part")
            (out / "tokenizer.part").rename(out / "tokenizer")
        barrier()
        tokenizer = _load(out / "tokenizer")
        rows, name = rows_of(self.data, None)
        if rank == 0:
            prepare(out, rows, Documents(tokenizer, name), self.schedule)
        barrier()
        torch.manual_seed(self.schedule.seed)
        module = LM(self.shape(tokenizer), layers=self.layers, width=self.width)
        objective = CE()

        def step(engine: nn.Module, batch: Batch) -> tuple[Tensor, Metrics]:
            return engine(batch, None, objective)

        tracker = Tracker(out, rank, self.tracker)
        metrics = Loop(self.schedule, self.optim, out, tracker).run(module, step)
        if rank == 0:
            self._save(module, tokenizer, out / "artifact")
        barrier()
        return metrics

    def make_tokenizer(self) -> Any:
        """Byte-level BPE learnt from the first rows, with the chat template above."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        rows = islice(self.data.rows(), self.tokenizer_rows)
        backend.train_from_iterator(_texts(rows), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token="<|pad|>",
            bos_token="<|bos|>",
            eos_token="<|end|>",
            chat_template=TEMPLATE,
        )

    def shape(self, tokenizer: Any) -> Shape:
        """The model's shape; little text can give fewer tokens than vocab_size."""
        return Shape(
            vocab_size=len(tokenizer),
            hidden_size=self.width,
            layers=self.layers,
            heads=self.width // 64,
            kv_heads=self.width // 64,
            intermediate_size=0,
            max_positions=self.max_positions,
            tied=True,
        )

    def _save(self, module: LM, tokenizer: Any, folder: Path) -> None:
        from transformers import GenerationConfig

        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        module.model.config.update(ids)
        module.model.generation_config = GenerationConfig(do_sample=False, **ids)
        module.model.to(torch.bfloat16).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _texts(rows: Iterator[Row]) -> Iterator[str]:
    for row in rows:
        yield row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"])


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
