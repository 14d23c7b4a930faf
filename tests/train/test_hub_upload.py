"""Publishing to a Hub that fails at any request in any way: one commit, whole, and read back. And
fetching from one that is not to be trusted."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils.logging import get_logger
from safetensors.torch import save_file

from drafters.base import Trained, cast, save, weights
from drafters.files import write_json
from drafters.published import fetch, published
from eval.controls import Failed
from tests.drafters.contract import arguments as family
from tests.drafters.contract import build
from tests.local_server import hub_at
from tests.toys import tiny_target
from tests.train.upload_server import ATTRIBUTES, RETRY_AFTER, WAYS, Hub, Repository, publishing
from train.publishing.hub import check, upload
from train.publishing.staged import frozen

CANARY = "hf_" + "c4n4ry" * 5
NAME = "me/ko-drafter"


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """What would have been waited; nothing is."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture
def hub(monkeypatch, tmp_path: Path, pauses: list[float], caplog) -> Any:
    logger = get_logger("huggingface_hub")  # by its own function, which adds a handler at first
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    with publishing(CANARY, "me") as made:
        hub_at(made.address, CANARY, tmp_path / "cache", monkeypatch)
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return staged(tmp_path / "out" / "artifact")


def staged(made: Path, seed: int = 0) -> Path:
    """A folder such as the stage publish leaves: our layout, another one below, a card."""
    generator = torch.Generator().manual_seed(seed)
    for place in (made, made / "speculators"):
        place.mkdir(parents=True)
        tensors = {"x": torch.randn(40, 40, generator=generator)}
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    write_json(made / "config.json", {"vocab_size": 40})
    note = {"family": "medusa", "arguments": {}, "files": weights(made)}
    write_json(made / "drafter.json", note)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# Ein Entwurf\n", encoding="utf-8")
    return made


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fresh(hub: Hub) -> None:
    hub.repositories.clear()
    hub.stored.clear()
    hub.sent.clear()


def assert_published(hub: Hub, folder: Path, commit: str, tag: str | None, why: str) -> None:
    """One commit after the Hub's own first, that holds the folder and nothing else."""
    there = hub.repositories[NAME]
    assert len(there.commits) == 2, why
    assert there.main == commit, why
    assert there.files("main") == contents(folder) | ATTRIBUTES, why
    assert there.tags == ({tag: commit} if tag else {}), why
    assert there.private, why


def each_request(hub: Hub, times: int, how: str, step: int = 1) -> Iterator[int]:
    """0, 1, 2, ...: which request of what is done in the loop fails; ends when none was left."""
    for number in count(0, step):
        hub.arm(number, times, how)
        yield number
        if not hub.failed:
            break


def test_each_request_fails_once_in_each_way(hub: Hub, folder: Path, pauses, capfd, caplog):
    """The table of the closing note; printed with pytest -s."""
    table: Counter[str] = Counter()
    for how in WAYS:
        for number in each_request(hub, 1, how):
            fresh(hub)
            pauses.clear()
            commit = upload(folder, NAME, tag="v1")
            why = f"request {number}: {how}: {hub.asked[number : number + 1]}"
            assert_published(hub, folder, commit, "v1", why)
            assert len(hub.sent) <= 3, why
            if hub.failed:
                table[how] += 1
                # The Hub's client asks for a file's head a second time at once, and then waits.
                waits = how == "busy" and not hub.asked[number].startswith("HEAD")
                assert not waits or max(pauses) >= RETRY_AFTER, why
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err + caplog.text
    assert min(table[how] for how in WAYS) >= 30
    with capfd.disabled():
        print(f"\nrequests of an upload that failed, once each: {dict(table)}; always one commit")


def test_each_request_fails_three_times(hub: Hub, folder: Path):
    for number in each_request(hub, 3, "lost", step=2):
        fresh(hub)
        commit = upload(folder, NAME, tag="v1")
        assert_published(hub, folder, commit, "v1", f"from request {number}")


