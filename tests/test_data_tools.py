"""data/prepare_text.py and data/inspect_data.py: any text -> shards, and what is in shards."""

import gzip
import io
import json
import lzma
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.tokenizing import Encoder

from data import documents, inspect_data, overlap, pipeline, prepare_text, python_docs, shards
from train_gpt import TokenBytes, UserError, find_data_shards, open_data_shard

BOS = 1
ODD_TEXTS = [
    "plain words, 12345 and 3.14159",
    "  leading, trailing  and   inner    spaces  ",
    "line\nbreaks\r\nand\ttabs\n\n\n",
    "ｆｕｌｌ－ｗｉｄｔｈ　ＡＢＣ １２３ ﬁne ½ ™",
    "naïve café, Ünïcödé, Ελληνικά, 日本語のテキスト, עברית, 🎉👩‍👩‍👧 e\u0301 a\u0308\u0301",
    "▁ looks ▁like▁ a space",
    "<s> </s> <unk> <0x41> <pad>",
    "nbsp\u00a0thin\u2009zero\u200bwidth\ufeffbom soft\u00adhyphen",
    "x" * 300 + " " + "日" * 200,
    "¨ ´ ˜ start with what decomposes into a space",
    "\u0301 combining first",
]


def make_documents(count, seed=0, line="\n"):
    rng = random.Random(seed)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(rng.choices(letters, k=rng.randint(1, 9))) for _ in range(600)]
    texts = []
    for _ in range(count):
        chosen = rng.choices(words, k=rng.randint(5, 120))
        texts.append(line.join(" ".join(chosen[i : i + 9]) for i in range(0, len(chosen), 9)))
    return texts


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def prepare(tmp_path):
    """Runs data/prepare_text.py in this process, by default with one worker."""

    def run(*arguments, output="out", workers=1):
        flags = ["--output", tmp_path / output, "--vocab-size", 400, "--workers", workers]
        return prepare_text.main([str(word) for word in [*arguments, *flags]])

    return run


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers by name: the field's options, and others that must be treated differently."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = make_documents(200) + ODD_TEXTS * 3 + ["this is one of the texts"] * 200

    def train(name, texts=texts, **changes):
        model = io.BytesIO()
        options = {
            "model_type": "bpe",
            "vocab_size": 400,
            "byte_fallback": True,
            "split_digits": True,
            "normalization_rule_name": "nmt_nfkc",
            "add_dummy_prefix": False,
            "pad_id": 0,
            "bos_id": 1,
            "eos_id": 2,
            "unk_id": 3,
            "minloglevel": 2,
            "character_coverage": 0.98,
            "hard_vocab_limit": False,
        }
        spm.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts), model_writer=model, **options | changes
        )
        (folder / name).write_bytes(model.getvalue())

    train("field")
    train("lossless", normalization_rule_name="identity", remove_extra_whitespaces=False)
    train("prefix", add_dummy_prefix=True)
    train("unigram", model_type="unigram")
    train("crossing", split_by_whitespace=False)
    train("no-fallback", byte_fallback=False)
    train("no-bos", bos_id=-1)
    train("no-space", texts=[text.replace(" ", "") for text in make_documents(100, line="")])
    return folder


def decoded_documents(folder, split):
    """The documents of a split as their tokenizer, and nothing of ours, decodes them."""
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = np.concatenate([open_data_shard(path) for path in find_data_shards(folder, split)])
    assert tokens[0] == BOS
    starts = np.flatnonzero(tokens == BOS)
    return [tokenizer.Decode(ids[1:].tolist()) for ids in np.split(tokens, starts[1:])]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shards_of(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".bin")}


# --------------------------------------------------------------------------------------------------
# Tokenizing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["field", "lossless", "prefix", "unigram", "crossing"])
def test_encoding_word_by_word_equals_encoding_the_text(tokenizers, name):
    encoder = Encoder(str(tokenizers / name), max_words=20)  # few, so that the table is cleared
    assert encoder.words_are_separate == (name not in ("crossing", "unigram"))
    for text in [*ODD_TEXTS, *make_documents(20, seed=1)]:
        normalized = encoder.tokenizer.Normalize(text).replace("▁", " ")
        normalized = normalized.removeprefix(" ") if name == "prefix" else normalized
        batch = encoder.encode_batch([normalized])
        assert batch.tokens.tolist() == [BOS, *encoder.tokenizer.Encode(normalized)]
        assert batch.altered_documents == 0


