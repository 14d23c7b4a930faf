"""Packing: every token once, boundaries kept, what is dropped is counted and said.

Shapes: n sequences, T tokens a sequence.
"""

import random
from pathlib import Path

import pytest
import torch

from data import pack
from data.pack import Document, Packed, Packer, write

T = 16


def documents(lengths: list[int], *, splittable: bool = False) -> list[Document]:
    """Documents of numbered tokens: no id occurs twice."""
    made, first = [], 1
    for n in lengths:
        ids = list(range(first, first + n))
        made.append(Document(ids, [True] * n, splittable))
        first += n
    return made


def pieces(packed: Packed) -> list[tuple[list[int], list[bool]]]:
    """Every document that was packed, as (ids, mask)."""
    found = []
    whole = packed.batch(list(range(len(packed))))
    for ids, mask, doc in zip(whole.ids_BT, whole.mask_BT, whole.doc_BT, strict=True):
        for number in sorted(set(doc.tolist()) - {-1}):
            at = doc == number
            assert at.nonzero().flatten().diff().eq(1).all(), "a document lies in one stretch"
            found.append((ids[at].tolist(), mask[at].tolist()))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_every_token_of_every_document_once_with_its_mask(seed: int, tmp_path: Path, monkeypatch):
    """Random lengths, masks and shard sizes."""
    rng = random.Random(seed)
    monkeypatch.setattr(pack, "SHARD", rng.choice([1, 3, 7]))
    monkeypatch.setattr(pack, "WINDOW", rng.choice([1, 2, 8, 100]))
    splittable = rng.random() < 0.5
    made = documents([rng.randint(1, 2 * T) for _ in range(rng.randint(1, 80))])
    for document in made:
        document.splittable = splittable
        document.mask = [rng.random() < 0.5 for _ in document.ids]
    fitting = [d for d in made if splittable or len(d.ids) <= T]
    if not fitting:
        return
    packed = write(tmp_path, made, T, 10**6)

    found = pieces(packed)
    tokens = [i for ids, _ in found for i in ids]
    assert sorted(tokens) == sorted(i for d in fitting for i in d.ids)
    assert packed.too_long == len(made) - len(fitting)
    assert packed.documents == len(fitting)
    expected = {i: m for d in fitting for i, m in zip(d.ids, d.mask, strict=True)}
    for ids, mask in found:
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert not mask[0], "nothing of its own document predicts the first token"
        assert mask[1:] == [expected[i] for i in ids[1:]]
    by_row = packed.batch(list(range(len(packed)))).mask_BT.sum(1)
    assert torch.equal(packed.supervised.long(), by_row)


def test_a_sequence_is_padded_with_an_unsupervised_document_of_its_own(tmp_path: Path):
    packed = write(tmp_path, documents([5, 6]), T, 10)
    batch = packed.batch([0])
    assert batch.ids_BT.tolist() == [[*range(6, 12), *range(1, 6), 0, 0, 0, 0, 0]]
    assert batch.doc_BT.tolist() == [[0] * 6 + [1] * 5 + [-1] * 5]
    expected = [False] + [True] * 5 + [False] + [True] * 4 + [False] * 5
    assert batch.mask_BT.tolist() == [expected]


def test_rows_are_read_in_the_order_asked_for(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pack, "SHARD", 2)
    packed = write(tmp_path, documents([T] * 7), T, 10)
    assert len(packed) == 7
    got = packed.batch([6, 0, 3, 6])
    assert got.ids_BT[:, 0].tolist() == [6 * T + 1, 1, 3 * T + 1, 6 * T + 1]
    again = Packed(tmp_path).batch([6, 0, 3, 6])
    assert torch.equal(got.ids_BT, again.ids_BT)


def test_running_text_is_cut_and_chat_is_not(tmp_path: Path):
    packed = write(tmp_path / "text", documents([2 * T + 3], splittable=True), T, 10)
    assert sorted(len(ids) for ids, _ in pieces(packed)) == [3, T, T]
    assert (packed.documents, packed.too_long) == (1, 0)
    packed = write(tmp_path / "chat", documents([2 * T + 3, 4, T + 1]), T, 10)
    assert [len(ids) for ids, _ in pieces(packed)] == [4]
    assert (packed.documents, packed.too_long) == (1, 2)


def test_documents_share_sequences():
    packer = Packer(T)
    bins = [b for d in documents([9, 7, 8, 8, 15, 1]) for b in packer.add(d)]
    bins += packer.finish()
    assert [len(b.ids) for b in bins] == [T, T, T]
    assert list(packer.finish()) == []


@pytest.mark.parametrize(("median", "least"), [(24, 0.995), (55, 0.99), (120, 0.985)])
def test_little_is_left_empty(median: int, least: float):
    """Short answers, chats and longer answers in sequences of 256; placed as they come, each where
    it leaves the least room, they fill 99.3, 98.2 and 96.6 %."""
    rng = random.Random(0)
    lengths = [min(256, max(4, int(rng.lognormvariate(0, 0.6) * median))) for _ in range(3000)]
    packer = Packer(256)
    bins = [b for d in documents(lengths) for b in packer.add(d)]
    bins += packer.finish()
    assert sum(len(b.ids) for b in bins) == sum(lengths)
    assert sum(lengths) / (256 * len(bins)) > least


