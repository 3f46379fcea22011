"""data/prepare_text.py and data/inspect_data.py: any text -> shards, and what is in shards."""

import errno
import gzip
import io
import json
import lzma
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm
import torch
from conftest import write_shard

from data import documents, inspect_data, overlap, pipeline, prepare_text, python_docs, shards
from data.tokenizer import check_token_bytes, rare_characters
from train_gpt import TokenBytes, UserError, find_data_shards, open_data_shard

ROOT = Path(__file__).resolve().parents[1]
BOS = 1
ODD_TEXTS = [
    "  leading, trailing  and   inner    spaces  ",
    "line\nbreaks\nand\ttabs\n\n\n",
    "ｆｕｌｌ－ｗｉｄｔｈ　ＡＢＣ １２３ ﬁne ½ ™",
    "naïve café, Ελληνικά, 日本語のテキスト, עברית, 🎉👩‍👩‍👧 e\u0301 a\u0308\u0301",
    "▁ looks ▁like▁ a space",
    "<s> </s> <unk> <0x41> <pad>",
    "nbsp\u00a0thin\u2009zero\u200bwidth\ufeffbom soft\u00adhyphen \ufffd",
    "x" * 300 + " " + "日" * 200,
    "¨ ´ ˜ start with what decomposes into a space",
    "\u0301 combining first",
    "e\u0001\u0301 is composed only when the control character is gone",
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


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def prepare(tmp_path):
    """Runs data/prepare_text.py in this process."""

    def run(*arguments, output="out", workers=1):
        flags = ["--output", tmp_path / output, "--vocab-size", 400, "--workers", workers]
        return prepare_text.main([str(word) for word in [*arguments, *flags]])

    return run


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers by name: the field's options, and others."""
    folder = tmp_path_factory.mktemp("tokenizers")
    texts = make_documents(200) + ODD_TEXTS * 3 + ["this is one of the texts"] * 200

    def train(name, **changes):
        model = io.BytesIO()
        options = {
            "sentence_iterator": iter(texts), "model_writer": model, "model_type": "bpe",
            "vocab_size": 400, "byte_fallback": True, "split_digits": True,
            "normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False, "pad_id": 0,
            "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2, "character_coverage": 0.98,
            "hard_vocab_limit": False,
        }  # fmt: skip
        spm.SentencePieceTrainer.Train(**options | changes)
        (folder / name).write_bytes(model.getvalue())

    train("field")
    train("lossless", normalization_rule_name="identity", remove_extra_whitespaces=False)
    train("prefix", add_dummy_prefix=True)
    train("unigram", model_type="unigram")
    train("crossing", split_by_whitespace=False)
    train("no-fallback", byte_fallback=False)
    train("no-bos", bos_id=-1)
    return folder


def decoded_documents(folder, split):
    """The documents of a split as their tokenizer, and nothing of ours, decodes them."""
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = np.concatenate([open_data_shard(path) for path in find_data_shards(folder, split)])
    assert tokens[0] == BOS
    starts = np.flatnonzero(tokens == BOS)
    return [tokenizer.Decode(ids[1:].tolist()) for ids in np.split(tokens, starts[1:])]


def all_documents(folder):
    return decoded_documents(folder, "train") + decoded_documents(folder, "val")


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def shards_of(folder):
    return {name: data for name, data in contents(folder).items() if name.endswith(".bin")}


# --------------------------------------------------------------------------------------- preparing


@pytest.mark.parametrize("how", ["nmt_nfkc", "identity", "lossless", "prefix", "unigram"])
def test_shards_hold_every_document_once_and_count_its_bytes(prepare, tmp_path, tokenizers, how):
    texts = [*make_documents(120), *ODD_TEXTS]
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    model = tokenizers / how
    given = ["--tokenizer", model] if model.exists() else ["--normalization", how]
    assert prepare(path, *given, "--shard-tokens", 1000) == 0
    out = tmp_path / "out"
    manifest = manifest_of(out)
    tokenizer = spm.SentencePieceProcessor(model_file=str(out / "tokenizer.model"))
    table = TokenBytes(tokenizer, torch.device("cpu"))
    for split in ("train", "val"):
        documents, said = decoded_documents(out, split), manifest["splits"][split]
        paths = find_data_shards(out, split)
        assert all(len(open_data_shard(path)) == 1000 for path in paths[:-1])
        assert said["documents"] == len(documents)
        assert said["text_bytes"] == sum(len(text.encode()) for text in documents)
        # What is scored: all but a space that opens a document.
        scored = sum(len(text.removeprefix(" ").encode()) for text in documents)
        ids = torch.from_numpy(np.concatenate([open_data_shard(p) for p in paths]).astype(int))
        assert said["scored_bytes"] == scored == int(table.of(ids[:-1], ids[1:]).sum())
    expected = [text.replace("▁", " ") for text in texts]
    if how not in ("identity", "lossless"):
        expected = [tokenizer.Normalize(tokenizer.Normalize(text)) for text in expected]
        expected = [text.replace("▁", " ").strip() for text in expected]
        assert manifest["normalization_changes"]["lost_characters"]["U+2581"] == 3
    assert sorted(all_documents(out)) == sorted(expected)


def test_result_depends_on_the_seed_and_on_no_way_of_working(prepare, tmp_path, monkeypatch):
    texts = make_documents(150)
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    assert prepare(path, output="a") == 0
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 3000)
    assert prepare(path, output="b", workers=3) == 0
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
    splits = manifest_of(tmp_path / "out")["splits"]
    share = splits["val"]["text_bytes"] / sum(map(len, texts + spaced + texts))
    assert abs(3 * share - 0.3) < 0.03
    given = write_jsonl(tmp_path / "val.jsonl", spaced[:10])
    assert prepare(path, "--val-input", given, output="given") == 0
    assert decoded_documents(tmp_path / "given", "val") == [" ".join(t.split()) for t in texts[:10]]
    assert len(decoded_documents(tmp_path / "given", "train")) == 150