def test_a_token_sequence_of_another_text_is_noticed(tokenizers):
    encoder = Encoder(str(tokenizers / "field"), max_words=1000)
    wrong = encoder.encode("some text")
    assert encoder.checked(["some text", "same text"], [wrong, wrong]).altered_documents == 1
    encoder.word_tokens["text"] = encoder.word_tokens["next"]
    with pytest.raises(RuntimeError, match="encode otherwise"):
        encoder.encode_batch(["some text"])


# --------------------------------------------------------------------------------------------------
# Preparing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["nmt_nfkc", "identity"])
def test_shards_hold_every_document_once_and_count_its_bytes(prepare, tmp_path, normalization):
    texts = [*make_documents(120), *ODD_TEXTS]
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    assert prepare(path, "--normalization", normalization, "--shard-tokens", 1000) == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    table = TokenBytes(tokenizer, torch.device("cpu"))
    found = []
    for split in ("train", "val"):
        documents, said = decoded_documents(out, split), manifest["splits"][split]
        paths = find_data_shards(out, split)
        assert all(len(open_data_shard(path)) == 1000 for path in paths[:-1])
        assert said["documents"] == len(documents)
        assert said["text_bytes"] == sum(len(text.encode()) for text in documents)
        # What is scored: all but a space that opens a document.
        scored = sum(len(text.removeprefix(" ").encode()) for text in documents)
        counted = sum(shards.shard_text_bytes(paths, i, table) for i in range(len(paths)))
        assert said["scored_bytes"] == counted
        if normalization == "nmt_nfkc":
            assert counted == scored
        found += documents
    if normalization == "identity":
        expected = [text.replace("▁", " ") for text in texts]
    else:
        expected = [tokenizer.Normalize(text.replace("▁", " ")).replace("▁", " ") for text in texts]
    assert sorted(found) == sorted(expected)
    changes = manifest["normalization_changes"]
    breaks = sum(text.count("\n") for text in texts)
    assert changes["line_breaks"] == (breaks if normalization == "nmt_nfkc" else 0)
    assert (changes["full_width_forms"] > 0) == (normalization == "nmt_nfkc")


def test_result_depends_on_the_seed_and_on_no_way_of_working(prepare, tmp_path):
    texts = make_documents(150)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    assert prepare(path, output="a") == 0
    assert prepare(path, "--memory-mb", 300, output="b", workers=3) == 0
    assert shards_of(tmp_path / "a") == shards_of(tmp_path / "b")
    assert prepare(path, "--seed", 7, output="c") == 0
    held_out = [set(decoded_documents(tmp_path / name, "val")) for name in "abc"]
    assert held_out[0] == held_out[1] != held_out[2]
    write_jsonl(path, texts[::-1])
    assert prepare(path, output="d") == 0
    assert set(decoded_documents(tmp_path / "d", "val")) == held_out[0]


def test_no_validation_document_is_in_training(prepare, tmp_path):
    texts = make_documents(60)
    spaced = [f" {text}\n" for text in texts]  # equal once normalized
    path = write_jsonl(tmp_path / "in.jsonl", texts + spaced + texts)
    assert prepare(path, "--val-fraction", 0.3) == 0
    train, val = (decoded_documents(tmp_path / "out", split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(val) == len(set(val)) > 5
    assert len(train) == 3 * (60 - len(val))
    given = write_jsonl(tmp_path / "val.jsonl", spaced[:10])
    assert prepare(path, "--val-input", given, output="given") == 0
    assert decoded_documents(tmp_path / "given", "val") == [" ".join(t.split()) for t in texts[:10]]
    assert len(decoded_documents(tmp_path / "given", "train")) == 150


def test_held_out_bytes_are_close_to_the_fraction(prepare, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(400))
    assert prepare(path, "--val-fraction", 0.1) == 0
    splits = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]
    share = splits["val"]["text_bytes"] / sum(split["text_bytes"] for split in splits.values())
    assert abs(share - 0.1) < 0.005


def test_every_format_gives_the_same_shards(prepare, tmp_path, tokenizers, monkeypatch):
    texts = make_documents(30)
    plain, lines = "\n@@\n".join(texts).encode(), write_jsonl(tmp_path / "a.jsonl", texts)
    inputs = {"b.txt": plain, "c.md.gz": gzip.compress(plain), "d.txt.xz": lzma.compress(plain)}
    half = len(plain) // 2
    inputs["e.txt.gz"] = gzip.compress(plain[:half]) + gzip.compress(plain[half:])  # two members
    try:
        import zstandard

        inputs["f.txt.zst"] = zstandard.compress(plain)
    except ImportError:
        pass
    flags = ["--tokenizer", tokenizers / "field", "--separator", "\\n@@\\n"]
    assert prepare(lines, *flags, output="jsonl") == 0
    for name, data in inputs.items():
        (tmp_path / name).write_bytes(data)
        assert prepare(tmp_path / name, *flags, output=f"from-{name}") == 0
        assert shards_of(tmp_path / f"from-{name}") == shards_of(tmp_path / "jsonl")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(plain)))
    assert prepare("-", *flags, output="stdin") == 0
    assert shards_of(tmp_path / "stdin") == shards_of(tmp_path / "jsonl")