def test_few_wait_where_few_are_asked_for(tmp_path: Path):
    """A small set, such as the one for validation, is not made larger by what waits."""
    packed = write(tmp_path, documents([T // 2 + 1] * 500), T, 16)
    assert 16 <= len(packed) <= 24


def test_packing_stops_once_there_is_enough(tmp_path: Path, monkeypatch):
    """A long source is not read to its end."""
    monkeypatch.setattr(pack, "SHARD", 4)
    read = 0

    def endless():
        nonlocal read
        for document in documents([T] * 1000):
            read += 1
            yield document

    packed = write(tmp_path, endless(), T, 10)
    assert 10 <= len(packed) <= 14
    assert read <= 14


def test_every_row_too_long_says_so_with_the_median(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"longer than sequence_length 16: all 3 rows dropped \(m"
    ) as e:
        write(tmp_path, documents([17, 40, 1904]), T, 10)
    assert "(median 40 tokens)" in str(e.value)
    assert "raise sequence_length" in str(e.value)


def test_no_rows_says_so(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to train on: the source gave no rows"):
        write(tmp_path, [], T, 10)
    assert not (tmp_path / "packed.json").exists()


def test_an_empty_document_takes_no_place(tmp_path: Path):
    """An empty text, between others, is no document and breaks nothing."""
    made = [*documents([4]), Document([], [], True), *documents([3])]
    assert [len(ids) for ids, _ in pieces(write(tmp_path, made, T, 10))] == [4, 3]


def test_many_short_documents_keep_their_numbers_apart(tmp_path: Path):
    packed = write(tmp_path, documents([1] * T + [2] * 8), T, 10)
    assert sorted(len(ids) for ids, _ in pieces(packed)) == [1] * T + [2] * 8


# --- what is on disk is what was packed ----------------------------------------------------------


def read(folder: Path) -> None:
    packed = Packed(folder)
    packed.batch(list(range(len(packed))))


def damaged(folder: Path) -> str:
    """The sentence that opening the set ends with, or that of reading all of it."""
    with pytest.raises(ValueError, match="packed data are damaged: ") as why:
        read(folder)
    said = str(why.value)
    assert "delete the stage's folder `packed` and run again" in said
    return said


@pytest.fixture
def packed_folder(tmp_path: Path, monkeypatch) -> Path:
    """Seven sequences in four files."""
    monkeypatch.setattr(pack, "SHARD", 2)
    write(tmp_path, documents([T] * 7), T, 10)
    return tmp_path


@pytest.mark.parametrize("at_once", [2**30, 0], ids=["at once", "when read"])
@pytest.mark.parametrize("place", [0, 20, -1, -200])
def test_a_flipped_byte_is_refused_wherever_it_is(packed_folder, monkeypatch, place, at_once):
    monkeypatch.setattr(pack, "CHECKED_AT_ONCE", at_once)
    file = packed_folder / "packed-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert "packed-00002.safetensors" in damaged(packed_folder)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_truncated_file_is_refused_when_the_set_is_opened(packed_folder: Path, kept: int):
    file = packed_folder / "packed-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    assert f"packed-00001.safetensors has {len(whole[:kept])} bytes" in damaged(packed_folder)
    file.unlink()
    assert "has 0 bytes" in damaged(packed_folder)
    file.write_bytes(whole)
    assert len(Packed(packed_folder)) == 7


def test_each_byte_of_the_note_counts(packed_folder: Path):
    """A digit that changes in packed.json still makes JSON, and another set."""
    note = packed_folder / "packed.json"
    whole = note.read_text(encoding="utf-8")
    for broken in (whole.replace('"length": 16', '"length": 15'), whole[:-9], "[]", "{}", ""):
        note.write_text(broken, encoding="utf-8")
        assert "packed.json" in damaged(packed_folder)


def test_an_unfinished_set_is_none(tmp_path: Path, monkeypatch):
    """Without packed.json, which is written last, there is no set; and a file has its name only
    once it is whole."""
    monkeypatch.setattr(pack, "SHARD", 2)
    begun: list[str] = []
    real = pack.save_file

    def dies(tensors, path):
        begun.append(Path(path).name)
        if len(begun) == 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(pack, "save_file", dies)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, documents([T] * 7), T, 10)
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "packed-00000.safetensors",
        "packed-00001.safetensors",
    ]
    assert not (tmp_path / "packed.json").exists()
    assert "packed.json is not what packing writes" in damaged(tmp_path)


def test_a_process_hashes_a_file_once(packed_folder: Path, monkeypatch):
    hashed: list[str] = []
    real = pack.hashlib.file_digest

    def count(stream, kind):
        hashed.append(stream.name)
        return real(stream, kind)

    monkeypatch.setattr(pack.hashlib, "file_digest", count)
    for _ in range(3):
        packed = Packed(packed_folder)
        packed.batch(list(range(7)))
        packed.counts(200)
    assert len(hashed) == 0  # writing hashed what it opened


def test_nothing_of_a_large_set_is_used_unchecked(packed_folder: Path, monkeypatch):
    """Its files are hashed when the first row is read, or the tokens counted."""
    monkeypatch.setattr(pack, "CHECKED_AT_ONCE", 0)
    pack._digest.cache_clear()
    packed = Packed(packed_folder)
    assert packed._trusted == set()
    packed.batch([6])
    assert packed._trusted == {3}
    packed.counts(200)
    assert packed._trusted == {0, 1, 2, 3}