def test_a_hub_that_stays_away_leaves_no_half_and_the_next_try_goes_on(hub: Hub, folder: Path):
    """From every third request on; then it is back. What was sent is not sent again."""
    upload(folder, NAME, tag="v1")
    for number in range(0, len(hub.asked), 3):
        fresh(hub)
        hub.arm(number, 100_000, "drop")
        with pytest.raises(ConnectionError, match=r"publishing me/ko-drafter: .* does not answer"):
            upload(folder, NAME, tag="v1")
        if there := hub.repositories.get(NAME):
            whole = contents(folder) | ATTRIBUTES
            assert all(files in (ATTRIBUTES, whole) for files in there.commits.values()), number
        hub.arm()
        assert_published(hub, folder, upload(folder, NAME, tag="v1"), "v1", f"from {number}")
        assert len(hub.sent) == 2, f"from {number}: {hub.sent}"


def test_what_is_there_is_not_sent_again(hub: Hub, folder: Path, capsys):
    first = upload(folder, NAME, tag="v1")
    hub.arm()
    assert upload(folder, NAME, tag="v1") == first
    assert "holds exactly these files at its tag v1" in capsys.readouterr().out
    assert not [r for r in hub.asked if r.startswith("POST") and "validate-yaml" not in r]
    assert upload(folder, NAME, tag="v2") == first
    assert hub.repositories[NAME].tags == {"v1": first, "v2": first}
    assert len(hub.repositories[NAME].commits) == 2


def test_a_new_version_replaces_the_old_and_an_old_one_stays(hub: Hub, folder: Path, tmp_path):
    first = upload(folder, NAME, tag="v1")
    newer = staged(tmp_path / "newer" / "artifact", seed=1)
    (newer / "config.json").unlink()
    second = upload(newer, NAME, tag="v2")
    there = hub.repositories[NAME]
    assert there.files("main") == contents(newer) | ATTRIBUTES, "a file of before has stayed"
    with pytest.raises(ValueError, match=r"the tag v1 .* names commit .* choose another tag"):
        upload(newer, NAME, tag="v1")
    assert upload(folder, NAME, tag="v1") == first, "main was moved back"
    assert (there.main, len(there.commits)) == (second, 3)


def test_two_at_once_make_one_commit(hub: Hub, folder: Path):
    hub.together = threading.Barrier(2)
    made: list[str] = []
    both = [
        threading.Thread(target=lambda: made.append(upload(folder, NAME, tag="v1")))
        for _ in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join(60)
    assert len(made) == 2
    assert made[0] == made[1]
    assert sum("/commit/main" in request for request in hub.asked) == 2, "they did not meet"
    assert_published(hub, folder, made[0], "v1", "two at once")


def when(hub: Hub, monkeypatch, part: str, act: Any) -> None:
    """Has something happen once, just before a request of this kind is answered."""
    answer, left = hub.next, [act]

    def next(request: str) -> str | None:
        if part in request and left:
            left.pop()()
        return answer(request)

    monkeypatch.setattr(hub, "next", next)


def test_a_main_that_somebody_else_moves_is_not_replaced(hub: Hub, folder: Path, monkeypatch):
    other = dict(ATTRIBUTES) | {"drafter.json": b"{}"}
    when(hub, monkeypatch, "/commit/main", lambda: hub.repositories[NAME].add(other))
    with pytest.raises(ValueError, match=r"main of me/ko-drafter was moved .* by somebody else"):
        upload(folder, NAME)
    assert hub.repositories[NAME].files("main") == other


def test_a_folder_that_changes_meanwhile_is_found(hub: Hub, folder: Path, monkeypatch):
    def change() -> None:
        (folder / "README.md").write_text("# Another\n", encoding="utf-8")

    when(hub, monkeypatch, "preupload", change)
    with pytest.raises(Failed, match=r"does not give back what was sent: README\.md has"):
        upload(folder, NAME, tag="v1")
    assert hub.repositories[NAME].tags == {}


def test_other_bytes_that_come_back_are_found_before_the_tag(hub: Hub, folder: Path):
    size = (folder / "model.safetensors").stat().st_size
    hub.served["model.safetensors"] = b"\1" * size
    with pytest.raises(Failed, match=r"the hash of model\.safetensors differs"):
        upload(folder, NAME, tag="v1")
    assert hub.repositories[NAME].tags == {}
    hub.served.clear()
    assert_published(hub, folder, upload(folder, NAME, tag="v1"), "v1", "the next time")


def test_a_copy_in_the_cache_is_no_proof(hub: Hub, folder: Path):
    """The Hub's client would take a file from the cache instead of downloading it."""
    upload(folder, NAME)
    fetch(NAME)
    hub.arm()
    upload(folder, NAME)
    assert sum("/resolve/" in request for request in hub.asked) >= 2 * len(contents(folder))


def test_only_the_first_rank_uploads(hub: Hub, folder: Path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(AssertionError, match="only the first may"):
        upload(folder, NAME)
    assert hub.asked == []


# Before anything is sent.


def scoped(name: str, *permissions: str) -> dict[str, Any]:
    scopes = [{"entity": {"type": "user", "name": name}, "permissions": list(permissions)}]
    return {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scopes}}}