def test_every_format_gives_the_same_shards(prepare, tmp_path, tokenizers, monkeypatch):
    texts = make_documents(30)
    plain, lines = "\n\n@@\n".join(texts).encode(), write_jsonl(tmp_path / "a.jsonl", texts)
    half = len(plain) // 2
    inputs = {
        "b.txt": b"\xef\xbb\xbf" + plain,
        "crlf.txt": plain.replace(b"\n", b"\r\n"),
        "c.md.gz": gzip.compress(plain),
        "d.txt.xz": lzma.compress(plain),
        "e.txt.gz": gzip.compress(plain[:half]) + gzip.compress(plain[half:]),  # two members
        os.fsdecode(b"no \xff UTF-8.txt"): plain,
    }
    if documents.zstd:
        inputs["f.txt.zst"] = documents.zstd.compress(plain)
    flags = ["--tokenizer", tokenizers / "field", "--separator", "\\n\\n@@\\n"]
    assert prepare(lines, *flags, output="jsonl") == 0
    for name, data in inputs.items():
        (tmp_path / name).write_bytes(data)
        monkeypatch.setattr(documents, "READ_CHARS", 1009)  # separators lie across reads
        assert prepare(tmp_path / name, *flags, output=f"from-{name}") == 0
        assert shards_of(tmp_path / f"from-{name}") == shards_of(tmp_path / "jsonl")
    flags[-1] = "\r\n\r\n@@\r\n"  # as its author would copy it from a file of Windows
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(plain)))
    assert prepare("-", *flags, output="stdin") == 0
    assert shards_of(tmp_path / "stdin") == shards_of(tmp_path / "jsonl")


def prose(words, count, seed, space=" "):
    """Paragraphs of 30 words, blank lines between them."""
    rng = random.Random(seed)
    return "\n\n".join(space.join(rng.choices(words, k=30)) for _ in range(count))


ALPHABETS = {
    "english": (make_documents(3, line=" ")[0].split(), " "),
    "arabic": ([chr(0x628 + i % 30) * (1 + i % 4) for i in range(90)], " "),
    "chinese": ([chr(0x4E00 + 7 * i) for i in range(2500)], ""),
}


@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_one_file_is_enough(prepare, tmp_path, capsys, alphabet):
    words, space = ALPHABETS[alphabet]
    text = prose(words, 400, 0, space)
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    assert prepare(tmp_path / "book.txt") == 0
    assert "note: 1 document(s) are few" in capsys.readouterr().err
    found, splits = all_documents(tmp_path / "out"), manifest_of(tmp_path / "out")["splits"]
    assert sorted(" ".join(found).split()) == sorted(text.split())  # cut between paragraphs
    held_out = splits["val"]["text_bytes"] / (splits["train"]["text_bytes"] + 1)
    assert 0.04 < held_out < 0.15


