"""Stage `parent`: a drafter that is there already becomes the start of a training."""

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from decoding.pretrained import Pretrained, contents_hash
from decoding.target import Shape
from drafters.base import NOTE, Blueprint, Trained, load, require_intact, save, weights, write_json
from drafters.heads import Heads
from drafters.lm import LM
from drafters.published import fetch, require_name
from train import inherited
from train.layouts import files, llama, table
from train.vocabulary import Vocabulary, compare

OWN = "draftsmith"


class Parent:
    """Fetches `checkpoint`, a folder or a name on the Hub, proves that it fits the target and
    `drafter`, which is to be trained on from it, and leaves it as stage distill would have.

    checkpoint: a drafter of draftsmith, one in a layout of train/layouts, or a plain causal LM,
    which drafter.checkpoint must name too. revision: of the Hub; null: main.

    Its weights are read from safetensors alone, and become fp32, so that small steps of training
    are not rounded away. Every tensor is taken over; none is left as it was drawn.
    """

    def __init__(
        self,
        *,
        target: Pretrained,
        drafter: Blueprint,
        checkpoint: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.target, self.drafter = target, drafter
        self.checkpoint, self.revision = checkpoint, revision
        self.family = drafter.cls.__module__.removeprefix("drafters.")

    def check(self, needs: Collection[str]) -> None:
        """Refuses, before anything starts, a folder that cannot be this parent and what is no name
        on the Hub. What a name on the Hub holds, the stage finds out: it is the first."""
        if self.checkpoint is None:
            return
        if not Path(self.checkpoint).is_dir():
            require_name(self.checkpoint)
            return
        with self._named():
            self._layout(fetch(self.checkpoint, self.revision))

    def fingerprint(self) -> str:
        """Contents of a folder; a name on the Hub with its revision."""
        if self.checkpoint is not None and Path(self.checkpoint).is_dir():
            return contents_hash(self.checkpoint)
        return f"{self.checkpoint}@{self.revision}"

    def run(self, out: Path, *, target: Path | None = None) -> dict[str, float]:
        """Writes artifact/: the drafter, the target's tokenizer, and parent.json, which says what
        was fetched and how the two vocabularies compare. Raises ValueError if it does not fit."""
        if self.checkpoint is None:
            raise ValueError(
                "no drafter is named to train on from: set stages.parent.checkpoint=... to its "
                "folder or its name on the Hub"
            )
        folder, shape = fetch(self.checkpoint, self.revision), self.target.shape_of(target)
        tokenizer = self.target.tokenizer(target)
        with self._named():
            layout, noted = self._layout(folder)
            vocabulary = compare(tokenizer, folder, _rows(folder), shape.vocab_size)
            print(f"vocabulary: {vocabulary.said}", flush=True)
            module = self._module(folder, layout, noted, shape, target)
        part = out / "artifact.part"
        shutil.rmtree(part, ignore_errors=True)
        save(module, part, self.drafter.arguments)
        tokenizer.save_pretrained(part)
        _require_same(load(part, shape), module)
        write_json(part / "parent.json", self._note(folder, layout, vocabulary))
        shutil.rmtree(out / "artifact", ignore_errors=True)
        part.rename(out / "artifact")
        return _told(module, self.family, layout)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Begins the sentences of the block with what they are about."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.checkpoint} cannot be trained on: {error}") from None

    def _layout(self, folder: Path) -> tuple[str, dict[str, Any]]:
        """The layout of the files, and the arguments that drafter.json notes ({} where there is
        none). Raises ValueError for a drafter of another family than is to be trained, and for one
        that wants code of its own."""
        noted: dict[str, Any] = {}
        if (folder / NOTE).is_file():
            note = require_intact(folder)
            layout, family, noted = OWN, note["family"], note["arguments"]
        else:
            family, layout = table.detect(folder)
            if family == "lm":
                noted = {"checkpoint": self.checkpoint}
                refuse_code(folder)
        said = inherited.words(family, noted, str(self.checkpoint))
        if family != self.family:
            raise ValueError(
                f"it is of the family {family} (layout {layout}), and a drafter of the family "
                f"{self.family} was to be trained: add {said}"
            )
        return layout, noted

    def _module(
        self,
        folder: Path,
        layout: str,
        noted: dict[str, Any],
        shape: Shape,
        target: Path | None,
    ) -> Trained:
        """The drafter that is to be trained, with the parent's weights. Raises ValueError where
        they do not fit, naming what would."""
        module = self.drafter(shape)
        assert isinstance(module, LM | Heads), f"no parent of a {type(module).__name__} is read"
        found: Any
        if isinstance(module, LM):
            found = inherited.language_model(folder, shape.vocab_size)
        elif layout == OWN:
            found, config = module.found(folder), files.config(folder)
            if "num_attention_heads" in config:  # a layer whose positions no tensor shows
                llama.require(config | {"vocab_size": shape.vocab_size}, shape, folder)
        else:
            read = table.LAYOUTS[self.family][layout].read(
                folder, shape, self.target.borrow(target)
            )
            found, noted = read.state_dict(), table.arguments(read)
        try:
            inherited.require_taps(module, self.drafter, shape, noted)
            if isinstance(module, LM):
                inherited.take_language_model(module, found)
            else:
                inherited.take_heads(module, found, _rows(folder))
        except ValueError as error:
            raise ValueError(f"{error}; {self._hint(noted, shape)}") from None
        return module.eval()

    def _hint(self, noted: dict[str, Any], shape: Shape) -> str:
        """What to do about a parent that does not fit."""
        mine = self.drafter.arguments
        if any(mine.get(key) != value for key, value in noted.items() if key not in Heads.free):
            return (
                f"to train on it, add {inherited.words(self.family, noted, str(self.checkpoint))}"
            )
        return (
            "its settings are the configured ones, so it was made for another target than this "
            f"one, of width {shape.hidden_size}, {shape.layers} layers and {shape.vocab_size:,} "
            "tokens"
        )

    def _note(self, folder: Path, layout: str, vocabulary: Vocabulary) -> dict[str, Any]:
        """parent.json: what was trained on from, without places of this machine."""
        place = Path(str(self.checkpoint))
        local = place.is_dir()
        return {
            "checkpoint": place.resolve().name if local else self.checkpoint,
            "revision": None if local else folder.name,
            "layout": layout,
            "files": weights(folder),
            "vocabulary": {"verdict": vocabulary.verdict, "said": vocabulary.said},
        }


def refuse_code(folder: Path) -> None:
    """Raises ValueError for a model whose files name code to load it with."""
    if "auto_map" in files.config(folder):
        raise ValueError(
            "it needs code that comes with it, which draftsmith never runs; choose one that "
            "transformers itself knows"
        )


def _rows(folder: Path) -> int | None:
    """Tokens of the drafter's vocabulary, as its configuration says."""
    config = files.config(folder)
    inner = config.get("transformer_layer_config")  # of the library speculators
    rows = (inner if isinstance(inner, dict) else config).get("vocab_size")
    return rows if isinstance(rows, int) else None


def _require_same(saved: Trained, module: Trained) -> None:
    """What was written is what was read, to the bit."""
    theirs = saved.state_dict()
    for name, tensor in module.state_dict().items():
        assert torch.equal(theirs[name], tensor), f"{name} was not saved as it was read"


def _told(module: Trained, family: str, layout: str) -> dict[str, float]:
    tensors, count = len(module.state_dict()), sum(p.numel() for p in module.parameters())
    print(
        f"a drafter of the family {family} (layout {layout}): all {tensors} tensors, {count:,} "
        "parameters, were taken over; none is missing, left over or new",
        flush=True,
    )
    return {"tensors": tensors, "parameters": count}
