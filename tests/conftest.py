"""What the trainer's tests share: tiny data, tiny settings, and processes that act as ranks."""

import contextlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sentencepiece as spm
import torch
import torch.distributed as dist

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
# At these sizes threads cost more than they gain; the variable is for subprocesses.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

SETTINGS = {
    "train_seq_len": 32, "num_layers": 11, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2,
    "mlp_mult": 2.0, "rope_dims": 4, "bigram_vocab_size": 32, "bigram_dim": 8, "ve_dim": 8,
    "train_batch_tokens": 256, "micro_batch_tokens": 128, "iterations": 24,
    "max_wallclock_seconds": None, "eval_stride": 8, "eval_batch_seqs": 16,
    "ttt_chunk_tokens": 256, "ttt_batch_seqs": 4,
}  # fmt: skip
SHALLOW = {"num_layers": 5, "core_start": 1, "core_end": 3, "ve_layers": "3,4"}


# ---------------------------------------------------------------------------- text, tokens, shards


WORDS = ["the", "of", "a", "stone", "river", "bird", "light", "sings", "falls", "under", "over"]
WORDS += ["near", "and", "7", "42", "1999", "café"]
RARE = ["naïve", "河の鳥", "🙂", "žluť", "Ωmega", "œuvre"]  # characters of 2 to 4 bytes


def documents(seed: int, count: int, rare: float) -> list[str]:
    """Sentences of a small made-up language; `rare` is the share of words in RARE."""
    rng = np.random.default_rng(seed)

    def sentence() -> str:
        chosen = [str(rng.choice(RARE if rng.random() < rare else WORDS)) for _ in range(9)]
        return " ".join(chosen) + "."

    return [" ".join(sentence() for _ in range(int(rng.integers(1, 6)))) for _ in range(count)]


def write_shard(path: Path, tokens: np.ndarray) -> Path:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + np.asarray(tokens).astype("<u2").tobytes())
    return path


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and shards made with it; `val_documents` is the text of `val_tokens`."""

    data_path: Path
    tokenizer_path: Path
    tokenizer: spm.SentencePieceProcessor
    val_documents: list[str]
    val_tokens: np.ndarray  # uint16

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size()

    @property
    def settings(self) -> dict[str, str]:
        return {"data_path": str(self.data_path), "tokenizer_path": str(self.tokenizer_path)}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Corpus:
    """Two training shards and two of validation in the field's format.

    The tokenizer has not seen the rare words: the shards spell them in byte-fallback pieces.
    """
    folder = tmp_path_factory.mktemp("corpus")
    spm.SentencePieceTrainer.Train(
        sentence_iterator=iter(documents(0, 400, rare=0.0)), model_prefix=str(folder / "tiny"),
        model_type="bpe", vocab_size=320, byte_fallback=True, split_digits=True,
        character_coverage=0.999, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, minloglevel=2, num_threads=1,
    )  # fmt: skip
    tokenizer = spm.SentencePieceProcessor(model_file=str(folder / "tiny.model"))

    def encode(texts: list[str]) -> np.ndarray:
        return np.array([i for t in texts for i in (1, *tokenizer.Encode(t))], dtype=np.uint16)

    train, val_documents = encode(documents(1, 120, rare=0.03)), documents(2, 7, rare=0.03)
    val = encode(val_documents)
    write_shard(folder / "fineweb_train_000000.bin", train[:3000])
    write_shard(folder / "fineweb_train_000001.bin", train[3000:])
    write_shard(folder / "fineweb_val_000000.bin", val[:500])
    write_shard(folder / "fineweb_val_000001.bin", val[500:])
    return Corpus(folder, folder / "tiny.model", tokenizer, val_documents, val)


# ------------------------------------------------------------------------------- settings, models


@pytest.fixture(scope="session")
def tiny(corpus):
    """tiny(name=value, ...) -> Hyperparameters of a model that computes in milliseconds."""

    def make(**changes) -> train_gpt.Hyperparameters:
        settings = SETTINGS | {"vocab_size": corpus.vocab_size} | corpus.settings
        return train_gpt.Hyperparameters(**(settings | changes))

    return make


@pytest.fixture(scope="session")
def runtime() -> train_gpt.Runtime:
    return train_gpt.Runtime(0, 1, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="session")
def random_model():
    """random_model(hp, seed=0) -> a float32 GPT, every parameter random: no zero hides a term."""

    def make(hp: train_gpt.Hyperparameters, seed: int = 0) -> train_gpt.GPT:
        torch.manual_seed(seed)
        model = train_gpt.GPT(hp)
        with torch.no_grad():
            for name, p in model.named_parameters():
                matrix = name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
                spread = 0.7 * p.size(-1) ** -0.5 if matrix else 0.3
                p.add_(torch.randn_like(p) * spread)
        return model

    return make


class Lines(train_gpt.Log):
    """A log that keeps its events."""

    def __init__(self):
        super().__init__(None)
        self.events = []

    def event(self, name: str = "", /, **pairs) -> None:
        self.events.append((name, pairs))


# -------------------------------------------------------------------------------------- processes


def _become_rank(result, function, rank: int, world_size: int, store: str, args: tuple) -> None:
    """The body of a process: a rank of a gloo group if there is more than one, then `function`."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
    device = torch.device("cpu")
    result.send(function(train_gpt.Runtime(rank, world_size, device, torch.float32), *args))
    if world_size > 1:
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context whose processes start with everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "torch._dynamo"])
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    kept = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    context.Process(target=int).start()  # starts the server
    if kept is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = kept
    return context


@pytest.fixture(scope="session")
def on_ranks(processes, tmp_path_factory):
    """on_ranks(world_size, function, *args) -> what `function(runtime, *args)` returned on each.

    `function` must be at the top of a module; results travel by pickle (no tensors). A rank that
    hangs or dies fails the test.
    """

    def run(world_size: int, function, *args, timeout: float = 60.0) -> list:
        store = tmp_path_factory.mktemp("store") / "file"
        ends, ranks = [], []
        for rank in range(world_size):
            ours, theirs = processes.Pipe(duplex=False)
            job = (theirs, function, rank, world_size, str(store), args)
            ranks.append(processes.Process(target=_become_rank, args=job))
            ranks[-1].start()
            theirs.close()
            ends.append(ours)
        try:
            for rank, end in enumerate(ends):
                assert end.poll(timeout), f"rank {rank} of {world_size} hangs"
            return [end.recv() for end in ends]  # EOFError: that rank died
        finally:
            for process in ranks:
                process.join(5)
                process.kill()

    return run


@contextlib.contextmanager
def time_limit(seconds: int):
    """Fails the test instead of hanging."""

    def late(*_) -> None:
        raise AssertionError(f"still busy after {seconds} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
