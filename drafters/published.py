"""Published drafters: fetched from the Hub, verified and loaded in one line.

    drafter = published("user/name", target)

Fetched are safetensors, JSON, tokenizer files and the card; never a pickle, never code. What the
Hub sent is compared with the hashes of its own listing, and with those that the drafter notes.
"""

import hashlib
import json
import re
from contextlib import suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from decoding.target import Target
from drafters.base import NOTE, Trained, cast, load, require_intact
from drafters.files import sha256
from drafters.patience import bars, patiently, told

if TYPE_CHECKING:
    from huggingface_hub.hf_api import HfApi, RepoFile

KINDS = (".safetensors", ".json", ".jinja", ".model", ".txt")  # .model, .txt: of tokenizers
CARD = "README.md"
ATTRIBUTES = ".gitattributes"  # the Hub's own file in each repository
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")  # of a path, between slashes
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,127}")


def published(repository: str, target: Target, revision: str | None = None) -> Trained:
    """The drafter of a repository of the Hub (or of a folder), in the target's dtype and on its
    device. A family that changes its target decodes with `drafter.on(target)`.

    Raises ValueError for what is no drafter of ours or does not fit the target, else as fetch.
    """
    folder = fetch(repository, revision)
    if not (folder / NOTE).is_file():
        raise ValueError(
            f"{repository} holds weights and no {NOTE}, so it is no drafter of draftsmith: the "
            "recipe refresh reads the layouts of others"
        )
    return cast(load(folder, target.shape), target.dtype).to(target.device)


def fetch(repository: str | Path, revision: str | None = None) -> Path:
    """A folder with the files of a published drafter, of ours or in another known layout; the
    commit is printed, and is the folder's name. A folder that is here already is verified too.

    Raises ValueError for a name or revision that is not there, for weights that are not
    safetensors and for files that are not those noted; ConnectionError where the Hub does not
    answer or what it sends is not what it lists.
    """
    if Path(repository).is_dir():
        if revision:
            raise ValueError(f"{repository} is a folder, which has no revision {revision!r}")
        return require_whole(Path(repository))
    name = require_name(str(repository))
    if revision is not None and (not REVISION.fullmatch(revision) or ".." in revision):
        raise ValueError(
            f"the revision of {name} is not a branch, tag or commit: [A-Za-z0-9._/-] was expected"
        )
    from huggingface_hub import is_offline_mode

    with told(f"fetching {name}"), bars():
        folder = _cached(name, revision) if is_offline_mode() else _downloaded(name, revision)
    require_whole(folder)
    print(f"{name} at commit {folder.name}: verified", flush=True)
    return folder


def _cached(name: str, revision: str | None) -> Path:
    """The snapshot in the cache, if all that is fetched of it is there."""
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, LocalEntryNotFoundError

    try:
        tree = get_cached_repo_tree(name, revision=revision)
        mine = _mine(name, revision, [file.path for file in tree])
        return Path(snapshot_download(name, revision=revision, allow_patterns=mine))
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
        raise ConnectionError(
            f"HF_HUB_OFFLINE is set, and {name} is not whole in the Hub's cache: unset it, or name "
            "a revision that was fetched before"
        ) from None


def _downloaded(name: str, revision: str | None) -> Path:
    """The snapshot in the cache; what differs from the listing is downloaded once more."""
    from huggingface_hub import HfApi, snapshot_download

    api = HfApi()
    commit = patiently(lambda: str(api.model_info(name, revision=revision).sha))
    patiently(lambda: api.resolve_revision(name, revision=revision))  # noted for _cached
    there = patiently(lambda: listing(api, name, commit))
    for force in (False, True):
        mine = patiently(partial(_mine, name, commit, list(there), force))
        get = partial(
            snapshot_download, name, revision=commit, allow_patterns=mine, force_download=force
        )
        folder = Path(patiently(get))
        if (why := difference(folder, {path: there[path] for path in mine})) is None:
            return folder
    raise ConnectionError(
        f"what the Hub sends for {name} at {commit} is not what it lists: {why}; a proxy or mirror "
        "may have changed it: try another network, and delete the folder of it in the Hub's cache"
    )


def _mine(name: str, revision: str | None, paths: list[str], force: bool = False) -> list[str]:
    """Those paths of a revision that are fetched. Raises ValueError if there are none."""
    from huggingface_hub import hf_hub_download

    folders: set[str] = set()
    if NOTE in paths:
        note = Path(hf_hub_download(name, NOTE, revision=revision, force_download=force))
        with suppress(ValueError):  # told when all is here and compared
            folders = {PurePosixPath(file).parent.as_posix() for file in _noted(note)}
    mine = [path for path in paths if wanted(path, folders)]
    if not mine:
        raise ValueError(f"{name} holds none of the files that a drafter has")
    return mine


def wanted(path: str, folders: set[str]) -> bool:
    """Whether a file of a repository is fetched: of a known kind, in the root or in one of these
    folders, below which a drafter notes weights, and with a name that stays below the root."""
    parts = path.split("/")
    kind = path == CARD or parts[-1].endswith(KINDS)
    place = len(parts) == 1 or "/".join(parts[:-1]) in folders
    return kind and place and all(PART.fullmatch(part) for part in parts)


def require_whole(folder: Path) -> Path:
    """The folder. Raises ValueError if its weights are not safetensors, or not those noted."""
    if (folder / NOTE).is_file():
        _noted(folder / NOTE)
        require_intact(folder)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no weights as safetensors; a pickle (.bin, .pt) can run code and is "
            "never read: ask its author for safetensors, or convert it where you trust it"
        )
    return folder


def _noted(note: Path) -> list[str]:
    """The files that drafter.json lists. Raises ValueError for one that would be elsewhere."""
    try:
        names = list(json.loads(note.read_text(encoding="utf-8")).get("files", {}))
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{note} is not readable: fetch or copy the drafter anew") from None
    for name in names:
        if not all(PART.fullmatch(part) for part in name.split("/")):
            raise ValueError(f"{note} lists a file outside its folder, or with an odd name")
    return names


def require_name(name: str) -> str:
    """The name of a repository, user/name. Raises ValueError, without it, for any other: it may be
    an address that holds a password."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1:
        raise ValueError(
            "the repository is neither a folder here nor a name on the Hub: expected user/name, of "
            "letters, digits, '.', '_' and '-', at most 96 of them in each part"
        )
    return name


def listing(api: "HfApi", repository: str, commit: str) -> dict[str, "RepoFile"]:
    """The files of a commit by path, without the Hub's own."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repository, recursive=True, revision=commit)
    return {f.path: f for f in tree if isinstance(f, RepoFile) and f.path != ATTRIBUTES}


def difference(folder: Path, there: dict[str, "RepoFile"]) -> str | None:
    """What the folder has otherwise than a listing of the Hub, or None. The Hub knows large files
    by their sha256, small ones by the sha1 that git gives them."""
    for path, file in there.items():
        mine = folder / path
        if not mine.is_file():
            return f"{path} is missing"
        if (known := file.lfs.sha256 if file.lfs else None) is not None:
            same = sha256(mine) == known
        else:
            same = _git_sha1(mine.read_bytes()) == file.blob_id
        if not same:
            return f"the hash of {path} differs"
    return None


def _git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
