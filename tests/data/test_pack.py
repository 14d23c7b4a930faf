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
    monkeypatch.setattr(pack, "OPEN", rng.choice([1, 2, 8]))
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
    assert batch.ids_BT.tolist() == [[*range(1, 12), 0, 0, 0, 0, 0]]
    assert batch.doc_BT.tolist() == [[0] * 5 + [1] * 6 + [-1] * 5]
    expected = [False] + [True] * 4 + [False] + [True] * 5 + [False] * 5
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
    assert [len(b.ids) for b in bins] == [T, T, T]
    assert list(packer.finish()) == []


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
