"""What may be published: a folder of plain files that cannot run code and hold no secret."""

from pathlib import Path

from data.secrets import refuse, refuse_file
from drafters.base import require_intact
from drafters.files import Digests, digests
from drafters.published import PART

BINARY = (".safetensors", ".gguf", ".model", ".png")
TEXT = (".json", ".jsonl", ".jinja", ".txt", ".md", ".html", ".svg", ".csv", ".yaml", ".log")
BARE = ("LICENSE", "NOTICE")


def frozen(folder: Path) -> Digests:
    """Size and hash of every file below the folder. Raises ValueError for what must not be
    published: no whole drafter, a link, a name that is none everywhere, a kind of file that could
    run code, a secret."""
    require_intact(folder)
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ValueError(f"{name!r} in {folder} is a link or a device, expected plain files")
        if not PART.fullmatch(path.name):
            raise ValueError(
                f"{name!r} in {folder} has a name that is not published: expected letters, digits, "
                "'.', '_' and '-', at most 128, not beginning with '.' or '-'"
            )
        if path.is_file():
            names.append(name)
            _require_harmless(path, name)
    return digests(folder, names)


def _require_harmless(path: Path, name: str) -> None:
    """Raises ValueError for a kind that is not published, or a secret in its text."""
    if not name.endswith((*BINARY, *TEXT)) and path.name not in BARE:
        raise ValueError(
            f"{name} is of a kind that is not published, since pickles and programs run code: "
            f"expected {', '.join((*BINARY, *TEXT, *BARE))}"
        )
    if name.endswith(".safetensors"):
        from safetensors import safe_open

        with safe_open(path, "pt") as tensors:
            refuse(tensors.metadata() or {}, name)
    elif not name.endswith(BINARY):
        refuse_file(path, name)