def test_little_text_lowers_the_vocabulary_and_a_folder_is_an_input(prepare, tmp_path, capsys):
    notes = tmp_path / "notes"
    (notes / "deep" / ".git").mkdir(parents=True)
    (notes / "a.md").write_text("# One\n\nThe first note.\n")
    (notes / "deep" / "b.py").write_text("def second():\n    return 'note'\n")
    for name in ("picture.png", "deep/.git/c.txt"):
        (notes / name).write_bytes(b"\0\xff")
    assert prepare(notes) == 0
    said = capsys.readouterr()
    assert "lowered from 400 to" in said.err
    pieces = spm.SentencePieceProcessor(model_file=str(tmp_path / "out/tokenizer.model"))
    assert f"tokenizer: {pieces.vocab_size()} pieces" in said.out
    assert manifest_of(tmp_path / "out")["tokenizer"]["pieces"] == pieces.vocab_size() < 400
    assert sorted(all_documents(tmp_path / "out")) == [
        "# One The first note.", "def second(): return 'note'",
    ]  # fmt: skip
    spaceless = [text.replace(" ", "") for text in make_documents(40, line="")]
    assert prepare(write_jsonl(tmp_path / "in.jsonl", spaceless), output="spaceless") == 0
    dump = tmp_path / "dump.txt"
    dump.write_text("<|endoftext|>".join(make_documents(40)))
    assert prepare(dump, output="dump") == 0
    assert len(all_documents(tmp_path / "dump")) == 40


def test_one_document_never_ends_a_corpus(prepare, tmp_path, tokenizers, monkeypatch, capsys):
    """Neither what never settles, nor half of a surrogate pair, nor what decodes otherwise."""
    texts = [*make_documents(40), "half \ud800 a pair", "e\u0001\u0301", "endless", "odd one"]
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    with path.open("a") as file:
        file.write('{"text": "a huge number", "n": ' + 9999 * "7" + "}\n")

    def normalize(self, text, original=pipeline.Normalizer.__call__):
        return None if text == "endless" else original(self, text)

    class Tokenizer(spm.SentencePieceProcessor):
        def Decode(self, ids, **options):
            texts = super().Decode(ids, **options)
            return ["even" if text == "odd one" else text for text in texts]

    def open_odd_tokenizer(path):
        return Tokenizer(model_proto=path.read_bytes())

    monkeypatch.setattr(pipeline.Normalizer, "__call__", normalize)
    monkeypatch.setattr(pipeline, "load_tokenizer", open_odd_tokenizer)
    assert prepare(path, "--tokenizer", tokenizers / "field") == 0
    found = all_documents(tmp_path / "out")
    assert len(found) == 42
    assert {"é", "a huge number"} < set(found)
    left_out = manifest_of(tmp_path / "out")["left_out"]
    assert list(left_out.values()) == [1, 1, 1]
    assert capsys.readouterr().out.count("left out: 1 documents") == 3


def test_a_few_broken_records_are_left_out_and_counted(prepare, tmp_path, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(40))
    lines = path.read_text().splitlines(keepends=True)
    odd = ['{"text": "cut\n', "[1, 2]\n", '{"text": null}\n', '{"body": "a"}\n', "NaN\n"]
    path.write_text("".join([odd[0], *lines, *odd[1:], *odd[:2] * 4]))
    assert prepare(path) == 0
    assert len(all_documents(tmp_path / "out")) == 40
    assert "left out: 13 documents: no JSON with a text in 'text'" in capsys.readouterr().out


