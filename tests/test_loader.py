"""Data: what is refused before training, the order of batches, and the bytes of tokens."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_shard

from train_gpt import (
    BatchLoader,
    Evaluator,
    Log,
    Runtime,
    TokenBytes,
    UserError,
    check_token_bytes,
    check_token_ids,
    data_fingerprint,
    find_data_shards,
    load_tokenizer,
    open_data_shard,
)

# ------------------------------------------------------------------------------------- shards


def shard_bytes(count: int, tokens: int, magic: int = 20240520, version: int = 1) -> bytes:
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, count
    return header.tobytes() + np.arange(tokens, dtype="<u2").tobytes()


def test_a_shard_is_read_as_written(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 65_536, 77).astype(np.uint16)
    read = open_data_shard(write_shard(tmp_path / "a.bin", tokens))
    assert read.dtype == np.uint16
    assert np.array_equal(read, tokens)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "0 bytes"),
        (b"\0" * 1023, "1023 bytes"),
        (shard_bytes(9, 9, magic=20240521), "20240521"),
        (shard_bytes(9, 9, version=2), "[20240520, 2]"),
        (shard_bytes(9, 8), "counts 9"),
        (shard_bytes(9, 10), "counts 9"),
        (shard_bytes(9, 9)[:-1], "8.5"),
        (shard_bytes(-1, 0), "counts -1"),
        (shard_bytes(2**31 - 1, 9), "counts 2147483647"),
        (shard_bytes(0, 0), "no tokens"),
        (b"<!DOCTYPE html>" * 200, "magic"),
    ],
)
def test_a_bad_shard_is_named_with_the_remedy(tmp_path, content, named):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_data_shard(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)
    assert "again" in str(caught.value)


def test_a_folder_without_shards_is_named_with_the_remedy(tmp_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", np.arange(9))
    with pytest.raises(UserError, match=r"fineweb_train_\*\.bin.*data/.*\.py"):
        find_data_shards(tmp_path, "train")
    with pytest.raises(UserError, match="is missing"):
        open_data_shard(tmp_path / "fineweb_train_000000.bin")


def test_shards_are_found_in_order(tmp_path):
    for name in ("train_000010", "train_000002", "val_000000", "train_000000"):
        write_shard(tmp_path / f"fineweb_{name}.bin", np.arange(9))
    names = [path.stem for path in find_data_shards(tmp_path, "train")]
    assert names == ["fineweb_train_000000", "fineweb_train_000002", "fineweb_train_000010"]


def test_a_token_outside_the_vocabulary_is_refused(tmp_path):
    good = write_shard(tmp_path / "good.bin", np.array([0, 319]))
    bad = write_shard(tmp_path / "bad.bin", np.array([0, 320, 5]))
    check_token_ids([good], 320)
    with pytest.raises(UserError, match=r"bad\.bin holds token 320"):
        check_token_ids([good, bad], 320)


def test_the_fingerprint_tells_shards_apart(tmp_path):
    tokens = np.arange(10_000)
    path = write_shard(tmp_path / "a.bin", tokens)
    prints = {data_fingerprint([path])}
    assert data_fingerprint([path]) in prints
    for place in (0, 4095, 9999):
        write_shard(path, np.where(np.arange(10_000) == place, 7, tokens))
        prints.add(data_fingerprint([path]))
    write_shard(path, tokens[:-1])
    prints.add(data_fingerprint([path]))
    assert len(prints) == 5


def test_a_text_shorter_than_a_window_is_refused(corpus, tiny, runtime):
    table = TokenBytes(corpus.tokenizer, runtime.device)
    for tokens in (corpus.val_tokens[:1], corpus.val_tokens[:32]):
        with pytest.raises(UserError, match=f"{len(tokens)} validation tokens"):
            Evaluator(tokens, table, tiny(), runtime, Log(None))
    Evaluator(corpus.val_tokens[:33], table, tiny(), runtime, Log(None))
    with pytest.raises(UserError, match="train_seq_len=32"):
        BatchLoader([corpus.val_tokens[:63], corpus.val_tokens[:40]], tiny(), runtime)


# -------------------------------------------------------------------------------------- order


def ranks_of(world_size: int) -> list[Runtime]:
    device = torch.device("cpu")
    return [Runtime(rank, world_size, device, torch.float32) for rank in range(world_size)]


def batches(shards, hp, steps, world_size: int = 1) -> list[np.ndarray]:
    """The global batches of `steps`: the shares of all ranks, one after the other."""
    loaders = [BatchLoader(shards, hp, rank) for rank in ranks_of(world_size)]
    return [np.concatenate([loader.batch(s).numpy() for loader in loaders]) for s in steps]


@pytest.fixture(scope="module")
def numbered() -> list[np.ndarray]:
    """Shards in which a token tells its place: 10,000 s + i; the last is too short for a window."""
    return [
        (10_000 * s + np.arange(n)).astype(np.uint16) for s, n in enumerate((32 * 7 + 5, 400, 640))
    ] + [np.full(40, 65_535, np.uint16)]


WINDOWS = (7 - 1) + (400 // 32 - 1) + (640 // 32 - 1)  # one of each shard is spare for the phase


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_window_of_an_epoch_is_read_once(numbered, tiny, shuffle):
    """Windows are consecutive tokens of one shard, and their targets tile it without a gap."""
    hp = tiny(shuffle=shuffle, train_batch_tokens=32)
    for epoch in range(3):
        steps = range(epoch * WINDOWS, (epoch + 1) * WINDOWS)
        rows = np.concatenate(batches(numbered, hp, steps)).astype(int)
        assert rows.shape == (WINDOWS, 33)
        assert (np.diff(rows) == 1).all()
        targets = Counter(rows[:, 1:].flatten().tolist())
        assert len(targets) == 32 * WINDOWS, "no token is a target twice"
        starts = np.array_split(np.sort(rows[:, 0]), [6, 6 + 11])
        assert all((np.diff(s) == 32).all() for s in starts)


def test_each_epoch_has_an_order_and_a_cut_of_its_own(numbered, tiny):
    hp = tiny(train_batch_tokens=32)
    first, second = (
        np.concatenate(batches(numbered, hp, range(e * WINDOWS, (e + 1) * WINDOWS)))[:, 0]
        for e in (0, 1)
    )
    assert set(first % 32) != set(second % 32), "cut elsewhere"
    assert not np.array_equal(np.argsort(first), np.argsort(second))
    other = np.concatenate(batches(numbered, replace(hp, seed=5), range(WINDOWS)))[:, 0]
    assert not np.array_equal(first, other), "the seed matters"
    assert np.array_equal(first, np.concatenate(batches(numbered, hp, range(WINDOWS)))[:, 0]), (
        "nothing else does"
    )


def test_without_shuffling_the_order_is_that_of_the_files(numbered, tiny):
    hp = tiny(shuffle=False, train_batch_tokens=64)
    rows = np.concatenate(batches(numbered, hp, range(3)))[:, 0]
    assert rows.tolist() == [0, 32, 64, 96, 128, 160]
    assert np.concatenate(batches(numbered, hp, [3]))[:, 0].tolist() == [10_000, 10_032]


@pytest.mark.parametrize("batch_seqs", [1, 3, 8, 11])
def test_every_world_size_reads_the_same_global_batches(numbered, tiny, batch_seqs):
    """Also batches smaller than the world and steps that straddle two epochs."""
    hp, steps = tiny(train_batch_tokens=32 * batch_seqs), range(WINDOWS // batch_seqs + 2)
    alone = batches(numbered, hp, steps)
    assert all(len(batch) == batch_seqs for batch in alone)
    for world_size in (2, 3, 8):
        shared = batches(numbered, hp, steps, world_size)
        assert all(np.array_equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_shares_are_contiguous_cover_all_and_differ_by_at_most_one():
    for world_size in (1, 2, 3, 7, 8):
        for count in (0, 1, 2, 5, 8, 17, 100):
            shares = [rank.share(count) for rank in ranks_of(world_size)]
            assert [i for s in shares for i in range(count)[s]] == list(range(count))
            sizes = [s.stop - s.start for s in shares]
            assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------------------- tokenizer, bytes


def test_a_bad_tokenizer_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match="is missing"):
        load_tokenizer(tmp_path / "none.model", corpus.vocab_size)
    for content in (b"", b"no model", corpus.tokenizer_path.read_bytes()[:5000]):
        foreign = tmp_path / "foreign.model"
        foreign.write_bytes(content)
        with pytest.raises(UserError, match=r"foreign\.model"):
            load_tokenizer(foreign, corpus.vocab_size)
    with pytest.raises(UserError, match="VOCAB_SIZE=320"):
        load_tokenizer(corpus.tokenizer_path, 1024)
    assert load_tokenizer(corpus.tokenizer_path, 320).vocab_size() == 320


def counted(table: TokenBytes, tokens: np.ndarray) -> int:
    ids = torch.from_numpy(tokens.astype(np.int64))
    return int(table.of(ids[:-1], ids[1:]).sum())


def test_bytes_are_those_of_the_text(corpus, runtime):
    """Documents of every kind of piece, against the length of what they decode to."""
    table = TokenBytes(corpus.tokenizer, runtime.device)
    total = 0
    for document in corpus.val_documents:
        ids = np.array([1, *corpus.tokenizer.Encode(document)])
        text = corpus.tokenizer.Decode(ids[1:].tolist())
        assert text == document, "this language is its own normal form"
        assert counted(table, ids) == len(text.encode())
        total += len(text.encode())
    assert counted(table, corpus.val_tokens) == total, "a boundary is 0 bytes"
    kinds = corpus.tokenizer.IsByte(corpus.val_tokens.tolist())
    assert any(kinds), "characters outside the vocabulary are part of this test"


def test_a_space_after_a_boundary_is_no_byte(corpus, runtime):
    """The rule of the field, piece by piece."""
    table, tokenizer = TokenBytes(corpus.tokenizer, runtime.device), corpus.tokenizer
    river, space, letter = (tokenizer.PieceToId(p) for p in ("▁of", "▁", "e"))
    for previous in range(4):  # padding, BOS, EOS, unknown
        assert counted(table, np.array([previous, river])) == 2
        assert counted(table, np.array([previous, space])) == 0
        assert counted(table, np.array([letter, previous])) == 0
    assert counted(table, np.array([letter, river])) == 3
    assert counted(table, np.array([letter, space])) == 1
    byte = tokenizer.PieceToId("<0xE2>")
    assert counted(table, np.array([letter, byte])) == 1
    assert counted(table, np.array([byte, river])) == 3


def test_the_check_at_the_start_finds_a_foreign_tokenizer(corpus, runtime):
    """check_token_bytes passes on the real table and fails on one that is wrong for one piece."""
    table = TokenBytes(corpus.tokenizer, runtime.device)
    check_token_bytes(corpus.tokenizer, table, corpus.val_tokens)
    for cut in (1, 2, 100, 333, 500):
        check_token_bytes(corpus.tokenizer, table, corpus.val_tokens[:cut])
    piece = int(np.bincount(corpus.val_tokens[corpus.val_tokens > 3]).argmax())
    table.length[piece] += 1
    with pytest.raises(UserError, match="bytes"):
        check_token_bytes(corpus.tokenizer, table, corpus.val_tokens)
