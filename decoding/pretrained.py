"""Where a target comes from: a local folder, a Hub id, or a stage of the recipe."""

import difflib
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from decoding.borrowed import Borrowed, parts_of
from decoding.graphs import Graphs
from decoding.probe import probe
from decoding.sharded import Gathered, Sharded, sharding
from decoding.target import Shape, Target

WHOLE = 256 * 2**20  # files up to this many bytes are hashed whole
CLASSES = {None: Target, "tensor": Sharded, "zero3": Gathered}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Pretrained:
    """A target by local folder or Hub id; `shape` lets a plan be made where neither is at hand.

    `path` null says that a stage of the recipe trains the target. `chat_template` (Jinja) is for
    targets whose tokenizer comes without one; `thinking` sets the template's enable_thinking.
    `parallel` shards a target that is too large for one device over all ranks of a stage: `tensor`
    for decoding, `zero3` for training (decoding/sharded.py).
    `graphs`: its scoring passes are replayed as CUDA graphs (bench and tune_tree set it).
    """

    free = frozenset({"parallel"})  # where it is; but a measurement depends on that (train/plan.py)

    path: str | None = None
    revision: str | None = None
    dtype: str = "bfloat16"
    shape: dict[str, Any] | None = None
    chat_template: str | None = None
    thinking: bool | None = None
    parallel: Literal["tensor", "zero3"] | None = None
    graphs: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"target.dtype is {self.dtype!r}; it must be one of {list(DTYPES)}")
        if self.parallel not in CLASSES:
            raise ValueError(
                f"target.parallel is {self.parallel!r}; it must be null (whole on each rank), or "
                "shared by the ranks: zero3 in training, tensor in decoding"
            )
        if self.graphs and self.parallel:
            raise ValueError(
                "graphs is true, and CUDA graphs need a device that holds the whole target; set "
                "target.parallel=null or graphs=false"
            )

    def fingerprint(self) -> str:
        """Contents of a local folder; a Hub id is named by its revision. Raises ValueError for a
        local path that does not exist."""
        if self.path is None or _is_hub_id(self.path):
            return f"{self.path}@{self.revision}"
        if not Path(self.path).is_dir():
            raise ValueError(f"target.path {self.path!r} does not exist{_near(Path(self.path))}")
        return contents_hash(self.path)

    def for_decoding(self) -> "Pretrained":
        """The same, sharded by tensors where it is sharded: zero3 gathers each layer anew for every
        pass, which is for passes over many tokens."""
        return replace(self, parallel="tensor") if self.parallel == "zero3" else self

    @property
    def name(self) -> str:
        """What reports and cards call it: a Hub id, or a folder's name without its place."""
        if self.path is None:
            return "the recipe's own target"
        return self.path if _is_hub_id(self.path) else Path(self.path).resolve().name

    def load(self, folder: Path | None = None, dtype: str | None = None) -> Target:
        """The frozen model from `folder` (a stage's artifact) or from `path`."""
        place, revision = str(folder or self.path), None if folder else self.revision
        if self.graphs and not torch.cuda.is_available():  # asked here: plans are made elsewhere
            raise ValueError("graphs is true, and there is no CUDA device; set graphs=false")
        try:
            parts = sharding(self.parallel, place, revision, self.name) if self.parallel else {}
            model = _model(place, revision=revision, dtype=DTYPES[dtype or self.dtype], **parts)
        except OSError as error:
            raise OSError(_unreachable(place, error)) from None
        target = CLASSES[self.parallel](model, name=self.name)
        target.revision = self._revision(folder)
        target.graphs = Graphs(target.shape.layers) if self.graphs else None
        if not parts:  # a part of a model is where it belongs already
            target.to("cuda" if torch.cuda.is_available() else "cpu")
        probe(target)
        return target

    def borrow(self, folder: Path | None = None) -> Borrowed:
        """What draft heads borrow of the target (embedding, head, last norm and layer), without
        reading the rest."""
        place, revision = str(folder or self.path), None if folder else self.revision
        try:
            model = parts_of(place, revision, DTYPES[self.dtype])
        except OSError as error:
            raise OSError(_unreachable(place, error)) from None
        target = Borrowed(model, name=self.name)
        target.revision = self._revision(folder)
        return target

    def _revision(self, folder: Path | None) -> str:
        """The commit of a Hub id that was loaded, which the cache knows; else a hash of files."""
        from huggingface_hub import resolve_revision

        place = str(folder or self.path)
        if folder or not _is_hub_id(place):
            return contents_hash(place)
        return resolve_revision(place, revision=self.revision, local_files_only=True).resolved

    def shape_of(self, folder: Path | None = None) -> Shape:
        """The target's shape, from its configuration alone."""
        from transformers import AutoConfig

        place, revision = str(folder or self.path), None if folder else self.revision
        try:
            with no_foreign_code(place):
                config = AutoConfig.from_pretrained(
                    place, revision=revision, trust_remote_code=False
                )
            return Shape.of(config)
        except OSError as error:
            raise OSError(_unreachable(place, error)) from None

    def tokenizer(self, folder: Path | None = None) -> Any:
        """The target's tokenizer."""
        from transformers import AutoTokenizer

        place = str(folder or self.path)
        revision = None if folder else self.revision
        try:
            with no_foreign_code(place):
                tokenizer = AutoTokenizer.from_pretrained(
                    place, revision=revision, trust_remote_code=False
                )
        except OSError as error:
            raise OSError(_unreachable(place, error)) from None
        if self.chat_template:
            tokenizer.chat_template = self.chat_template
        if self.thinking is not None and tokenizer.chat_template:
            # in the template itself, so that its hash and every reader know of the choice
            choice = "true" if self.thinking else "false"
            setting = f"{{%- set enable_thinking = {choice} %}}"
            tokenizer.chat_template = setting + tokenizer.chat_template
        return tokenizer


