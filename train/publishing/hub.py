"""Publishing on the Hub: a folder becomes one commit, whole and once, and is read back.

Every step can be done again after it failed half-way: it looks first at what is there.
"""

import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.secrets import refuse
from decoding.ranks import ranks
from drafters.base import NOTE
from drafters.files import Digests, damage
from drafters.patience import bars, patiently, told
from drafters.published import ATTRIBUTES, CARD, difference, listing, require_name
from eval.controls import Failed
from train.publishing.staged import frozen

if TYPE_CHECKING:
    from huggingface_hub.hf_api import HfApi

TAG = re.compile(r"(?!main$|[0-9a-f]{40}$|.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,99}(?<!\.lock)(?<!\.)")
MOVED = (409, 412)  # the Hub's answers to a commit on a main that has been moved


def check(repository: str, *, private: bool = True) -> str:
    """A line that says what publishing would do; nothing is made. Offline it says that it cannot
    know.

    Raises ValueError where publishing would be refused: by the name, for want of a token or of its
    scope, by an owner that is another's, or by what stands in the repository; ConnectionError
    where the Hub does not answer.
    """
    from huggingface_hub import is_offline_mode

    refuse(repository, "repository")
    require_name(repository)
    if is_offline_mode():
        return f"Hub: HF_HUB_OFFLINE is set, so that publishing {repository} cannot be checked"
    with told(f"publishing {repository}"):
        return _look(_api(repository), repository, private)


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool = True,
    tag: str | None = None,
    message: str = "Publish a drafter",
) -> str:
    """The commit (40 hex digits) that holds exactly the files of `folder`; one is made where
    neither main nor the tag holds them. They are downloaded again and compared before the tag is
    set.

    Raises as check, and ValueError for a folder that must not be published, a tag that names other
    files and a main that somebody else moves meanwhile; Failed if the Hub gives back other files.
    """
    assert ranks()[0] == 0, f"rank {ranks()[0]} uploads; only the first may"
    refuse(repository, "repository")
    require_name(repository)
    if tag and not TAG.fullmatch(tag):
        raise ValueError(
            "the tag cannot name a revision: expected at most 100 letters, digits, '.', '_' and "
            "'-', not main and not a commit"
        )
    push = Push(_api(repository), repository, private, folder, frozen(folder), tag)
    with told(f"publishing {repository}"), bars():
        print(patiently(lambda: _look(push.api, repository, private)), flush=True)
        parent = patiently(push.main)
        commit = patiently(lambda: push.commit(parent, message), also=MOVED)
        push.read_back(commit)
        if tag:
            patiently(partial(push.mark, tag, commit))
    named = f" (tag {tag})" if tag else ""
    print(
        f"Hub: {repository} has it at commit {commit}{named}; {len(push.files)} files were "
        "downloaded again, and their hashes are those that were sent",
        flush=True,
    )
    return commit


def _api(repository: str) -> "HfApi":
    from huggingface_hub import HfApi, get_token

    token = get_token()
    if not token:
        raise ValueError(
            f"publishing {repository} needs a token and there is none here: log in "
            "(hf auth login) or set HF_TOKEN, to a token with the role write"
        )
    return HfApi(token=token)


def _look(api: "HfApi", repository: str, private: bool) -> str:
    """What publishing would do. Raises ValueError for what it must not."""
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    me = api.whoami()
    _require_role(me, repository)
    kind = "private" if private else "public"
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        if api.repo_exists(repository, repo_type="dataset"):
            raise ValueError(
                f"{repository} is a data set on the Hub: give the drafter another name"
            ) from None
        return f"Hub: makes the {kind} repository {repository}, as {me['name']}"
    _require_ours(info, repository, private)
    try:
        api.auth_check(repository, write=True)
    except HfHubHTTPError as error:
        if error.response.status_code != 403:
            raise
        raise ValueError(
            f"the token here may read {repository} and not write to it: log in (hf auth login) or "
            "set HF_TOKEN to one with the role write"
        ) from None
    return f"Hub: commits to main of the {kind} repository {repository}, as {me['name']}"


def _require_role(me: dict[str, Any], repository: str) -> None:
    """Raises ValueError unless the token of this answer of whoami may write for the owner."""
    owner = repository.split("/")[0]
    orgs = {org["name"]: org.get("roleInOrg", "write") for org in me.get("orgs", [])}
    if owner != me["name"] and owner not in orgs:
        raise ValueError(
            f"the token here is of {me['name']}, and {owner} is neither that account nor one of "
            f"its organisations ({', '.join(orgs) or 'none'}): correct repository, or the token"
        )
    if orgs.get(owner) == "read":
        raise ValueError(f"{me['name']} may only read in {owner}: ask an admin there for write")
    token = me.get("auth", {}).get("accessToken", {})
    role = token.get("role", "unknown")
    covered = any(
        scope.get("entity", {}).get("name") in (owner, repository)
        and "repo.write" in scope.get("permissions", [])
        for scope in token.get("fineGrained", {}).get("scoped", [])
    )
    if role == "read" or (role == "fineGrained" and not covered):
        raise ValueError(
            f"the token here has the role {role} and may not write to {repository}: make one with "
            f"the role write, or with write access to the repositories of {owner}, and log in with "
            "it (hf auth login) or set HF_TOKEN"
        )


