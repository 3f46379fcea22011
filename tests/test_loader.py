"""Data: what is refused before training, the order of batches, and the bytes of tokens."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_shard

from train_gpt import (
    BatchLoader,
    Runtime,
    TokenBytes,
    UserError,
    data_fingerprint,
    find_data_shards,
    find_tokenizer,
    load_tokenizer,
    open_data,
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
    "content",
    [
        b"",
        b"\0" * 1023,
        b"<!DOCTYPE html>" * 200,
        shard_bytes(9, 9, magic=20240521),
        shard_bytes(9, 9, version=2),
        shard_bytes(9, 8),
        shard_bytes(9, 10),
        shard_bytes(9, 9)[:-1],
        shard_bytes(-1, 0),
        shard_bytes(2**31 - 1, 9),
        shard_bytes(0, 0),
    ],
)
def test_a_bad_shard_is_named_with_the_remedy(tmp_path, content):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path} of {len(content)} bytes .*again"):
        open_data_shard(path)


def test_shards_are_found_in_order_or_named_with_the_remedy(tmp_path):
    for name in ("train_000010", "train_000002", "train_000000"):
        write_shard(tmp_path / f"fineweb_{name}.bin", np.arange(9))
    names = [path.stem for path in find_data_shards(tmp_path, "train")]
    assert names == ["fineweb_train_000000", "fineweb_train_000002", "fineweb_train_000010"]
    with pytest.raises(UserError, match=r"fineweb_val_\*\.bin.*data/.*\.py"):
        find_data_shards(tmp_path, "val")


def test_the_fingerprint_tells_shards_apart(tmp_path):
    tokens = np.arange(10_000)
    path = write_shard(tmp_path / "a.bin", tokens)
    prints = {data_fingerprint([path])}
    assert data_fingerprint([path]) in prints
    for place in (0, 4095, 9999):
        write_shard(path, np.where(np.arange(10_000) == place, 7, tokens))
        prints.add(data_fingerprint([path]))
    write_shard(path, np.where(abs(np.arange(10_000) - 5000) < 4, 7, tokens))  # in the middle
    prints.add(data_fingerprint([path]))
    write_shard(path, tokens[:-1])
    prints.add(data_fingerprint([path]))
    assert len(prints) == 6


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture
def folder(corpus, tmp_path) -> Path:
    """A copy of the corpus that holds its tokenizer."""
    shutil.copytree(corpus.data_path, tmp_path / "data")
    shutil.copy(corpus.tokenizer_path, tmp_path / "data" / "tokenizer.model")
    return tmp_path / "data"


def refusal(hp, runtime) -> str:
    with pytest.raises(UserError) as caught:
        open_data(hp, runtime)
    return str(caught.value)


def test_a_folder_brings_its_tokenizer_and_that_the_size(folder, tiny, runtime):
    hp = tiny(data_path=str(folder), tokenizer_path=None, vocab_size=None)
    assert find_tokenizer(hp) == folder / "tokenizer.model"
    hp, data = open_data(hp, runtime)
    assert (hp.vocab_size, hp.tokenizer_path) == (320, str(folder / "tokenizer.model"))
    assert [facts["split"] for facts in data.facts] == ["train", "val"]
    assert data.facts[1]["tokens"] == len(data.val_tokens)
    _, evaluated = open_data(replace(hp, evaluate="x"), runtime)
    assert evaluated.loader is None


def test_texts_and_windows_that_are_too_short_are_refused(folder, tiny, runtime):
    hp = tiny(data_path=str(folder))
    tokens = np.append(np.arange(4, 35), 319)
    write_shard(folder / "fineweb_val_000000.bin", tokens[:-1])
    write_shard(folder / "fineweb_val_000001.bin", tokens[-1:])
    assert "32 validation tokens" in refusal(hp, runtime)
    for number in (0, 1):
        write_shard(folder / f"fineweb_train_00000{number}.bin", np.resize(tokens, 63))
    assert "train_seq_len=32" in refusal(hp, runtime)


def refused_on_a_rank(runtime: Runtime, hp) -> str:
    return refusal(hp, runtime)


def test_a_foreign_token_that_one_rank_sees_is_refused_on_all(folder, tiny, on_ranks):
    write_shard(folder / "fineweb_train_000001.bin", np.array([1, 5, 400] * 200))
    texts = on_ranks(2, refused_on_a_rank, tiny(data_path=str(folder)))
    assert all("has 320 pieces, the shards' largest token" in text for text in texts)


def test_a_tokenizer_that_is_not_the_shards_is_refused(folder, tiny, runtime):
    """Another size than was set, too many pieces, another hash than the manifest names."""
    hp, manifest = tiny(data_path=str(folder)), folder / "manifest.json"
    assert "has 320 pieces, not vocab_size=1024" in refusal(replace(hp, vocab_size=1024), runtime)
    own = hashlib.sha256((folder / "tokenizer.model").read_bytes()).hexdigest()
    for text in (json.dumps({"tokenizer": {"sha256": own}}), "{}", "[]"):
        manifest.write_text(text)
        assert open_data(hp, runtime)[0].tokenizer_sha256 == own
    for text in ("[" * 100_000, "no JSON", ""):
        manifest.write_text(text)
        assert "manifest.json is damaged" in refusal(hp, runtime)
    manifest.write_text(json.dumps({"tokenizer": {"sha256": own[::-1]}}))
    assert "is not the shards', whose sha256 is" in refusal(hp, runtime)
    manifest.unlink()
    another = refusal(replace(hp, tokenizer_sha256=own[::-1]), runtime)
    assert "is not the model's, whose sha256 is" in another
    named = folder / "named.model"  # another file that reads the same: one more field
    named.write_bytes((folder / "tokenizer.model").read_bytes() + b"\xc0\x3e\x01")
    other = refusal(replace(hp, tokenizer_path=str(named)), runtime)
    assert f"named.model is not the shards', whose sha256 is {own}" in other
    for path in folder.glob("*.bin"):
        write_shard(path, open_data_shard(path).clip(max=159))  # of a tokenizer of 160 pieces
    assert "has 320 pieces, the shards' largest token is 159" in refusal(hp, runtime)


def test_a_file_that_is_no_tokenizer_is_refused(corpus, tmp_path):
    foreign = tmp_path / "foreign.model"
    for content in (b"", b"no model", corpus.tokenizer_path.read_bytes()[:5000]):
        foreign.write_bytes(content)
        with pytest.raises(UserError, match=r"foreign\.model"):
            load_tokenizer(foreign)


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


def test_every_window_of_an_epoch_is_read_once(numbered, tiny):
    """Windows are consecutive tokens of one shard, and their targets tile it without a gap."""
    hp = tiny(train_batch_tokens=32)
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


# ---------------------------------------------------------------------------------------- bytes


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