def test_refuses_broken_zstandard(prepare, tmp_path, capsys):
    zstandard = pytest.importorskip("zstandard")
    text = "\n@@\n".join(make_documents(300)).encode()
    whole = zstandard.compress(text)
    path = tmp_path / "a.txt.zst"
    for broken in (whole[:-50], whole[: len(whole) // 2], whole + whole[:20], text):
        path.write_bytes(broken)
        assert prepare(path, "--separator", "@@") == 1
        assert "broken .zst" in capsys.readouterr().err
    path.write_bytes(whole + zstandard.compress(text))  # two frames
    assert prepare(path, "--separator", "@@") == 0


BAD_INPUTS = {
    "utf-16": ("a.txt", "text".encode("utf-16"), "no UTF-8"),
    "latin-1": ("a.txt", "caf\xe9 au lait".encode("latin-1"), "byte 3 (0xe9)"),
    "binary": ("a.txt", bytes(1000), "zero byte"),
    "empty": ("a.txt", b"", "no text"),
    "white space": ("a.txt", b" \n\n \t", "no text"),
    "one document": ("a.txt", b"all of it " * 500, "two or more"),
    "equal documents": ("a.jsonl", b'{"text": "same"}\n' * 9, "1 different"),
    "long document": ("a.txt", b"word " * 300_000, "--memory-mb"),
    "long line": ("a.jsonl", b'{"text": "' + b"word " * 1_100_000 + b'"}', "--memory-mb"),
    "no JSON": ("a.jsonl", b'{"text": "fine"}\n{"text": oh}\n', "line 2"),
    "no field": ("a.jsonl", b'{"body": "words"}\n', "--text-key"),
    "no object": ("a.jsonl", b'["text"]\n', "--text-key"),
    "no text": ("a.jsonl", b'{"text": 5}\n', "--text-key"),
    "surrogate": ("a.jsonl", b'{"text": "\\ud800"}\n', "surrogate"),
    "cut gzip": ("a.txt.gz", gzip.compress(random.Random(0).randbytes(9000))[:-99], "broken .gz"),
    "no gzip": ("a.txt.gz", b"plain text", "broken .gz"),
    "cut xz": ("a.txt.xz", lzma.compress(b"words " * 9000)[:-30], "broken .xz"),
    "unknown kind": ("a.pdf", b"%PDF-1.7", "rename it"),
    "little text": ("a.jsonl", b'{"text": "a b"}\n{"text": "c d"}\n', "--vocab-size 400"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_refuses_bad_input_and_leaves_nothing(prepare, tmp_path, capsys, case):
    name, data, message = BAD_INPUTS[case]
    (tmp_path / name).write_bytes(data)
    assert prepare(tmp_path / name, "--memory-mb", 256) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_refuses_bad_arguments_and_tokenizers(prepare, tmp_path, tokenizers, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(50))

    def refuses(message, *arguments):
        before = sorted(tmp_path.iterdir())
        assert prepare(*arguments) == 1
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before

    refuses("INPUT")
    refuses("is no file", tmp_path / "missing.txt")
    refuses("--val-fraction 2.0", path, "--val-fraction", 2, "--memory-mb", 1)
    refuses("--memory-mb 1", path, "--val-fraction", 2, "--memory-mb", 1)  # all at once
    refuses("missing", path, "--tokenizer", tmp_path / "missing.model")
    refuses("no SentencePiece", path, "--tokenizer", path)
    refuses("no byte fallback", path, "--tokenizer", tokenizers / "no-fallback")
    refuses("no BOS", path, "--tokenizer", tokenizers / "no-bos")
    refuses("--normalization", path, "--tokenizer", tokenizers / "field", "--normalization", "nfkc")
    refuses("no piece for the space", path, "--tokenizer", tokenizers / "no-space")
    spaceless = [text.replace(" ", "") for text in make_documents(50, line="")]
    path = write_jsonl(tmp_path / "spaceless.jsonl", spaceless)
    refuses("no piece for the space", path)  # nor has one that is trained on such text


def test_unknown_characters_are_counted_when_allowed(prepare, tmp_path, tokenizers):
    texts = [*make_documents(50), "one 龘 character", "龘 opens and 龘龘 a run"]
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    flags = ["--tokenizer", tokenizers / "no-fallback", "--allow-unknown", "--val-fraction", 0.5]
    assert prepare(path, *flags) == 0
    splits = json.loads((tmp_path / "out" / "manifest.json").read_text())["splits"]
    assert sum(split["unknown_tokens"] for split in splits.values()) == 3
    # 4 characters of 3 bytes, and the spaces that follow one: no piece before them, so not scored.
    lost = sum(split["text_bytes"] - split["scored_bytes"] for split in splits.values())
    assert lost == 4 * 3 + 3


def test_replaces_a_folder_only_when_told(prepare, tmp_path, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(50))
    assert prepare(path) == 0
    made = contents(tmp_path / "out")
    changed = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert prepare(path) == 0  # the same again: nothing to do
    assert changed == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert prepare(path, "--seed", 5) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert contents(tmp_path / "out") == made
    assert prepare(path, "--seed", 5, "--overwrite") == 0
    assert contents(tmp_path / "out").keys() == made.keys()
    assert contents(tmp_path / "out") != made
    (tmp_path / "out" / "fineweb_val_000000.bin").write_bytes(b"cut")
    assert prepare(path, "--seed", 5) == 1  # damaged, so not the same
    (tmp_path / "out" / "notes.doc").write_text("mine")
    assert prepare(path, "--seed", 5, "--overwrite") == 1
    assert "notes.doc" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert prepare(path, output="file") == 1
    assert prepare(path, output="file/below") == 1
    assert (tmp_path / "file").read_text() == "mine"


def die_at(event, signal_number):
    """Makes this process die at the `event`th of the steps that change a file."""
    steps = iter(range(1000))

    def stepping(function):
        def step(*arguments, **options):
            if next(steps) == event:
                os.kill(os.getpid(), signal_number)
            return function(*arguments, **options)

        return step

    for owner, name in (
        (shards.ShardWriter, "write"),
        (shards.ShardWriter, "next_shard"),
        (shards.ShardWriter, "close"),
        (Path, "rename"),
        (Path, "replace"),
        (Path, "write_bytes"),
        (shutil, "rmtree"),
    ):
        setattr(owner, name, stepping(getattr(owner, name)))


def die_preparing(event, signal_number, arguments):
    torch.set_num_threads(
        1
    )  # a forked process has none of its parent's threads, and waits for them
    signal.signal(signal.SIGTERM, prepare_text.stop)
    die_at(event, signal_number)
    os._exit(prepare_text.main(arguments))


SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("signal_number", SIGNALS)
@pytest.mark.parametrize("replacing", [False, True])
def test_interrupted_anywhere_nothing_half_written_is_seen(
    tmp_path, tokenizers, signal_number, replacing
):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(40))
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    flags = ["--tokenizer", tokenizers / "field", "--vocab-size", 400, "--workers", 1]
    flags += ["--shard-tokens", 4000, "--output", out]
    arguments = [str(word) for word in [path, *flags]]
    assert prepare_text.main([*arguments, "--seed", "1"]) == 0
    before = contents(out) if replacing else {}
    arguments += ["--seed", "2", "--overwrite"]
    assert prepare_text.main(arguments) == 0
    wanted = shards_of(out)
    finished = False
    for event in range(100):
        shutil.rmtree(out, ignore_errors=True)
        for name, data in before.items():
            out.mkdir(exist_ok=True)
            (out / name).write_bytes(data)
        process = fork.Process(target=die_preparing, args=(event, signal_number, arguments))
        process.start()
        process.join(60)
        assert process.exitcode is not None
        found = contents(out) if out.exists() else {}
        if finished := finished or (bool(found) and found != before):
            assert shards_of(out) == wanted
            assert "manifest.json" in found
        elif signal_number == signal.SIGKILL:
            assert found in ({}, before)
        else:
            assert found == before
            assert [file.name for file in tmp_path.glob(".out*")] == []
        if process.exitcode == 0:
            break
        assert prepare_text.main(arguments) == 0
        assert shards_of(out) == wanted
    assert finished
    assert event > 8


def test_memory_does_not_grow_with_the_corpus(prepare, tmp_path, monkeypatch, tokenizers):
    monkeypatch.setattr(pipeline, "MAX_BATCH_BYTES", 20_000)
    monkeypatch.setattr(documents, "READ_BYTES", 20_000)
    peaks = []
    monkeypatch.setattr(shards, "COUNT_TOKENS", 20_000)
    for size in (100, 100, 1000):  # the first run fills caches
        path = write_jsonl(tmp_path / f"{size}.jsonl", make_documents(size))
        tracemalloc.start()
        assert prepare(path, "--tokenizer", tokenizers / "field", "--overwrite") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 300_000
    assert peaks[2] < peaks[1] + 100_000


# --------------------------------------------------------------------------------------------------
# The source without any download
# --------------------------------------------------------------------------------------------------


def test_python_docs_reads_prose_and_runs_nothing(tmp_path, monkeypatch):
    prose = {name: " ".join(make_documents(3, seed=name, line=" ")) for name in "abcdef"}
    library = tmp_path / "lib"
    modules = {
        "first.py": f'"""{prose["a"]}"""\nraise SystemExit("imported")',
        "pack/second.py": f'class C:\n    """{prose["b"]}"""\n    def f(self): """{prose["a"]}"""',
        "test/third.py": f'"""{prose["c"]}"""',
        "tiny.py": '"""Short."""',
        "pydoc_data/topics.py": f"topics = {{'x': {prose['d']!r}, 'y': {prose['e']!r}}}",
    }
    for name, source in modules.items():
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(source)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(library))
    assert list(python_docs.python_docs()) == [prose[name] for name in "deab"]


# --------------------------------------------------------------------------------------------------
# Inspecting
# --------------------------------------------------------------------------------------------------


def write_split(folder, split, documents, shard_tokens=10**8):
    writer = shards.ShardWriter(folder, split, shard_tokens)
    for document in documents:
        writer.write(np.array([BOS, *document], dtype=np.uint16))
    writer.close()
    return writer.paths


def runs(documents, length):
    return [tuple(d[i : i + length]) for d in documents for i in range(len(d) - length + 1)]


@pytest.mark.parametrize("block_tokens", [1 << 20, 300])
@pytest.mark.parametrize("shard_tokens", [10**8, 70])
def test_overlap_equals_brute_force(tmp_path, monkeypatch, block_tokens, shard_tokens):
    monkeypatch.setattr(overlap, "BLOCK_TOKENS", block_tokens)
    monkeypatch.setattr(overlap, "FILTER_BITS", 12)
    rng = np.random.default_rng(0)
    train = [rng.integers(4, 400, rng.integers(1, 900)).tolist() for _ in range(30)]
    val = [rng.integers(4, 400, rng.integers(1, 300)).tolist() for _ in range(12)]
    val[2] = train[7]  # whole
    val[3][20:20] = train[8][5:75]  # a passage
    val[4] = val[5]
    paths = {
        split: write_split(tmp_path, split, documents, shard_tokens)
        for split, documents in (("train", train), ("val", val))
    }
    index = overlap.ValidationIndex(paths["val"], BOS)
    known, seen, places = set(index.documents.tolist()), set(), set()
    total = 0
    for i in range(len(paths["train"])):
        for block in overlap.shard_documents(paths["train"], i, BOS):
            seen |= known & {overlap.document_hash(d) for d in block.documents()}
            total += len(list(block.documents()))
            for _, hashes in overlap.block_shingles(block, BOS):
                places |= set(index.found(hashes).tolist())
    assert total == len(train)
    assert len(index.documents) == len(val)
    assert [d in seen for d in index.documents.tolist()] == [d in train for d in val]
    in_train = set(runs(train, 50))
    expected = [run in in_train for run in runs(val, 50)]
    assert [place in places for place in index.places.tolist()] == expected
    owners = [i for i, d in enumerate(val) for _ in runs([d], 50)]
    assert index.owners.tolist() == owners
    assert 21 <= sum(expected) < len(expected)


def test_a_sample_of_shingles_is_the_same_on_both_sides(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    val = [rng.integers(4, 400, 900).tolist() for _ in range(5)]
    train = [*val[:2], rng.integers(4, 400, 900).tolist()]
    paths = {s: write_split(tmp_path, s, d) for s, d in (("train", train), ("val", val))}
    whole = overlap.ValidationIndex(paths["val"], BOS)
    monkeypatch.setattr(overlap, "MAX_SHINGLES", 500)
    index = overlap.ValidationIndex(paths["val"], BOS)
    assert 1 < index.sample_shift < 8
    assert set(index.shingles) == set(whole.shingles[index.sampled(whole.shingles)])
    assert 0 < len(index.shingles) < len(whole.shingles) / 2
    found = [
        place
        for block in overlap.shard_documents(paths["train"], 0, BOS)
        for _, hashes in overlap.block_shingles(block, BOS)
        for place in index.found(hashes[index.sampled(hashes)])
    ]
    copied = np.isin(index.places, found)
    assert (copied == (index.owners < 2)).all()


def test_inspect_says_what_is_there_and_what_is_wrong(prepare, tmp_path, capsys):
    texts = make_documents(100)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    assert prepare(path, "--shard-tokens", 3000) == 0
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    inspect = ["--vocab-size", "400", "--workers", "1", str(out)]
    capsys.readouterr()
    assert inspect_data.main(inspect) == 0
    said = capsys.readouterr().out
    for split in manifest["splits"].values():
        for value in (split["documents"], split["tokens"], split["scored_bytes"]):
            assert f"{value:,}" in said
        assert split["fingerprint"] in said
    assert "overlap: 0 of" in said
    # A validation shard is copied among the training shards.
    count = len(find_data_shards(out, "train"))
    shutil.copy(out / "fineweb_val_000000.bin", out / f"fineweb_train_{count:06d}.bin")
    assert inspect_data.main(inspect) == 0
    said, documents = capsys.readouterr().out, manifest["splits"]["val"]["documents"]
    assert f"overlap: {documents} of {documents} validation documents are training" in said
    assert "(100.000%)" in said
    assert inspect_data.main(["--vocab-size", "500", *inspect[2:]]) == 1
    assert "400 pieces" in capsys.readouterr().err
    write_split(tmp_path, "train", [[399, 400]])
    bad = out / "fineweb_train_000001.bin"
    shutil.copy(tmp_path / "fineweb_train_000000.bin", bad)
    assert inspect_data.main(inspect) == 1
    assert "holds token 400" in capsys.readouterr().err
    bad.write_bytes(bad.read_bytes()[:-1])
    (out / "fineweb_train_000000.bin").write_bytes(b"")
    assert inspect_data.main(inspect) == 1
    error = capsys.readouterr().err
    assert "fineweb_train_000000.bin" in error
    assert "fineweb_train_000001.bin" in error


def test_a_shard_that_was_not_closed_is_refused(tmp_path):
    writer = shards.ShardWriter(tmp_path, "val", 100)
    writer.write(np.arange(5, dtype=np.uint16))
    writer.file.flush()
    with pytest.raises(UserError, match="magic"):
        open_data_shard(writer.paths[0])
    writer.write(np.arange(250, dtype=np.uint16))
    writer.close()
    tokens = np.concatenate([open_data_shard(path) for path in writer.paths])
    assert tokens.tolist() == [*range(5), *range(250)]
    assert [len(open_data_shard(path)) for path in writer.paths] == [100, 100, 55]