def test_a_few_files_that_are_no_text_are_left_out_and_named(prepare, tmp_path, capsys):
    """Of a folder or of several that are named, up to a tenth of the bytes."""
    folder = tmp_path / "notes"
    folder.mkdir()
    for i, text in enumerate(make_documents(40)):
        (folder / f"{i}.md").write_text(text)
    assert prepare(folder, output="whole") == 0
    (folder / "b.txt").write_bytes("caf\xe9".encode("latin-1"))
    (folder / "c.txt").write_bytes(bytes(9))
    (folder / "d.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    assert prepare(folder) == 0
    printed = capsys.readouterr()
    for name in ("b.txt", "c.txt", "d.jsonl"):
        assert f"left out: {folder / name}: " in printed.err
    assert "left out: 3 documents: files, or the rest of them" in printed.out
    assert all_documents(tmp_path / "out") == all_documents(tmp_path / "whole")
    (folder / "e.txt").write_bytes(
        bytes(sum(file.stat().st_size for file in folder.iterdir()) // 9)
    )
    assert prepare(folder, output="third") == 2
    assert "zero byte" in capsys.readouterr().err


BAD_INPUTS = {
    "utf-16": ("a.txt", "text".encode("utf-16"), "iconv -f UTF-16"),
    "utf-16 without its mark": ("a.txt", "text".encode("utf-16-le"), "convert it to UTF-8"),
    "latin-1": ("a.txt", "caf\xe9 au lait".encode("latin-1"), "byte 0xe9 after 'caf'"),
    "latin-1 JSON": ("a.jsonl", '{"text": "caf\xe9"}\n'.encode("latin-1"), "not UTF-8"),
    "binary": ("a.txt", bytes(1000), "zero byte"),
    "empty": ("a.txt", b"", "no text"),
    "white space": ("a.txt", b" \n\n \t", "no text"),
    "one document": ("a.txt", b"all of it", "two or more"),
    "equal documents": ("a.jsonl", b'{"text": "same"}\n' * 9, "1 different"),
    "no JSON": ("a.jsonl", b'{"text": "fine"}\n' * 9 + b'{"text": oh}\n' * 20, "line 10 is not"),
    "many odd lines": ("a.jsonl", b'{"text": "a"}\n' * 3 + b"[]\n" * 4, "4 of 7 lines are so"),
    "deep JSON": ("a.jsonl", b"[" * 200_000 + b"\n", "line 1 is not valid JSON"),
    "no field": ("a.jsonl", b'{"body": "words"}\n', "--text-key; it has body"),
    "no object": ("a.jsonl", b'["text"]\n', "line 1: is no JSON object"),
    "no text": ("a.jsonl", b'{"text": 5}\n', "--text-key"),
    "cut gzip": ("a.txt.gz", gzip.compress(b"words " * 9000)[:-9], ".gz data are broken"),
    "no gzip": ("a.txt.gz", b"plain text", ".gz data are broken"),
    "cut xz": ("a.txt.xz", lzma.compress(b"words " * 9000)[:-30], ".xz data are broken"),
    "unknown kind": ("a.pdf", b"%PDF-1.7", "rename it"),
}
if documents.zstd:
    whole = documents.zstd.compress(b"words " * 9000)
    BAD_INPUTS |= {
        "cut zstd": ("a.txt.zst", whole[:-9], ".zst data are broken"),
        "cut second frame": ("a.txt.zst", whole + whole[:9], ".zst data are broken"),
    }


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_refuses_bad_input_and_leaves_nothing(prepare, tmp_path, capsys, case):
    name, data, message = BAD_INPUTS[case]
    (tmp_path / name).write_bytes(data)
    assert prepare(tmp_path / name) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_text_that_is_all_held_out_is_told_before_a_tokenizer_is_trained(prepare, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one and the same text")
    assert prepare(tmp_path / "a.txt", "--val-input", tmp_path / "a.txt") == 2
    assert "equals a validation document" in capsys.readouterr().err


def test_the_command_that_is_printed_fits_the_text(monkeypatch):
    """A window of the demo's 128 tokens, a shorter one, none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def command(train: int, val: int) -> str:
        splits = {"train": {"tokens": train}, "val": {"tokens": val}}
        return prepare_text.training_command(Path("a b"), splits)

    assert command(256, 129) == "python train_gpt.py --env scripts/demo.env --data-path 'a b'"
    assert "--train-seq-len 64 " in command(256, 128)
    assert "--train-seq-len 64 " in command(255, 900)
    assert command(256, 64).startswith("not possible")


def test_refuses_bad_arguments_and_tokenizers(prepare, tmp_path, tokenizers, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(50))

    def refuses(message, *arguments):
        before = sorted(tmp_path.iterdir())
        assert prepare(*arguments) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == before

    refuses("INPUT")
    refuses("does not exist", tmp_path / "missing.txt")
    refuses("no such file", path, "--tokenizer", tmp_path / "missing.model")
    refuses("no SentencePiece", path, "--tokenizer", path)
    refuses("no byte fallback", path, "--tokenizer", tokenizers / "no-fallback")
    refuses("space inside", path, "--tokenizer", tokenizers / "crossing")
    refuses("no BOS", path, "--tokenizer", tokenizers / "no-bos")
    refuses("--normalization", path, "--tokenizer", tokenizers / "field", "--normalization", "nfkc")
    with pytest.raises(SystemExit):
        prepare(path, "--val-fraction", 2)
    assert "2 is not from 0.0001 to" in capsys.readouterr().err


def test_unknown_characters_are_counted_when_allowed(prepare, tmp_path, tokenizers):
    texts = [*make_documents(50), "one 龘 character", "龘 opens and 龘龘 a run"]
    path = write_jsonl(tmp_path / "in.jsonl", texts)
    flags = ["--tokenizer", tokenizers / "no-fallback", "--allow-unknown", "--val-fraction", 0.5]
    assert prepare(path, *flags) == 0
    splits = manifest_of(tmp_path / "out")["splits"]
    assert sum(split["unknown_tokens"] for split in splits.values()) == 3
    # 4 characters of 3 bytes, and the spaces that follow one: no piece before them, so not scored.
    lost = sum(split["text_bytes"] - split["scored_bytes"] for split in splits.values())
    assert lost == 4 * 3 + 3


def test_characters_that_would_fill_the_vocabulary_are_left_to_bytes():
    counts = np.zeros(0x110000, dtype=np.int64)
    counts[100:400] = np.arange(1000, 700, -1)
    assert rare_characters(counts, 260 + 400) == {}
    assert rare_characters(counts, 260 + 200) == dict.fromkeys(range(250, 400), " ")


# ------------------------------------------------------------------------------ the output's folder


def test_replaces_a_folder_only_when_told(prepare, tmp_path, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(50))
    assert prepare(path) == 0
    made = contents(tmp_path / "out")
    changed = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert prepare(path) == 0  # the same again: nothing to do
    assert changed == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    assert prepare(path, "--seed", 5) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(tmp_path / "out") == made
    assert prepare(path, "--seed", 5, "--overwrite") == 0
    assert contents(tmp_path / "out").keys() == made.keys()
    assert contents(tmp_path / "out") != made
    (tmp_path / "out" / "manifest.json").write_bytes(b"[" * 200_000)
    assert prepare(path, "--seed", 5) == 2
    (tmp_path / "out" / "notes.doc").write_text("mine")
    assert prepare(path, "--seed", 5, "--overwrite") == 2
    assert "notes.doc" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert prepare(path, output="file") == 2
    assert prepare(path, output="file/below") == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_output_is_followed_through_links_and_checked_before_the_work(
    prepare, tmp_path, monkeypatch, capsys
):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(50))
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    link.symlink_to(real)
    assert prepare(path, output="link") == 0
    assert link.is_symlink()
    assert (real / "manifest.json").is_file()
    (tmp_path / "dangling").symlink_to(tmp_path / "unmounted" / "data")

    def no_work(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr(prepare_text.Preparation, "run", no_work)
    assert prepare(path, output="dangling") == 2
    assert "does not exist" in capsys.readouterr().err
    mount, rename = tmp_path / "mount", Path.rename
    mount.mkdir()

    def busy(self, target):
        if self == mount:
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    assert prepare(path, output="mount") == 2
    assert "mount point" in capsys.readouterr().err

    def fills(self, *_):
        (tmp_path / "late" / "mine").mkdir(parents=True)
        return {"splits": {}}

    monkeypatch.setattr(prepare_text.Preparation, "run", fills)
    assert prepare(path, output="late") == 2
    assert "was filled meanwhile" in capsys.readouterr().err
    assert (tmp_path / "late" / "mine").exists()
    assert not list(tmp_path.glob(".*partial*"))


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
        (shards.ShardWriter, "next_shard"), (shards.ShardWriter, "close"), (Path, "rename"),
        (Path, "write_text"), (shutil, "rmtree"),
    ):  # fmt: skip
        setattr(owner, name, stepping(getattr(owner, name)))


def die_preparing(event, signal_number, arguments):
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    signal.signal(signal.SIGTERM, prepare_text.stop)
    die_at(event, signal_number)
    os._exit(prepare_text.main(arguments))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("replacing", [False, True])
def test_interrupted_anywhere_nothing_half_written_is_seen(
    tmp_path, tokenizers, signal_number, replacing
):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(40))
    out, fork = tmp_path / "out", multiprocessing.get_context("fork")
    flags = ["--tokenizer", tokenizers / "field", "--workers", 1, "--shard-tokens", 4000]
    arguments = [str(word) for word in [path, *flags, "--output", out]]
    assert prepare_text.main([*arguments, "--seed", "1"]) == 0
    before = contents(out) if replacing else {}
    arguments += ["--seed", "2", "--overwrite"]
    assert prepare_text.main(arguments) == 0
    wanted, finished = shards_of(out), False
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
    assert finished
    assert event > 8


def test_memory_does_not_grow_with_the_corpus(prepare, tmp_path, monkeypatch, tokenizers):
    monkeypatch.setattr(pipeline, "BATCH_CHARS", 20_000)
    monkeypatch.setattr(documents, "READ_CHARS", 20_000)
    monkeypatch.setattr(shards, "COUNT_TOKENS", 20_000)
    peaks = []
    for size in (100, 100, 1000):  # the first run fills caches
        path = write_jsonl(tmp_path / f"{size}.jsonl", make_documents(size))
        tracemalloc.start()
        assert prepare(path, "--tokenizer", tokenizers / "field", "--overwrite") == 0
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert path.stat().st_size > 300_000
    assert peaks[2] < peaks[1] + 100_000


def test_python_docs_reads_prose_and_runs_nothing(tmp_path, monkeypatch):
    prose = {name: " ".join(make_documents(3, seed=name, line=" ")) for name in "abcdef"}
    modules = {
        "first.py": f'"""{prose["a"]}"""\nraise SystemExit("imported")',
        "pack/second.py": f'class C:\n    """{prose["b"]}"""\n    def f(self): """{prose["a"]}"""',
        "test/third.py": f'"""{prose["c"]}"""',
        "tiny.py": '"""Short."""',
    }
    for name, source in modules.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setattr(python_docs.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(python_docs, "topics", {"x": prose["d"], "y": prose["e"]})
    assert list(python_docs.PythonDocs()) == [prose[name] for name in "deab"]


# -------------------------------------------------------------------------------------- inspecting


def write_split(folder, split, documents, shard_tokens=10**8):
    writer = shards.ShardWriter(folder, split, shard_tokens)
    for document in documents:
        writer.write(np.array([BOS, *document], dtype=np.uint16))
    writer.close()
    return writer.paths


def runs(documents, length=50):
    return [tuple(d[i : i + length]) for d in documents for i in range(len(d) - length + 1)]


@pytest.mark.parametrize("block_tokens", [1 << 20, 300])
@pytest.mark.parametrize("shard_tokens", [10**8, 70])
def test_overlap_equals_brute_force(tmp_path, monkeypatch, block_tokens, shard_tokens):
    monkeypatch.setattr(overlap, "BLOCK_TOKENS", block_tokens)
    rng = np.random.default_rng(0)
    train = [rng.integers(4, 400, rng.integers(1, 900)).tolist() for _ in range(30)]
    val = [rng.integers(4, 400, rng.integers(1, 300)).tolist() for _ in range(12)]
    val[2] = train[7]  # whole
    val[3][20:20] = train[8][5:75]  # a passage
    val[4] = val[5]
    train_paths = write_split(tmp_path, "train", train, shard_tokens)
    index = overlap.ValidationIndex(write_split(tmp_path, "val", val, shard_tokens), BOS)
    for block in overlap.document_blocks(train_paths, BOS):
        index.look_up(block)
    assert index.document_seen.tolist() == [document in train for document in val]
    in_train = set(runs(train))
    expected = [run in in_train for run in runs(val)]
    assert index.shingle_seen[index.places].tolist() == expected
    assert index.owners.tolist() == [i for i, d in enumerate(val) for _ in runs([d])]
    assert 21 <= sum(expected) < len(expected)
    monkeypatch.setattr(overlap, "MAX_SHINGLES", 500)  # a sample, the same on both sides
    sample = overlap.ValidationIndex(find_data_shards(tmp_path, "val"), BOS)
    for block in overlap.document_blocks(train_paths, BOS):
        sample.look_up(block)
    kept = np.isin(index.shingles, sample.shingles)
    assert 0 < kept.sum() < len(kept) / 2
    assert (sample.shingle_seen == index.shingle_seen[kept]).all()


def test_inspect_says_what_is_there_and_what_is_wrong(prepare, tmp_path, tokenizers, capsys):
    path = write_jsonl(tmp_path / "in.jsonl", make_documents(100))
    assert prepare(path, "--shard-tokens", 3000) == 0
    out = tmp_path / "out"
    splits, inspect = manifest_of(out)["splits"], ["--workers", "2", str(out)]
    capsys.readouterr()
    assert inspect_data.main(inspect) == 0
    said = capsys.readouterr().out
    for split in splits.values():
        for value in (split["documents"], split["tokens"], split["scored_bytes"]):
            assert f"{value:,}" in said
        assert split["fingerprint"] in said
    assert "overlap: 0 of" in said
    assert "the split is clean" in said
    # A validation shard is copied among the training shards.
    count = len(find_data_shards(out, "train"))
    shutil.copy(out / "fineweb_val_000000.bin", out / f"fineweb_train_{count:06d}.bin")
    assert inspect_data.main(inspect) == 0
    said, documents = capsys.readouterr().out, splits["val"]["documents"]
    assert f"overlap: {documents} of {documents} validation documents are training" in said
    assert "(100.000%)" in said
    assert "the split is not clean" in said
    assert inspect_data.main(["--tokenizer", str(tokenizers / "field"), *inspect]) == 2
    assert "which" in capsys.readouterr().err
    model = (out / "tokenizer.model").read_bytes()
    (out / "tokenizer.model").write_bytes(model + b"\xc0\x3e\x01")  # reads the same
    assert inspect_data.main(inspect) == 2
    assert "is not the shards'" in capsys.readouterr().err
    (out / "tokenizer.model").write_bytes(model)
    bad = write_shard(out / "fineweb_train_000001.bin", [399, 400])
    assert inspect_data.main(inspect) == 2
    assert "holds token 400" in capsys.readouterr().err
    bad.write_bytes(bad.read_bytes()[:-1])
    (out / "fineweb_train_000000.bin").write_bytes(b"")
    assert inspect_data.main(inspect) == 2
    error = capsys.readouterr().err
    assert "fineweb_train_000000.bin" in error
    assert "fineweb_train_000001.bin" in error


def test_inspects_shards_without_document_starts(tmp_path, tokenizers, capsys):
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", [BOS + 4] * 60)
    model = str(tokenizers / "field")
    assert inspect_data.main([str(tmp_path), "--tokenizer", model]) == 0
    assert "no document starts" in capsys.readouterr().out


def test_bytes_of_the_pieces_are_compared_with_the_decoded_text(corpus):
    table = TokenBytes(corpus.tokenizer, torch.device("cpu"))
    for cut in (1, 2, 100, 333, len(corpus.val_tokens)):
        check_token_bytes(corpus.tokenizer, table, corpus.val_tokens[:cut])
    piece = int(np.bincount(corpus.val_tokens[corpus.val_tokens > 3]).argmax())
    table.length[piece] += 1
    with pytest.raises(UserError, match="bytes"):
        check_token_bytes(corpus.tokenizer, table, corpus.val_tokens)


# ------------------------------------------------------------------------------------ as commands


@pytest.mark.parametrize("name", ["prepare_text", "inspect_data", "download_fineweb"])
def test_without_the_packages_a_sentence_says_what_to_install(name):
    command = [sys.executable, "-S", str(ROOT / "data" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "is not installed: pip install -r requirements.txt" in done.stderr
    assert "Traceback" not in done.stderr


def test_any_terminal_and_a_reader_that_has_enough(prepare, tmp_path, capsys, monkeypatch):
    (tmp_path / "book.txt").write_text(prose(ALPHABETS["chinese"][0], 100, 0, ""), "utf-8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prepare(tmp_path / "book.txt") == 0
    command = f"python train_gpt.py --env scripts/demo.env --data-path {tmp_path / 'out'}"
    assert capsys.readouterr().out.endswith(f"train on it: {command}\n")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}
    inspect = [sys.executable, str(ROOT / "data/inspect_data.py"), str(tmp_path / "out")]
    done = subprocess.run(inspect, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "begins: '??" in done.stdout
    process = subprocess.Popen(
        inspect, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    process.stdout.close()
    assert "rror" not in process.stderr.read()
    assert process.wait() == 1