def _model(place: str, **options: Any) -> Any:
    """What transformers loads; raises ValueError for all but decoder-only models that it knows."""
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False, **options)
    except ValueError as error:  # an encoder-decoder model, or code that comes with the weights
        raise ValueError(
            f"the target {place} is no decoder-only model that transformers knows: "
            f"{' '.join(str(error).split())[:200]}; choose another"
        ) from None
    except Exception as error:
        if type(error).__name__ not in ("UnpicklingError", "SafetensorError"):
            raise
        raise ValueError(  # torch's own words advise to read the file in an unsafe way
            f"the weights in {place} are damaged, or hold more than tensors; get them again, as "
            "safetensors"
        ) from None


@contextmanager
def no_foreign_code(place: str) -> Iterator[None]:
    """Raises ValueError, in our words, where transformers wants to run code that comes with a
    model: it advises to allow that."""
    try:
        yield
    except ValueError as error:
        if "custom code" not in str(error):
            raise
        raise ValueError(
            f"{place} needs code that comes with it, which draftsmith never runs; choose one that "
            "transformers itself knows"
        ) from None


def contents_hash(path: str | Path) -> str:
    """Hex hash over the files of a folder; those above 256 MiB by size and both ends."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}:".encode())
        with file.open("rb") as stream:
            if size <= WHOLE:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
            else:
                digest.update(stream.read(2**20))
                stream.seek(-(2**20), 2)
                digest.update(stream.read())
    return digest.hexdigest()


def _is_hub_id(path: str) -> bool:
    """`owner/name` or `name`, and no such folder here."""
    return (
        bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path))
        and path[0] not in "./~"
        and not (Path(path).is_dir())
    )


def _unreachable(place: str, error: OSError) -> str:
    first = str(error).splitlines()[0]
    return (
        f"the target {place} could not be loaded: {first} Check the id, HF_ENDPOINT, the network "
        "and your token, or set target.path to a local folder"
    )


def _near(path: Path) -> str:
    """What stands beside a name that is not there."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(p.name for p in parent.iterdir() if p.is_dir())
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.3) or names[:5]
    return f"; in {parent} there are {', '.join(close)}" if close else f"; {parent} has no folders"
