"""What the trainer's tests share: tiny data, tiny settings, and processes that act as ranks."""

import contextlib
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
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
torch.compiler.set_stance("force_eager")  # as the trainer itself does on a CPU

SETTINGS = {
    "train_seq_len": 32, "num_layers": 11, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2,
    "mlp_mult": 2.0, "rope_dims": 4, "attention_chunk": 8, "bigram_vocab_size": 32, "bigram_dim": 8,
    "ve_dim": 8,
    "train_batch_tokens": 256, "micro_batch_tokens": 128, "iterations": 24,
    "max_wallclock_seconds": None, "eval_stride": 8, "eval_batch_seqs": 16,
    "ttt_chunk_tokens": 256, "ttt_batch_seqs": 4,
    # All parts of the recurrence, so that each is tested.
    "passes_schedule": "0.0:1,0.626:2,0.813:3", "residual_scale_init": 0.5,
    "feedback_mode": "diagonal",
}  # fmt: skip
SHALLOW = {"num_layers": 5, "core_start": 1, "core_end": 3, "ve_layers": "3,4"}


def plain_attention(q, k, v, chunk=None):
    """The definition of train_gpt.attend, with the whole matrix of weights."""
    k, v = (t.repeat_interleave(q.size(2) // k.size(2), dim=2) for t in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q, k) / math.sqrt(q.size(-1))
    time = torch.arange(q.size(1))
    other = time[:, None] // chunk != time // chunk if chunk else False
    hidden = (time[:, None] < time) | other
    return torch.einsum("bhts,bshe->bthe", scores.masked_fill(hidden, -math.inf).softmax(-1), v)


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
                spread = 0.7 * p.size(-1) ** -0.5 if name in train_gpt.BANKS else 0.3
                p.add_(torch.randn_like(p) * spread)
        return model

    return make


def even_floors(hp: train_gpt.Hyperparameters, index: int) -> dict[str, torch.Tensor]:
    """The floors of `index` where no matrix is known to matter more than another."""
    table = train_gpt.parameter_table(hp)
    squares = {bank: torch.zeros(table[bank].shape[0], 1, 1) for bank in train_gpt.BANKS}
    return train_gpt.step_floors(index, squares)


class Lines(train_gpt.Log):
    """A log that keeps its events."""

    def __init__(self):
        super().__init__(None)
        self.events = []

    def event(self, name: str = "", /, **pairs) -> None:
        self.events.append((name, pairs))

    def of(self, name: str) -> list[dict]:
        return [pairs for event, pairs in self.events if event == name]


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


# -------------------------------------------------------------------------------------- the program


METRICS = (
    "pre_quant_exact", "final_int6_roundtrip_exact", "final_int6_sliding_window_exact",
    "legal_ttt_exact",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A run that ended: its exit code, what it printed, and its folder."""

    code: int
    printed: str
    folder: Path

    def log(self, run_id: str) -> str:
        return (self.folder / f"{run_id}.txt").read_text()

    def metrics(self, run_id: str) -> dict[str, tuple[str, str]]:
        """The texts of val_loss and val_bpb of each evaluation."""
        found = {}
        for line in self.log(run_id).splitlines():
            name, _, rest = line.partition(" ")
            if name in METRICS:
                pairs = dict(word.split(":", 1) for word in rest.split())
                found[name] = (pairs["val_loss"], pairs["val_bpb"])
        return found


def steps(log: str) -> list[dict[str, str]]:
    """The step lines without what is measured in time."""
    lines = [line for line in log.splitlines() if line.startswith("step:")]
    rows = [dict(word.split(":", 1) for word in line.split()) for line in lines]
    return [{k: v for k, v in r.items() if k not in ("train_time", "step_avg")} for r in rows]


def corpus_paths(corpus) -> dict[str, str]:
    return {name.upper(): value for name, value in corpus.settings.items()}


@pytest.fixture(scope="session")
def variables(corpus) -> dict[str, str]:
    """The environment of a tiny run."""
    settings = SETTINGS | SHALLOW | {
        "vocab_size": corpus.vocab_size, "warmup_steps": 4, "train_log_every": 4,
        "weight_average": "ema_swa", "swa_frac": 0.04, "ema_frac": 0.1, "ttt_lr": 0.01,
    }  # fmt: skip
    paths = corpus_paths(corpus)
    return {name.upper(): str(value) for name, value in settings.items()} | paths


def _run_program(env: dict[str, str], argv: list[str], output: str, prepare, args: tuple) -> None:
    """train_gpt.main in a process of its own, printing into the file `output`."""
    with Path(output).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    os.environ.update(env)
    sys.argv = ["train_gpt.py", *argv]
    if prepare is not None:
        prepare(*args)
    code = train_gpt.main()
    with contextlib.suppress(OSError):  # as train_gpt.py ends
        sys.stdout.flush()
    os._exit(code)


@dataclass(frozen=True)
class Job:
    """The program as it runs, on one rank or several."""

    ranks: list
    outputs: list[Path]
    folder: Path
    run_id: str

    def until(self, text: str, timeout: float = 60.0) -> None:
        """Waits for `text` in the log of a job that runs."""
        log, late = self.folder / f"{self.run_id}.txt", time.monotonic() + timeout
        while not (log.exists() and text in log.read_text()):
            assert time.monotonic() < late, f"no {text} in {timeout} s"
            assert all(rank.is_alive() for rank in self.ranks), self.outputs[0].read_text()
            time.sleep(0.002)

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def wait(self, timeout: float = 60.0) -> list[int]:
        """The exit codes; -9 for a process that SIGKILL ended."""
        late = time.monotonic() + timeout
        try:
            for number, rank in enumerate(self.ranks):
                rank.join(max(0.0, late - time.monotonic()))
                assert not rank.is_alive(), f"rank {number} of {len(self.ranks)} hangs"
        finally:
            self.kill()
        return [rank.exitcode for rank in self.ranks]

    def finish(self) -> Finished:
        """What rank 0 has done; all ranks must end with its exit code."""
        codes = self.wait()
        assert len(set(codes)) == 1, codes
        return Finished(codes[0], self.outputs[0].read_text(), self.folder)


@pytest.fixture(scope="session")
def start(processes, variables, tmp_path_factory):
    """start(*flags, ranks=1, NAME=value, ...) -> Job, in processes that have everything imported.

    base: the environment that is changed, a tiny run's if None; prepare: a function at the top of
    a module, and its arguments, to call first in every process.
    """

    def make(
        *argv: str,
        ranks: int = 1,
        folder: Path | None = None,
        base: dict | None = None,
        prepare: tuple = (None,),
        **changes: str,
    ) -> Job:
        folder = folder or tmp_path_factory.mktemp("run") / "logs"
        env = (variables if base is None else base) | {"OUTPUT_DIR": str(folder)} | changes
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        started, outputs = [], []
        for rank in range(ranks):
            outputs.append(tmp_path_factory.mktemp("output") / "printed")
            own = env | {"RANK": str(rank)} if ranks > 1 else env
            job = (own, list(argv), str(outputs[-1]), prepare[0], prepare[1:])
            started.append(processes.Process(target=_run_program, args=job))
            started[-1].start()
        return Job(started, outputs, folder, env.get("RUN_ID", ""))

    return make


@pytest.fixture(scope="session")
def launch(start):
    """launch(*flags, NAME=value, ...) -> Finished: `start`, then waits for the end."""

    def run(*argv: str, **settings) -> Finished:
        return start(*argv, **settings).finish()

    return run