def test_a_dry_run_says_what_would_be_done_and_makes_nothing(hub: Hub):
    assert check(NAME) == "Hub: makes the private repository me/ko-drafter, as me"
    assert hub.repositories == {}
    hub.repositories[NAME] = Repository(private=False)
    said = "Hub: commits to main of the public repository me/ko-drafter, as me"
    assert check(NAME, private=False) == said
    assert not [request for request in hub.asked if not request.startswith("GET")]


MINE: dict[str, Any] = {"name": "me", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
ACCOUNTS = {
    "owner": ({"auth": {"accessToken": {"role": "write"}}, "name": "you"}, "is of you, and me is"),
    "reads": ({"auth": {"accessToken": {"role": "read"}}}, "has the role read and may not write"),
    "fine, reads": ({"auth": scoped("me", "repo.content.read")}, "has the role fineGrained and"),
    "fine, elsewhere": ({"auth": scoped("us", "repo.write")}, "has the role fineGrained and"),
    "fine, all": ({"auth": scoped("me", "repo.write")}, None),
    "fine, this one": ({"auth": scoped(NAME, "repo.content.read", "repo.write")}, None),
    "org, reads": ({"name": "i", "orgs": [{"name": "me", "roleInOrg": "read"}]}, "only read in me"),
    "org": ({"name": "i", "orgs": [{"name": "me", "roleInOrg": "write"}]}, None),
}  # fmt: skip


@pytest.mark.parametrize("account", ACCOUNTS)
def test_a_token_that_may_not_write_is_known_before_the_work(hub: Hub, account: str):
    changes, said = ACCOUNTS[account]
    hub.me = MINE | changes
    if said is None:
        assert check(NAME).startswith("Hub: makes the private repository")
    else:
        with pytest.raises(ValueError, match=said):
            check(NAME)


OTHERS = {
    "public": (Repository(private=False), "is public on the Hub, and private=true was asked"),
    "gated": (Repository(gated="auto"), "is gated"),
    "read only": (Repository(writable=False), "may read me/ko-drafter and not write to it"),
    "another's": (Repository(), "holds files and no drafter.json"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_repository_that_is_not_for_us_is_left_alone(hub: Hub, folder: Path, other: str):
    hub.repositories[NAME], said = OTHERS[other]
    if other == "another's":
        hub.repositories[NAME].add(dict(ATTRIBUTES) | {"model.safetensors": b"theirs"})
    before = dict(hub.repositories[NAME].commits)
    for ask in (lambda: check(NAME), lambda: upload(folder, NAME)):
        with pytest.raises(ValueError, match=said):
            ask()
    assert hub.repositories[NAME].commits == before


def test_a_data_set_of_that_name_no_token_and_no_network(hub: Hub, folder, monkeypatch, tmp_path):
    hub.data_sets.add(NAME)
    with pytest.raises(ValueError, match="is a data set on the Hub: give the drafter another"):
        check(NAME)
    hub.arm(0, 100, "error")
    with pytest.raises(ConnectionError, match="does not answer"):
        check(NAME)
    hub.arm()
    monkeypatch.setenv("HF_TOKEN", "hf_" + "0" * 30)
    with pytest.raises(ValueError, match=r"refuses it to the token here: log in .*HF_TOKEN"):
        upload(folder, NAME)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"needs a token and there is none here: log in"):
        upload(folder, NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in check(NAME)
    assert hub.repositories == {}


LONG = "x" * 400
BAD_NAMES = {
    "up": "../../x",
    "absolute": "/etc/passwd",
    "one part": "drafter",
    "three parts": "a/b/c",
    "NUL": "me/dra\0fter",
    "look-alike": "mе/drafter",  # a Cyrillic letter
    "dots": "me/..",
    "line": "me/drafter\n",
    "long": f"me/{LONG}",
    "password": "https://me:sesame@hub/a",
    "token": f"me/{CANARY}",
    "empty": "",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_is_refused_and_not_repeated(
    hub: Hub, folder: Path, name: str, monkeypatch
):
    monkeypatch.chdir(folder)  # from where ../../x is nothing, whatever the machine has
    bad = BAD_NAMES[name]
    for ask in (lambda: check(bad), lambda: upload(folder, bad)):
        with pytest.raises(ValueError, match=r"expected (user/name|none|text)") as told:
            ask()
        assert "sesame" not in str(told.value)
        assert CANARY not in str(told.value)
    if bad and name != "token":
        with pytest.raises(ValueError, match=r"expected user/name"):
            fetch(bad)
    assert hub.asked == []


@pytest.mark.parametrize(
    "tag", ["main", "a b", "../x", "-v", "v1.lock", "v1.", "v..1", "0" * 40, LONG, "ｖ1"], ids=repr
)
def test_a_tag_that_is_none_is_refused(hub: Hub, folder: Path, tag: str):
    with pytest.raises(ValueError, match="the tag cannot name a revision"):
        upload(folder, NAME, tag=tag)
    assert hub.asked == []


def linked(folder: Path) -> None:
    (folder / "notes.txt").symlink_to("/etc/hostname")


def retrained(folder: Path) -> None:
    save_file({"x": torch.ones(3)}, folder / "model.safetensors")


def marked(folder: Path) -> None:
    save_file({"x": torch.ones(3)}, folder / "more.safetensors", metadata={"by": CANARY})


FOLDERS = {
    "link": (linked, r"'notes\.txt' in .* is a link"),
    "folder link": (lambda f: (f / "all").symlink_to(f.parent), r"'all' in .* is a link"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "pickles and programs"),
    "pickle, pt": (lambda f: (f / "heads.pt").write_bytes(b"x"), "pickles and programs"),
    "program": (lambda f: (f / "modeling.py").write_text("x"), "pickles and programs"),
    "hidden": (lambda f: (f / ".env").write_text("x"), r"'\.env' in .* a name that is not"),
    "odd": (lambda f: (f / "a b.json").write_text("x"), "a name that is not published"),
    "secret": (
        lambda f: (f / "log.txt").write_text(f"a\nt={CANARY}\n"),
        r"line 2 of log\.txt look",
    ),
    "in metadata": (marked, r"more\.safetensors\.by looks like a token"),
    "damaged": (retrained, r"is damaged: model\.safetensors has"),
    "no drafter": (lambda f: (f / "drafter.json").unlink(), "holds no drafter"),
}


@pytest.mark.parametrize("wrong", FOLDERS)
def test_a_folder_that_must_not_be_published_is_not(hub: Hub, folder: Path, wrong: str):
    spoil, said = FOLDERS[wrong]
    spoil(folder)
    with pytest.raises(ValueError, match=said) as told:
        upload(folder, NAME)
    assert CANARY not in str(told.value)
    assert hub.asked == []


def test_the_environments_own_secrets_are_found(folder: Path, monkeypatch):
    assert len(frozen(folder)) == len(contents(folder))
    (folder / "README.md").write_text("# by open-sesame-now\n", encoding="utf-8")
    assert frozen(folder)
    monkeypatch.setenv("MY_API_KEY", "open-sesame-now")
    with pytest.raises(ValueError, match=r"line 1 of README\.md looks like a token") as told:
        frozen(folder)
    assert "sesame" not in str(told.value)


def test_a_token_of_the_login_is_shown_nowhere(hub, folder, monkeypatch, tmp_path, capfd, caplog):
    """It is in no variable of the environment and looks like nothing."""
    plain = "plain-canary-of-a-login"
    (tmp_path / "token").write_text(plain)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.token = plain
    upload(folder, NAME, tag="v1")

    def whoami(self: Any) -> None:
        raise OSError(f"Illegal header value b'Bearer {plain}'")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", whoami)
    with pytest.raises(ConnectionError, match=r"Illegal header value b'Bearer \*\*\*'"):
        upload(folder, NAME)
    said = capfd.readouterr()
    assert plain not in said.out + said.err + caplog.text
    published = [
        content for files in hub.repositories[NAME].commits.values() for content in files.values()
    ]
    assert not any(plain.encode() in content for content in published)


# Fetching.


def offer(hub: Hub, files: dict[str, bytes], name: str = "some/drafter") -> Repository:
    hub.repositories[name] = Repository(private=False)
    hub.repositories[name].add(dict(ATTRIBUTES) | files)
    return hub.repositories[name]


def test_what_is_fetched_is_what_was_published(hub: Hub, folder: Path, tmp_path: Path, capsys):
    (folder / "report.html").write_text("<p>1.4x</p>", encoding="utf-8")
    commit = upload(folder, NAME, tag="v1")
    upload(staged(tmp_path / "newer" / "artifact", seed=1), NAME)
    got = fetch(NAME, "v1")
    assert got.name == commit
    assert f"me/ko-drafter at commit {commit}: verified" in capsys.readouterr().out
    due = contents(folder)
    del due["report.html"]
    assert contents(got) == due
    assert fetch(NAME).name == hub.repositories[NAME].main != commit
    assert fetch(folder) == folder
    with pytest.raises(ValueError, match="is a folder, which has no revision 'v1'"):
        fetch(folder, "v1")


def test_each_request_of_a_fetch_fails_once_in_each_way(hub, folder, tmp_path, monkeypatch, capfd):
    commit = upload(folder, NAME)
    due, failed = contents(folder), 0
    for how in WAYS:
        for number in each_request(hub, 1, how):
            place = str(tmp_path / f"{how}-{number}")
            monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", place)
            got = fetch(NAME)
            assert (got.name, contents(got)) == (commit, due), f"request {number}: {how}"
            failed += hub.failed
    assert failed > 50
    with capfd.disabled():
        print(f"\nrequests of a fetch that failed, once each: {failed}")


def test_neither_pickles_nor_programs_nor_names_outside_are_fetched(hub, folder, tmp_path):
    evil = {
        "pytorch_model.bin": b"\x80\x04",
        "modeling.py": b"open('/tmp/x', 'w')",
        "../../../../escaped.json": b"{}",
        "/absolute.json": b"{}",
        "odd name.json": b"{}",
        "other/model.safetensors": b"x" * 9,
    }
    offer(hub, contents(folder) | evil)
    got = fetch("some/drafter")
    assert set(contents(got)) == set(contents(folder))
    asked = " ".join(hub.asked)
    assert not [name for name in evil if f"/{name.strip('/.')}" in asked]
    assert not list(tmp_path.parent.rglob("escaped.json"))


@pytest.mark.parametrize("outside", ["../../secret.safetensors", "/etc/hostname", "a//b", "..", ""])
def test_a_note_that_names_files_elsewhere_is_refused(hub: Hub, folder: Path, outside: str):
    note = json.loads((folder / "drafter.json").read_text())
    note["files"] |= {outside: {"bytes": 1, "sha256": "0" * 64}}
    write_json(folder / "drafter.json", note)
    offer(hub, contents(folder))
    for source in ("some/drafter", folder):
        with pytest.raises(
            ValueError, match="lists a file outside its folder, or with an odd name"
        ):
            fetch(source)


def test_weights_that_are_only_a_pickle_are_refused(hub: Hub, tmp_path: Path):
    offer(hub, {"config.json": b"{}", "medusa_lm_head.pt": b"\x80\x04"})
    with pytest.raises(ValueError, match=r"no weights as safetensors; a pickle .* never read"):
        fetch("some/drafter")
    with pytest.raises(ValueError, match="no weights as safetensors"):
        fetch(tmp_path)


@pytest.mark.parametrize("path", ["model.safetensors", "config.json", "drafter.json"])
def test_other_bytes_than_those_listed_are_found(hub: Hub, folder: Path, path: str):
    """Of a large file, which the Hub lists with its sha256, and of a small one, with git's sha1."""
    files = contents(folder)
    offer(hub, files)
    hub.served[path] = bytes([files[path][0] ^ 1]) + files[path][1:]
    with pytest.raises(ConnectionError, match=rf"not what it lists: the hash of {path} differs"):
        fetch("some/drafter")
    hub.served.clear()
    assert contents(fetch("some/drafter"))[path] == files[path], "what is cached is fetched anew"


def test_weights_that_are_not_those_noted_are_found(hub: Hub, folder: Path):
    files = contents(folder)
    files["model.safetensors"] = files["speculators/model.safetensors"]
    offer(hub, files)
    with pytest.raises(ValueError, match=r"is damaged: the hash of model\.safetensors differs"):
        fetch("some/drafter")


def test_another_layout_is_fetched_and_not_loaded_as_ours(hub: Hub, folder: Path):
    theirs = {
        k: v for k, v in contents(folder).items() if k in ("model.safetensors", "config.json")
    }
    offer(hub, theirs)
    assert contents(fetch("some/drafter")) == theirs
    with pytest.raises(ValueError, match="no drafter of draftsmith: the recipe refresh reads"):
        published("some/drafter", tiny_target())


def test_what_is_not_there_or_not_for_us_is_said(hub: Hub, folder: Path, monkeypatch):
    upload(folder, NAME)
    with pytest.raises(ValueError, match=r"fetching me/none: the Hub has no such repository"):
        fetch("me/none")
    with pytest.raises(ValueError, match=r"the Hub has no such repository, revision"):
        fetch(NAME, "v9")
    with pytest.raises(ValueError, match=r"is not a branch, tag or commit"):
        fetch(NAME, "../main")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "0" * 30)
    with pytest.raises(ValueError, match=r"hides it from the token here"):
        fetch(NAME)


def test_without_a_network_the_cache_serves(hub: Hub, folder: Path, monkeypatch):
    commit = upload(folder, NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=r"HF_HUB_OFFLINE is set, and me/ko-drafter is not"):
        fetch(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    fetch(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch(NAME).name == commit


@pytest.mark.parametrize("changes", [{}, {"target_lora": {"rank": 2, "alpha": 4}}], ids=["1", "2"])
def test_a_published_drafter_is_one_line(hub: Hub, tmp_path: Path, changes: dict[str, Any]):
    """Medusa-2's adapter lies in a folder of its own, and comes too."""
    target = tiny_target()
    made = build("medusa", target.shape, **changes)
    assert isinstance(made, Trained)
    made.initialise(target, lambda: torch.ones(target.shape.vocab_size))
    place = tmp_path / "drafter"
    arguments = {
        key: value for key, value in family("medusa", **changes).items() if key != "_target_"
    }
    save(made, place, arguments)
    upload(place, NAME, tag="v1")
    drafter = published(NAME, target, "v1")
    mine = cast(made, target.dtype).state_dict()
    theirs = drafter.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert drafter.changes_target == bool(changes)