def _require_ours(info: Any, repository: str, private: bool) -> None:
    """Raises ValueError for a repository that is there and is not for us to overwrite."""
    if info.gated:
        raise ValueError(
            f"{repository} is gated, so that it could not be loaded without a request: open it in "
            "its settings on the Hub, or give another name"
        )
    if bool(info.private) != private:
        there = "private" if info.private else "public"
        raise ValueError(
            f"{repository} is {there} on the Hub, and private={str(private).lower()} was asked "
            "for: change it in its settings on the Hub, or here; publishing changes neither"
        )
    names = {file.rfilename for file in info.siblings or []} - {ATTRIBUTES, CARD}
    if names and NOTE not in names:
        raise ValueError(
            f"{repository} holds files and no {NOTE}, so it is no drafter of ours, and publishing "
            "would replace them: give another name"
        )


@dataclass(frozen=True)
class Push:
    """A folder on its way to a repository; `files` as it was when it was frozen."""

    api: "HfApi"
    repository: str
    private: bool
    folder: Path
    files: Digests
    tag: str | None

    def main(self) -> str | None:
        """The commit that main names, in a repository that is made if there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self.api.model_info(self.repository)
        except RepositoryNotFoundError:
            self.api.create_repo(self.repository, private=self.private, exist_ok=True)
            info = self.api.model_info(self.repository)
        _require_ours(info, self.repository, self.private)
        return info.sha

    def commit(self, parent: str | None, message: str) -> str:
        """The commit with exactly these files. The Hub shows it when it is whole, and makes it
        only on top of `parent`, so that none is made twice or over another's."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        if self.tag and (tagged := self._tagged(self.tag)):
            if why := self._other(tagged):
                raise ValueError(
                    f"the tag {self.tag} of {self.repository} names commit {tagged} with other "
                    f"files ({why}): choose another tag"
                )
            return self._there(tagged, f"its tag {self.tag}")
        head = str(self.api.model_info(self.repository).sha)
        if (why := self._other(head)) is None:
            return self._there(head, "main")
        if head != parent:
            raise ValueError(
                f"main of {self.repository} was moved from {parent} to {head} by somebody else "
                f"meanwhile ({why}): look at it, and publish again to replace it"
            )
        size = sum(each["bytes"] for each in self.files.values())
        print(f"Hub: sends {len(self.files)} files, {size / 2**20:.1f} MiB", flush=True)
        old = listing(self.api, self.repository, head).keys() - self.files.keys()
        steps: list[Any] = [CommitOperationDelete(name) for name in sorted(old)]
        steps += [CommitOperationAdd(name, self.folder / name) for name in self.files]
        return str(
            self.api.create_commit(
                self.repository, steps, commit_message=message, parent_commit=parent
            ).oid
        )

    def read_back(self, commit: str) -> None:
        """Downloads the commit and compares. Raises Failed where twice something else comes."""
        for _ in range(2):
            with tempfile.TemporaryDirectory(dir=self.folder.parent, prefix="back-") as place:
                patiently(
                    partial(
                        self.api.snapshot_download,
                        self.repository,
                        revision=commit,
                        local_dir=Path(place) / "files",
                        cache_dir=Path(place) / "cache",  # not the user's: its copy would do
                        allow_patterns=list(self.files),
                    )
                )
                why = damage(Path(place) / "files", self.files)
            if why is None:
                return
        raise Failed(
            f"{self.repository} at commit {commit} does not give back what was sent: {why}; it has "
            "no new tag: publish again, and if it stays so ask the Hub's support"
        )

    def mark(self, tag: str, commit: str) -> None:
        """Sets the tag. Raises ValueError if it names another commit."""
        if self._tagged(tag) is None:
            self.api.create_tag(self.repository, tag=tag, revision=commit, exist_ok=True)
        if (there := self._tagged(tag)) != commit:
            raise ValueError(
                f"the tag {tag} of {self.repository} names {there}, not {commit}: choose another"
            )

    def _there(self, commit: str, place: str) -> str:
        print(f"Hub: {self.repository} holds exactly these files at {place}", flush=True)
        return commit

    def _tagged(self, tag: str) -> str | None:
        tags = self.api.list_repo_refs(self.repository).tags
        return next((str(each.target_commit) for each in tags if each.name == tag), None)

    def _other(self, commit: str) -> str | None:
        """What a commit holds otherwise than the folder, or None."""
        there = listing(self.api, self.repository, commit)
        if apart := sorted(there.keys() ^ self.files.keys()):
            return f"{apart[0]} is on one side only"
        return difference(self.folder, there)
