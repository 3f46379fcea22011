"""Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.

    stem -> core, core, ... -> tail      1 pass, then more as the run proceeds

One run trains for a fixed wall clock, averages the weights, quantizes them to int6 and compresses
them so that code and model fit 16,000,000 bytes. Then it reloads the file and scores the validation
text in bits per byte: plain, with sliding windows, and with score-first test-time training.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s
    python train_gpt.py                                          one process, GPU or CPU
    python train_gpt.py --env scripts/demo.env                   the settings of a file
    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again
    python train_gpt.py --run-id RUN --resume                    go on from RUN's last checkpoint

Every setting is a flag (--residual-scale-init) and an environment variable (RESIDUAL_SCALE_INIT);
a flag wins over a variable, and a variable over --env's file. Exit codes: 0 done, 1 any other
failure, 2 a mistake in what was given, 3 diverged, 4 stopped by a signal with a checkpoint,
5 stopped by a signal but exported and scored.
"""

# Contents (grep -n '^# ---' train_gpt.py):
#   1. Settings      2. Process and log   3. Data      4. Layers         5. Recurrence   6. Model
#   7. Optimization  8. Training         9. Compression  10. Evaluation  11. Kernels     12. Main
#
# Shapes: B batch, T time, D model, H query heads, G kv heads, E head dim, F mlp, V vocabulary,
# L unique layers, K passes, N bank rows, R ranks. PR n: github.com/openai/parameter-golf/pull/n.

from __future__ import annotations

import argparse
import bisect
import difflib
import fcntl
import hashlib
import io
import json
import lzma
import math
import os
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial, wraps
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_type_hints
from urllib.parse import quote

if __name__ == "__main__":
    # OpenMP's threads spin while they wait: beside two busy programs that made a step on a CPU four
    # times as long, with this bound twice (records/NOTES.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports

try:
    import numpy as np
    import sentencepiece as spm
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, library, nn
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as error:
    sys.exit(f"error: {error.name} is not installed: run pip install -r requirements.txt")

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # a torch that is made for CPUs brings none
    triton = None

EXIT_MISTAKE, EXIT_DIVERGED, EXIT_CHECKPOINTED, EXIT_EXPORTED = 2, 3, 4, 5


class UserError(ValueError):
    """A mistake in what the program was given; the text names the value, the rule, the remedy."""


def require(rule_holds: bool, text: str) -> None:
    if not rule_holds:
        raise UserError(text)


def require_all(*rules: tuple[bool, str]) -> None:
    """Raises UserError with every rule that is broken, a line each."""
    mistakes = [text for holds, text in rules if not holds]
    require(not mistakes, "\n".join(mistakes))


# --- 1. Settings: each once, with its type, default and help --------------------------------------


def opt(default: Any, text: str, least: float = 0, group: str = "") -> Any:
    """A setting. least: of a number; group: opens a group of --help."""
    return field(default=default, metadata={"text": text, "least": least, "group": group})


@cache
def read_schedule(text: str) -> tuple[tuple[float, int], ...]:
    """(start, count), ... of a text such as 0.0:1,0.6:2; () if a rule is broken."""
    with suppress(ValueError):
        pairs = [item.split(":") for item in text.split(",")]
        starts, counts = [float(start) for start, _ in pairs], [int(n) for _, n in pairs]
        if starts[0] == 0 and starts == sorted({*starts}) and starts[-1] < 1 <= min(counts):
            return tuple(zip(starts, counts, strict=True))
    return ()


@dataclass(frozen=True)
class Hyperparameters:
    """The configuration of a run. Fractions (`_frac`) are of the run's progress from 0 to 1."""

    run_id: str | None = opt(None, "name of log and artifact; none: time and seed", group="run")
    seed: int = opt(1337, "seed of the weights and of the data order")
    output_dir: str = opt("logs", "folder of the log, the artifact and the checkpoints")
    iterations: int | None = opt(None, "steps after which training ends; none: no limit")
    max_wallclock_seconds: float | None = opt(600.0, "seconds of training; none: no limit", 1e-3)
    warmup_steps: int = opt(20, "steps before the clock starts, undone before it does")
    train_log_every: int = opt(50, "steps between lines of the log", 1)
    val_loss_every: int | None = opt(None, "steps between validations; none: at the end", 1)
    checkpoint_seconds: float | None = opt(None, "seconds between checkpoints; none: off", 1e-3)
    resume: bool = opt(False, "go on from run_id's newest checkpoint, or score what it exported")
    on_signal: Literal["export", "checkpoint"] = opt("export", "at SIGTERM, SIGINT or SIGHUP")
    dtype: Literal["auto", "bfloat16", "float32"] = opt("auto", "auto: bfloat16 where it is native")
    compile: Literal["auto", "on", "off"] = opt("auto", "torch.compile; auto: on a GPU only")

    data_path: str = opt("data/datasets/fineweb10B_sp1024", "folder of the shards", group="data")
    tokenizer_path: str | None = opt(None, "none: data_path's tokenizer.model, or FineWeb's")
    train_batch_tokens: int = opt(786_432, "tokens of a step; not set: 98,304 a process", 1)
    micro_batch_tokens: int = opt(98_304, "most tokens that a rank takes at once", 1)
    seq_len_schedule: str = opt("0.0:8,0.3:4,0.6:1", "start:parts that windows are cut into, ...")

    tokenizer_sha256: str | None = opt(None, "hash it must have; none: its own", group="model")
    vocab_size: int | None = opt(None, "pieces; none: the tokenizer's", 8)
    train_seq_len: int = opt(4096, "tokens of a window, in training and evaluation", 8)
    num_layers: int = opt(11, "unique layers", 1)
    model_dim: int = opt(512, "width of the residual stream", 1)
    num_heads: int = opt(4, "query heads; heads of 128 dims are faster than of 64", 1)
    num_kv_heads: int = opt(2, "key and value heads", 1)
    mlp_mult: float = opt(3.0, "MLP width over model width")
    rope_dims: int = opt(32, "dims of each head that RoPE turns")
    qk_gain_init: float = opt(1.5, "start of the gain of each query head", -math.inf)
    attention_chunk: int | None = opt(512, "tokens that even layers but the last attend within", 1)
    xsa_last_n: int = opt(4, "last layers with XSA (never the core's)")
    bigram_vocab_size: int = opt(512, "rows of BigramHash; 0: off")
    bigram_dim: int = opt(32, "width of BigramHash's rows", 1)
    ve_dim: int = opt(128, "width of the value embedding table", 1)
    ve_layers: str = opt("9,10", "layers with value embeddings; none: off")
    logit_softcap: float = opt(30.0, "bound of the logits", 1e-3)
    tied_embed_init_std: float = opt(0.005, "std of the embedding at the start")

    core_start: int = opt(4, "first layer of the core", group="recurrence")
    core_end: int = opt(7, "layer after the core's last", 1)
    passes_schedule: str = opt("0.0:1,0.6:2,0.85:3", "start:passes, ...; starts are fractions")
    num_passes: int | None = opt(None, "fixed passes in training; none: the schedule's", 1)
    eval_passes: int | None = opt(None, "passes in evaluation; none: as training ended", 1)
    residual_scale_init: float = opt(1.0, "start of each later pass's scale", -math.inf)
    feedback_mode: Literal["none", "diagonal"] = opt("none", "diagonal: c = d * U(V'h)")
    feedback_rank: int = opt(2, "columns of U and V", 1)
    jacobian_proxy_weight: float = opt(0.01, "weight of the proxy in the loss")

    matrix_lr: float = opt(0.025, "Muon's learning rate", group="optimization")
    tied_embed_lr: float = opt(0.035, "AdamW's learning rate of the tables")
    scalar_lr: float = opt(0.025, "AdamW's learning rate of all else")
    muon_momentum: float = opt(0.99, "Muon's momentum")
    muon_momentum_warmup_start: float = opt(0.92, "Muon's first momentum")
    muon_momentum_warmup_frac: float = opt(0.237, "rise of momentum (1,500 of 6,330 steps)", 1e-9)
    muon_momentum_frac: float = opt(0.0158, "most that it averages (100 of 6,330 steps)", 1e-9)
    muon_wd: float = opt(0.2, "cautious weight decay of the banks, times lr scale squared")
    adam_wd: float = opt(0.04, "decoupled weight decay of tables and projections")
    beta1: float = opt(0.9, "AdamW's first decay")
    beta2: float = opt(0.95, "AdamW's second decay")
    grad_clip_norm: float = opt(0.3, "bound of the global gradient's norm")
    warmdown_frac: float = opt(0.55, "last fraction, in which the lr falls to 0", 1e-9)

    weight_average: Literal["none", "ema", "swa", "ema_swa"] = opt("ema", "of weights", group="end")
    ema_frac: float = opt(0.0526, "EMA's horizon (decay 0.997 in 6,330 steps)", 1e-9)
    swa_frac: float = opt(0.0079, "fraction between SWA's samples (50 of 6,330 steps)")
    swa_lr_scale: float = opt(0.2, "SWA starts below this lr scale")
    late_qat_threshold: float = opt(0.15, "the core's QAT starts below this lr scale; 0: never")

    evaluate: str | None = opt(None, "score this artifact, do not train", group="evaluation")
    artifact_limit_bytes: int = opt(16_000_000, "most bytes of code and model together", 1)
    eval_wallclock_seconds: float | None = opt(600.0, "TTT skips training to end within this")
    eval_stride: int = opt(64, "tokens that a sliding window scores", 1)
    eval_batch_seqs: int = opt(32, "windows that a rank scores at once", 1)
    sliding_eval: bool = opt(True, "score with sliding windows")
    ttt_enabled: bool = opt(True, "score with score-first test-time training")
    ttt_lr: float = opt(0.02, "SGD's learning rate for the first chunk")
    ttt_epochs: int = opt(3, "epochs over each chunk once it is scored")
    ttt_chunk_tokens: int = opt(32_768, "tokens of a chunk", 1)
    ttt_batch_seqs: int = opt(32, "most sequences of an SGD step, all ranks together", 1)
    token_losses: str | None = opt(None, "write the last evaluation's losses here (.npy, nats)")

    def __post_init__(self) -> None:
        """Raises UserError with every rule that is broken."""
        ranges = []
        for f in fields(self):
            value, least = getattr(self, f.name), f.metadata["least"]
            fits = not isinstance(value, int | float) or least <= value < math.inf
            ranges.append((fits, f"{f.name}={value} must be a finite number of at least {least}"))
        require_all(*ranges)
        T, L, E, most = self.train_seq_len, self.num_layers, self.head_dim, self.max_passes
        D, H, G, batch = self.model_dim, self.num_heads, self.num_kv_heads, self.train_batch_tokens
        start, end, ve = self.core_start, self.core_end, self.ve_layer_ids
        differ = len(set(ve)) == len(ve) and all(0 <= i < L for i in ve)
        cuts = read_schedule(self.seq_len_schedule)
        cut = f"seq_len_schedule={self.seq_len_schedule}"
        divide = f"parts divide train_seq_len={T} (0.0:1 cuts nothing)"
        endless = self.iterations is None and self.max_wallclock_seconds is None
        whole = max(1, batch // T) * T
        rule, run = "starts rise from 0 and are below 1", self.run_id or "x"
        require_all(
            (not endless, "iterations, max_wallclock_seconds: set one, or training never ends"),
            (Path(run).name == run and len(run) <= 200, "run_id: a name, no folders, up to 200"),
            (self.seed < 1 << 63, f"seed={self.seed} must be below {1 << 63}"),
            (bool(self.run_id) or not self.resume, "resume: name the run that goes on, --run-id"),
            (batch % T == 0, f"train_batch_tokens={batch}: no whole windows, use {whole}"),
            (self.micro_batch_tokens >= T, f"micro_batch_tokens: must hold a window of {T} tokens"),
            (T <= 1 << 20, f"train_seq_len={T} must be at most {1 << 20}"),
            ((self.vocab_size or 0) <= 65_536, "vocab_size: token ids are 16 bits wide"),
            (start < end <= L, f"core_start={start}, core_end={end}: no part of the {L} layers"),
            (self.mlp_dim >= 1, f"mlp_mult={self.mlp_mult} leaves no MLP: raise it"),
            (D % H == H % G == 0, f"model_dim={D}, num_heads={H}, num_kv_heads={G} must divide"),
            (self.rope_dims % 2 == 0 and self.rope_dims <= E, f"rope_dims: even and up to {E}"),
            (self.bigram_vocab_size != 1, "bigram_vocab_size: use 0 (off) or at least 2"),
            (self.eval_stride <= T, f"eval_stride: would skip tokens, use at most {T}"),
            (differ, f"ve_layers={self.ve_layers}: use different layers of 0..{L - 1}, or none"),
            (max(self.beta1, self.beta2) < 1, "beta1, beta2: must be below 1"),
            (1 <= most <= 64, f"passes_schedule={self.passes_schedule}: {rule}, passes are 1..64"),
            (bool(cuts) and all(T % n == 0 for _, n in cuts), f"{cut}: {rule}, {divide}"),
            ((self.eval_passes or 1) <= 64, "eval_passes: at most 64"),
            (self.eval_passes in (None, 1) or most > 1, "eval_passes: this model has no repeats"),
        )

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def batch_seqs(self) -> int:
        return self.train_batch_tokens // self.train_seq_len

    @property
    def ve_layer_ids(self) -> tuple[int, ...]:
        """The layers with value embeddings; -1 for a word that is no number."""
        words = [] if self.ve_layers in ("", "none") else self.ve_layers.split(",")
        return tuple(int(w) if w.strip().isdecimal() else -1 for w in words)

    def chunk_of(self, layer: int) -> int | None:
        """The tokens that a layer's attention stays within; None: it sees the whole past."""
        return None if layer % 2 or layer == self.num_layers - 1 else self.attention_chunk

    @property
    def schedule(self) -> tuple[tuple[float, int], ...]:
        """(start, passes), ... of the recurrence; () if passes_schedule is wrong."""
        return ((0.0, self.num_passes),) if self.num_passes else read_schedule(self.passes_schedule)

    @property
    def max_passes(self) -> int:
        return max((passes for _, passes in self.schedule), default=0)

    def architecture(self) -> dict[str, Any]:
        """The groups `model` and `recurrence`: without them an artifact means nothing."""
        names = [f.name for f in fields(self)]
        kept = names[names.index("tokenizer_sha256") : names.index("matrix_lr")]
        return {name: getattr(self, name) for name in kept}


def parse_value(kind: Any, text: str) -> Any:
    """The text of a flag or variable as the annotated type. Raises ValueError or KeyError."""
    text = text.rstrip("\r\n")  # a variable may end as a Windows editor ends lines
    options, word = get_args(kind), text.strip().lower()
    if kind is bool:
        return {"0": False, "false": False, "1": True, "true": True}[word]
    if type(None) in options:
        return None if word in ("", "none") else options[0](text)
    return options[options.index(text)] if options else kind(text)


def build_parser() -> argparse.ArgumentParser:
    """Every flag takes text, so that all mistakes are found and told together."""
    title, _, rest = (__doc__ or "").partition("\n\n")
    usage = "train_gpt.py [--SETTING VALUE ...]"
    parser = argparse.ArgumentParser("train_gpt.py", usage, title, rest, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--env", metavar="FILE", help="a file of lines NAME=VALUE")
    group = parser
    for f in fields(Hyperparameters):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        kind = {"metavar": str(f.type).replace("Literal", "one of ")}
        if f.type == "bool":
            kind = {"action": argparse.BooleanOptionalAction}
        flag = "--" + f.name.replace("_", "-")
        text = f"{f.metadata['text']} [{f.name.upper()}={f.default}]"
        group.add_argument(flag, default=argparse.SUPPRESS, help=text, **kind)
    return parser


def read_env_file(path: str) -> dict[str, str]:
    """The settings of a file of lines NAME=VALUE; `#` opens a comment line. Raises UserError."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is no UTF-8"
        raise UserError(f"env={path} cannot be read ({why}): name a text file") from None
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    foreign = [line[:40] for line in lines if "=" not in line]
    require(not foreign, f"env={path} has a line that is no NAME=VALUE: {foreign[:1]}")
    pairs = [line.split("=", 1) for line in lines]
    # As a shell reads them: `export` and quotes around a value mean nothing.
    names = [name.strip().removeprefix("export ").strip().lower() for name, _ in pairs]
    settings = dict(zip(names, (value.strip(" \t\"'") for _, value in pairs), strict=True))
    unknown = settings.keys() - {f.name for f in fields(Hyperparameters)}
    require(not unknown, f"env={path} has no settings {', '.join(unknown)}: see --help")
    return settings


def read_configuration(
    env: Mapping[str, str], argv: Sequence[str]
) -> tuple[Hyperparameters, dict[str, str]]:
    """Settings, and the source of each. Raises UserError with every mistake at once."""
    parsed, unknown = build_parser().parse_known_args(argv)
    flags, file = parsed.__dict__, parsed.env
    del flags["env"]
    kinds, rules, errors = get_type_hints(Hyperparameters), Hyperparameters.__annotations__, []
    flags_only = [word for word in unknown if word.startswith("-")]
    for word in flags_only or unknown:  # a word after a flag is its value
        near = difflib.get_close_matches(word, ["--" + n.replace("_", "-") for n in kinds], 1)
        errors.append(f"unknown argument {word}: did you mean {near[0] if near else '--help'}?")
    variables = {name: env[name.upper()] for name in kinds if name.upper() in env}
    given = {"file": read_env_file(file) if file else {}, "env": variables, "flag": flags}
    values, sources = {}, dict.fromkeys(kinds, "default")
    for source, texts in given.items():  # a later source wins
        for name, text in texts.items():
            try:
                values[name] = parse_value(kinds[name], str(text))
                sources[name] = source
            except (ValueError, KeyError):
                rule = rules[name].replace("Literal", "one of ").replace(" | None", " or none")
                errors.append(f"{name}={text} ({source}) is no {rule}")
    if "train_batch_tokens" not in values:
        T = max(1, values.get("train_seq_len", Hyperparameters.train_seq_len))
        tokens = 98_304 * int(env.get("WORLD_SIZE", 1))  # the recipe's 786,432 on 8 GPUs
        values["train_batch_tokens"] = max(1, tokens // T) * T
    try:
        hp = Hyperparameters(**values)
    except UserError as error:
        errors.append(str(error))
    require(not errors, "\n".join(errors))
    return hp, sources


# --- 2. Process and log: what it computes on, what it writes, what stops it -----------------------

# A rank waits this long for another: rank 0's export takes seconds, one that hangs never ends.
COLLECTIVE_TIMEOUT = timedelta(seconds=300)


class Runtime(NamedTuple):
    """One process of the job. Collectives do nothing when it is alone."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    compiles: bool = False

    @classmethod
    def start(cls, hp: Hyperparameters) -> Runtime:
        """Joins the process group that torchrun describes; alone without torchrun."""
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device, backend, dtype = torch.device("cpu"), "gloo", torch.float32
        if torch.cuda.is_available():
            local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            require(local < gpus, f"nproc_per_node: only {gpus} GPUs are visible, start as many")
            device, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(device)
            if torch.cuda.get_device_capability() >= (8, 0):  # older ones emulate bfloat16
                dtype = torch.bfloat16
        if world_size > 1:
            dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        compiles = hp.compile == "on" or (hp.compile == "auto" and device.type == "cuda")
        torch.compiler.set_stance("default" if compiles else "force_eager")
        dtype = dtype if hp.dtype == "auto" else getattr(torch, hp.dtype)
        return cls(rank, world_size, device, dtype, compiles)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def sum_(self, x: Tensor) -> Tensor:
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        """Returns once every rank's device has done all that it was given before."""
        self.sum_(torch.zeros(1, device=self.device)).item()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def share(self, count: int) -> slice:
        """This rank's contiguous part of `count` things; parts differ by at most one."""
        return slice(*(rank * count // self.world_size for rank in (self.rank, self.rank + 1)))


def log_text(value: Any) -> str:
    """A value as the log's grammar allows: no white space, sequences joined by commas."""
    if isinstance(value, tuple | list):
        return ",".join(map(log_text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    safe = "!\"#$&'()*+,-./:;<=>?@[]^_`{|}~"
    # A path's bytes that are no UTF-8 are Python's lone surrogates; they are written as the bytes.
    return quote(str(value), safe=safe, errors="surrogateescape") or "none"


class Log:
    """Writes lines `event key:value key:value` to the screen and to a file; silent without one."""

    def __init__(self, path: Path | None, resume: bool = False) -> None:
        """Raises UserError."""
        self.path, self.file, self.since = path, None, time.perf_counter()
        self.has_results = path is not None and path.exists()  # else a run that fails removes it
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("a" if resume else "x", encoding="utf-8")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"run_id: another process writes {path}: wait for its end") from None
        except OSError as error:
            text = f"output_dir: cannot write {path} ({error.strerror}): choose another folder"
            raise UserError(text) from None
        self.file.write("\n" if self.file.tell() else "")  # a killed run's last line may be cut

    def event(self, name: str = "", /, **pairs: Any) -> None:
        """One line; `name` is empty for the lines of single steps, as in the field."""
        line = " ".join(filter(None, [name, *(f"{k}:{log_text(v)}" for k, v in pairs.items())]))
        shown = line.replace("%20", " ") if "text" in pairs else line  # the file keeps the grammar
        shown = "\r\033[K" + shown if sys.stdout.isatty() else shown
        for output, words in ((sys.stdout, shown), (self.file, line)) if self.file else ():
            with suppress(OSError):  # a full disk must not end a run that is worth its GPUs
                print(words, file=output, flush=True)

    def progress(self, text: str) -> None:
        """Shows how far the work is in the last line of a terminal; nothing elsewhere."""
        if self.file and sys.stdout.isatty():
            print(f"\r{text}\033[K", end="", flush=True)

    def phase(self, name: str) -> None:
        """Logs the seconds since the last phase ended."""
        now = time.perf_counter()
        self.event("phase", name=name, seconds=f"{now - self.since:.3f}")
        self.since = now

    def abandon(self, error: BaseException) -> None:
        """Logs why the run ends; a run without results leaves no file, so that its id is free."""
        self.event("failed", text=(str(error) or repr(error)).splitlines()[0])
        if self.file and not self.has_results:
            self.path.unlink(missing_ok=True)


class Interrupts:
    """SIGTERM, SIGINT and SIGHUP end the program at once, with `farewell`. While `advice` says what
    the program finishes first, the first of them is only noted, and answered with the advice."""

    def __init__(self) -> None:
        self.noted, self.advice, self.farewell = 0, "", ""

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup's choice stays
                signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if self.noted or not self.advice:
            raise SystemExit(f"stopped by {name}{self.farewell}")
        self.noted = number
        # Not print: the signal may have come within a print to the same file.
        os.write(2, f"\n{name}: {self.advice}\n".encode())


# --- 3. Data: shards on disk -> the same global batches for every world size ----------------------

# The shards of modded-nanogpt: 256 little-endian int32 header words, then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_WORDS = 20240520, 1, 256
DATA_REMEDY = "run data/download_fineweb.py or data/prepare_text.py, or set DATA_PATH"


def open_data_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map of uint16. Raises UserError."""
    size, start = path.stat().st_size, 4 * SHARD_HEADER_WORDS
    head = np.fromfile(path, dtype="<i4", count=3).tolist()
    right = [SHARD_MAGIC, SHARD_VERSION, (size - start) // 2]
    text = f"data shard {path} of {size} bytes begins with {head} instead of {right}"
    whole = size > start and size % 2 == 0 and head == right
    require(whole, f"{text}: download or prepare it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=start, shape=(head[2],))


def find_data_shards(data_path: Path, split: str) -> list[Path]:
    """The shards of split `train` or `val`, in order. Raises UserError if there are none."""
    paths = sorted(data_path.glob(f"fineweb_{split}_*.bin"))
    require(bool(paths), f"data_path={data_path} holds no fineweb_{split}_*.bin: {DATA_REMEDY}")
    return paths


def data_fingerprint(paths: Sequence[Path]) -> str:
    """A hash of every shard's name, length and tokens at its ends and between: 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        tokens = open_data_shard(path)
        digest.update(f"{path.name}:{len(tokens)}:".encode())
        between = tokens[:: 1 + len(tokens) // 4096]
        digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes() + between.tobytes())
    return digest.hexdigest()[:16]


def find_tokenizer(hp: Hyperparameters) -> Path:
    """The tokenizer that is named, or that lies in the data's folder, or the downloaded one."""
    beside = Path(hp.data_path) / "tokenizer.model"
    default = beside if beside.exists() else "data/tokenizers/fineweb_1024_bpe.model"
    return Path(hp.tokenizer_path or default)


def load_tokenizer(path: Path) -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises UserError."""
    tokenizer, name = spm.SentencePieceProcessor(), f"tokenizer_path={path}"
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        raise UserError(f"{name} is no SentencePiece model: set TOKENIZER_PATH") from None
    has_space = not tokenizer.IsUnknown(tokenizer.PieceToId("▁"))
    require(has_space, f"{name} has no piece for the space, so that bytes would be miscounted")
    return tokenizer


def check_tokenizer(hp: Hyperparameters, path: Path) -> str:
    """The tokenizer's sha256. Raises UserError if the model or the shards were made with another.

    The shards' is in the manifest that data/prepare_text.py writes beside them, or lies there."""
    digest, folder = hashlib.sha256(path.read_bytes()).hexdigest(), Path(hp.data_path)
    manifest, beside = folder / "manifest.json", folder / "tokenizer.model"
    shards = hashlib.sha256(beside.read_bytes()).hexdigest() if beside.is_file() else None
    try:
        shards = json.loads(manifest.read_bytes())["tokenizer"]["sha256"]
    except (FileNotFoundError, KeyError, TypeError):
        pass  # no manifest, or of another kind
    except (OSError, ValueError, RecursionError):
        raise UserError(f"data_path: {manifest} is damaged: prepare the data again") from None
    for owner, right in (("model's", hp.tokenizer_sha256), ("shards'", shards)):
        remedy = "prepare the data with that one, and name it"
        text = f"tokenizer_path={path} is not the {owner}, whose sha256 is {right}: {remedy}"
        require(right in (None, digest), text)
    return digest


class TokenBytes:
    """The bytes of text that each target token stands for: what val_bpb divides by.

    A byte-fallback piece is 1 byte; another one its UTF-8 length without a leading `▁`, which is
    1 byte unless a boundary token (control, unknown or unused) is before it; those are 0 bytes."""

    def __init__(self, tokenizer: spm.SentencePieceProcessor, device: torch.device) -> None:
        rows = []
        for i in range(tokenizer.vocab_size()):
            piece = tokenizer.IdToPiece(i)
            inner = not (tokenizer.IsControl(i) or tokenizer.IsUnknown(i) or tokenizer.IsUnused(i))
            length = 1 if tokenizer.IsByte(i) else len(piece.removeprefix("▁").encode())
            rows.append([length * inner, piece.startswith("▁") * inner, inner])
        table = torch.tensor(rows, dtype=torch.int32, device=device)
        self.length, self.space, self.inner = table.T.contiguous().unbind()

    def of(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes of each `target` that follows `previous` (any equal shapes), int32."""
        return self.length[target] + self.space[target] * self.inner[previous]


class BatchLoader:
    """Windows of T+1 tokens in a random order that depends on the shards, T and the seed alone.

    The order of an epoch is a permutation of the windows of all shards, which each epoch cuts at
    another phase. A step takes the next `batch_seqs` windows and a rank its share of them, so any
    number of ranks trains on the same batches, and no window repeats before all were used."""

    def __init__(self, shards: Sequence[np.ndarray], hp: Hyperparameters, runtime: Runtime) -> None:
        self.shards, self.hp, self.runtime = shards, hp, runtime
        T, self.share = hp.train_seq_len, runtime.share(hp.batch_seqs)
        self.shape = (self.share.stop - self.share.start, T + 1)
        windows = [max(0, len(tokens) // T - 1) for tokens in shards]  # one to spare for the phase
        self.first_window = np.cumsum([0, *windows])
        self.epoch_windows, self.epoch = int(self.first_window[-1]), -1
        text = f"data_path: no training shard holds two windows of train_seq_len={T} tokens"
        require(self.epoch_windows > 0, f"{text}: prepare more text or lower train_seq_len")

    def window(self, index: int) -> np.ndarray:
        """The T+1 tokens of the window at `index` of the endless global order."""
        T, (epoch, place) = self.hp.train_seq_len, divmod(index, self.epoch_windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.hp.seed, epoch])
            self.epoch, self.phase = epoch, int(rng.integers(T))
            self.order = rng.permutation(self.epoch_windows)
        number = self.order[place]
        shard = np.searchsorted(self.first_window, number, side="right") - 1
        start = int(self.phase + (number - self.first_window[shard]) * T)
        return self.shards[shard][start : start + T + 1]

    def batch(self, step: int) -> Tensor:
        """This rank's windows of `step`, (B, T+1) int32, copied to the device asynchronously."""
        batch = torch.empty(self.shape, dtype=torch.int32, pin_memory=self.runtime.on_gpu)
        for row, i in zip(batch.numpy(), range(self.share.start, self.share.stop), strict=True):
            row[:] = self.window(step * self.hp.batch_seqs + i)
        return batch.to(self.runtime.device, non_blocking=True)


class Data(NamedTuple):
    """What a run reads, checked."""

    loader: BatchLoader | None  # None where nothing is trained
    val_tokens: np.ndarray  # uint16
    token_bytes: TokenBytes
    facts: list[dict[str, Any]]  # of each split, for the log


def open_data(hp: Hyperparameters, runtime: Runtime) -> tuple[Hyperparameters, Data]:
    """Opens and checks all data; the settings get what the data tell. Raises UserError."""
    path, largest, facts, loader, val_tokens = find_tokenizer(hp), 0, [], None, None
    tokenizer, folder, T = load_tokenizer(path), Path(hp.data_path), hp.train_seq_len
    digest, pieces = check_tokenizer(hp, path), tokenizer.vocab_size()
    text = f"tokenizer_path={path} has {pieces} pieces"
    right = hp.vocab_size in (None, pieces)
    require(right, f"{text}, not vocab_size={hp.vocab_size}: use one of that size")
    hp = replace(hp, vocab_size=pieces, tokenizer_path=str(path), tokenizer_sha256=digest)
    for split in ("val",) if hp.evaluate else ("train", "val"):
        paths = find_data_shards(folder, split)
        shards = [open_data_shard(path) for path in paths]
        counts = {"shards": len(shards), "tokens": sum(map(len, shards))}
        facts.append({"split": split, **counts, "fingerprint": data_fingerprint(paths)})
        mine = shards[runtime.rank % len(shards) :: runtime.world_size]  # ranks share the reading
        largest = max(largest, *(int(shard.max()) for shard in mine))
        if split == "train":
            loader = BatchLoader(shards, hp, runtime)
        else:
            val_tokens = np.concatenate(shards)
    text = f"{text}, the shards' largest token is {largest}: use the shards' tokenizer"
    seen = torch.tensor([largest >= pieces, largest >= pieces / 2]).int()
    too_large, in_upper_half = runtime.sum_(seen).tolist()
    require(not too_large and in_upper_half > 0, text)
    text = f"data_path: {len(val_tokens)} validation tokens are not more than a window of {T}"
    require(len(val_tokens) > T, f"{text}: prepare more text or lower train_seq_len")
    return hp, Data(loader, val_tokens, TokenBytes(tokenizer, runtime.device), facts)


# --- 4. Layers: pure functions of tensors ---------------------------------------------------------

RMS_EPS = 1e-6
# cuDNN first: 2.2 ms forward and backward of 48x2048 tokens on an H100, FlashAttention 2 3.6 ms.
ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
ATTENTION += [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Rope = tuple[Tensor, Tensor, int]  # cos and signed sin (T, E), rope_dims / 2
Scaled = tuple[Tensor, Tensor]  # what is added to a stream, and the weight that it is added with


def compiled(function: Callable) -> Callable:
    """Compiles `function` as one graph, unless the process is set to run eagerly.

    The compilation is made at the first call and shared by all models of the process."""
    graph = cache(partial(torch.compile, function, dynamic=False, fullgraph=True))
    return wraps(function)(lambda *args, **kwargs: graph()(*args, **kwargs))


def any_size(x: Tensor) -> Tensor:
    """x, for which one compiled graph is to serve all sizes of its first dim."""
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return x


class Layer(NamedTuple):
    """The weights of one unique layer in the compute dtype, all scales folded into the matrices:
    a scale of the (B, T, D) output would cost passes over memory, 2% of a step on an H100."""

    qkv: Tensor  # (D + 2 G*E, D), times 1/sqrt(i+1)
    out: Tensor  # (D, D), times attn_scale
    mlp_up: Tensor  # (F, D), times 1/sqrt(i+1)
    mlp_down: Tensor  # (D, F), times mlp_scale
    resid_mix: Tensor  # (2, D)
    q_gain: Tensor  # (H,)
    xsa: bool
    chunk: int | None  # tokens that attention stays within


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rotary_table(hp: Hyperparameters) -> tuple[Tensor, Tensor]:
    """cos and signed sin (T, E) of partial RoPE (Su et al. 2021; PR 315), base 10,000, NTK-scaled
    beyond 1,024 tokens; sin is negated in the first half of the dims that turn."""
    length, dims = hp.train_seq_len, hp.rope_dims
    stretch = max(1.0, length / 1024) ** (dims / max(1, dims - 2))
    frequency = (10_000 * stretch) ** -(torch.arange(0, dims, 2).float() / max(1, dims))
    angles = torch.outer(torch.arange(length).float(), frequency)
    still = torch.zeros(length, hp.head_dim - dims)
    unsigned, signed = (torch.cat([sign * angles, angles, still], 1) for sign in (1, -1))
    return unsigned.cos(), signed.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, half: int) -> Tensor:
    """Turns the first 2*half dims of each head of x (B, T, H, E), i with i+half, by its position.

    By exchanged halves times a signed sine, so that norm, turn and gain compile to one kernel."""
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    cos, sin = (t[:, None].to(x.dtype) for t in (cos, sin))
    return x * cos + torch.cat([b, a, rest], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, chunk: int | None = None) -> Tensor:
    """softmax(q k' / sqrt(E)) v of the past: q (B, T, H, E), k and v (B, T, G, E) -> q's shape.

    chunk: only of the past within the same chunk of so many tokens (Liu et al. 2018, arXiv
    1801.10198)."""
    T = q.size(1)
    if chunk and chunk < T:
        if T % chunk:
            q, k, v = (F.pad(t, (0, 0, 0, 0, 0, -T % chunk)) for t in (q, k, v))
        parts = (t.unflatten(1, (-1, chunk)).flatten(0, 1) for t in (q, k, v))
        return attend(*parts).reshape(q.shape)[:, :T]
    if q.device.type == "cpu":  # its kernel is faster with copied heads than with grouped ones
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, E)
    grouped = q.size(1) != k.size(1)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA (Zhai 2026, arXiv 2603.09078; PR 287): removes from each head's output y (B, T, H, E) its
    part along its own v (B, T, G, E)."""
    y = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H/G, E)
    v = F.normalize(v, dim=-1).unsqueeze(3)
    return (y - (y * v).sum(-1, keepdim=True) * v).flatten(2, 3)


def attention(x: Tensor, layer: Layer, value: Scaled | None, rope: Rope) -> Tensor:
    """Causal grouped-query attention (Ainslie et al. 2023), (B, T, D) -> (B, T, D)."""
    x = F.linear(x, layer.qkv).unflatten(-1, (-1, layer.out.size(0) // layer.q_gain.numel()))
    q, k, v = Heads.apply(x, layer.q_gain, *rope)  # normed heads, turned by RoPE, q times its gain
    if value is not None:
        v = v + value[1] * value[0].view_as(v)
    y = attend(q, k, v, layer.chunk)  # (B, T, H, E)
    y = exclude_self(y, v) if layer.xsa else y
    return F.linear(y.flatten(2), layer.out)


def mlp(x: Tensor, layer: Layer) -> Tensor:
    """leaky_relu(x up', 0.5)^2 down', (B, T, D) -> (B, T, D)."""
    if fuses_mlp(x.device, x.dtype, layer.mlp_up.shape):
        return FusedMLP.apply(x.flatten(0, 1), layer.mlp_up, layer.mlp_down).view_as(x)
    return F.linear(F.leaky_relu(F.linear(x, layer.mlp_up), 0.5).square(), layer.mlp_down)


def block(
    x: Tensor, layer: Layer, value: Scaled | None, skip: Scaled | None, x0: Tensor, rope: Rope
) -> Tensor:
    """One layer of the stream x (B, T, D) that started from x0; skip: a stem output to add."""
    if skip is not None:
        x = x + skip[1] * skip[0]
    x = layer.resid_mix[0] * x + layer.resid_mix[1] * x0
    x = x + attention(rms_norm(x), layer, value, rope)
    return x + mlp(rms_norm(x), layer)


# Training compiles a stack of layers as one, for kernels join across layers. Scoring compiles each
# kind of layer once instead: fewer graphs.
compiled_block = compiled(block)


@compiled
def stack(x: Tensor, rows: list, x0: Tensor, rope: Rope, keep: int) -> list[Tensor]:
    """The last `keep` outputs of layers in turn; one that nothing reads would cost a gradient."""
    outputs = []
    for row in rows:
        x = block(x, *row, x0, rope)
        outputs.append(x)
    return outputs[-keep:]


def run_layers(x: Tensor, rows: list, x0: Tensor, rope: Rope, keep: int = 1) -> list[Tensor]:
    """x, then the outputs of layers in turn: in training the last `keep` of them, else all.

    rows: (layer, value, skip) of each layer."""
    if torch.is_grad_enabled():
        for t in (x, x0, *(pair[0] for row in rows for pair in row[1:] if pair)):
            any_size(t)
        return [x, *stack(x, rows, x0, rope, keep)]
    outputs = [x.view_as(x)]  # were it x0 itself, that would be a graph of its own
    for row in rows:
        outputs.append(compiled_block(outputs[-1], *row, x0, rope))
    return [x, *outputs[1:]]


def bigram_rows(ids: Tensor, num_rows: int) -> Tensor:
    """BigramHash (PR 162): the row of each position of ids (B, T); the last row is position 0's."""
    rows = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (num_rows - 1)
    return F.pad(rows, (1, 0), value=num_rows - 1)


@compiled
def embed(
    ids: Tensor, table: Tensor, bigram: tuple[Tensor, ...], gate: Tensor, dtype: torch.dtype
) -> Tensor:
    """ids (B, T) int32 -> x0 (B, T, D): token and bigram embeddings, normed, then smeared: each
    position takes a part of the one before it (modded-nanogpt; PR 162)."""
    x = F.embedding(ids, table.to(dtype))
    if bigram:
        rows, projection, scale = (t.to(dtype) for t in bigram)
        pairs = F.embedding(bigram_rows(ids, len(rows)), rows)
        x = x + scale * F.linear(pairs, projection)
    x, g = rms_norm(x), gate.sigmoid().to(dtype)
    return (1 - g) * x + g * F.pad(x, (0, 0, 1, 0))[:, :-1]


def next_token_logits(x: Tensor, table: Tensor, softcap: float) -> Tensor:
    """The tied head, bounded by a softcap (Gemma 2): x (..., D) -> (..., V) float32."""
    logits = F.linear(rms_norm(x), table.to(x.dtype)).float()
    return softcap * torch.tanh(logits / softcap)


@compiled
def token_losses(x: Tensor, targets: Tensor, table: Tensor, softcap: float) -> Tensor:
    """Cross-entropy in nats of each target: x (B*T, D), targets (B*T,) -> (B*T,) float32."""
    logits = next_token_logits(x, table, softcap)
    return F.cross_entropy(logits, targets.long(), reduction="none")


# --- 5. Recurrence: the core applied K times, and what keeps that stable --------------------------


class Stability(NamedTuple):
    """How the passes behaved on one batch; norms are of each sequence, over (T, D), in float32."""

    jacobian_proxy: Tensor  # (B,), the only one with a gradient
    growth: Tensor  # (K,) mean over B of |h_{k+1}| / |h_k|
    update: Tensor  # (K,) mean over B of |h_{k+1} - h_k| / |h_k|
    feedback: Tensor  # (K,) mean over B of |c_k| / |h_k|


@compiled
def error_feedback(h: Tensor, U: Tensor, V: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """c = d * (U V'h) and h + c, of h (B, T, D), U and V (D, rank), d (D,)."""
    c = d.to(h.dtype) * ((h @ V.to(h.dtype)) @ U.to(h.dtype).T)
    return c, h + c


@compiled
def advance(h: Tensor, z: Tensor, core_z: Tensor, scale: Tensor) -> Tensor:
    """h_{k+1} = h_k + a_k (core(z_k) - z_k)."""
    return h + scale.to(h.dtype) * (core_z - z)


@compiled
def measure(h: Tensor, h_next: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """A pass's term of the proxy (B,), and its mean growth, update and feedback (3,)."""
    # vector_norm's gradient at 0 is 0, where a square root's is infinite.
    norm = partial(torch.linalg.vector_norm, dim=(1, 2), dtype=torch.float32)
    size = norm(h) + 1e-6
    update = norm(h_next - h) / size
    feedback = torch.zeros_like(size) if c is None else norm(c) / size
    ratios = torch.stack([norm(h_next) / size, update, feedback])
    return F.relu(update - 1).square(), ratios.mean(1).detach()


def recurrence(
    h: Tensor, core: Callable, num_passes: int, scales: Tensor, feedback: tuple[Tensor, ...]
) -> tuple[Tensor, Stability]:
    """h_{k+1} = h_k + a_k F(h_k + c_k),  F(z) = core(z) - z,  c_k = d * (U V'h_k)  (PR 1230).

    h_0 (B, T, D) -> h_K. Pass 0 is the plain core: a_0 = 1, c_0 = 0. Each layer of the core mixes
    x0 in again in each pass. scales: a_1, a_2, ..., the last one for all passes beyond; feedback:
    U, V and d, or empty for c = 0. J = sum_k relu(|h_{k+1} - h_k| / |h_k| - 1)^2, the proxy for a
    bound on a pass's Jacobian, is 0 unless a pass moves the state by more than the state's norm.
    It is taken of each sequence, so that it does not depend on how ranks cut the batch."""
    c, h_next = None, core(h)
    measures = [measure(h, h_next, c)]
    for k in range(1, num_passes):
        h = z = h_next
        if feedback:
            c, z = error_feedback(h, *feedback)
        h_next = advance(h, z, core(z), scales[min(k, len(scales)) - 1])
        measures.append(measure(h, h_next, c))
    terms, ratios = zip(*measures, strict=True)
    return h_next, Stability(torch.stack(terms).sum(0), *torch.stack(ratios).unbind(1))


# --- 6. Model: a table of parameters, stem -> core x passes -> tail, tied head --------------------


class Parameter(NamedTuple):
    shape: tuple[int, ...]
    group: str  # `bank` (Muon; named in BANKS), or AdamW's `table`, `projection` or `scalar`
    start: Callable[[Tensor], Any]  # sets the values at the start, in place


def orthogonal(bank: Tensor) -> None:
    for matrix in bank:
        nn.init.orthogonal_(matrix)


def parameter_table(hp: Hyperparameters) -> dict[str, Parameter]:
    """Every parameter of a GPT: what is allocated, started, optimized and stored.

    Orthogonal inputs and zero outputs: attention and MLP add nothing at the start."""
    L, D, width, V, rank = hp.num_layers, hp.model_dim, hp.mlp_dim, hp.vocab_size, hp.bigram_dim
    kv_dim, later = hp.num_kv_heads * hp.head_dim, hp.max_passes - 1
    skips, ve_layers = min(hp.core_start, L - hp.core_end), len(hp.ve_layer_ids)
    zero, one = nn.init.zeros_, nn.init.ones_
    normal, constant = partial(partial, nn.init.normal_), partial(partial, nn.init.constant_)
    table = {
        # Queries, then outputs; keys, then values.
        "qo_bank": Parameter((2 * L, D, D), "bank", lambda w: orthogonal(w.zero_()[:L])),
        "kv_bank": Parameter((2 * L, kv_dim, D), "bank", orthogonal),
        "mlp_up_bank": Parameter((L, width, D), "bank", orthogonal),
        "mlp_down_bank": Parameter((L, D, width), "bank", zero),
        "tok_emb": Parameter((V, D), "table", normal(std=hp.tied_embed_init_std)),
        "smear_gate": Parameter((D,), "scalar", zero),
        "resid_mix": Parameter((L, 2, D), "scalar", lambda w: w.zero_()[:, 0].fill_(1)),
        "attn_scale": Parameter((L, D), "scalar", one),
        "mlp_scale": Parameter((L, D), "scalar", one),
        "q_gain": Parameter((L, hp.num_heads), "scalar", constant(val=hp.qk_gain_init)),
        "skip_weight": Parameter((skips, D), "scalar", one),
    }
    # Of factors that start at zero there is exactly one in each product: what it adds is 0 at the
    # start, and yet it learns. (With two, all gradients would be zero for ever.)
    if hp.bigram_vocab_size:
        table["bigram_table"] = Parameter((hp.bigram_vocab_size, rank), "table", zero)
        table["bigram_proj"] = Parameter((D, rank), "projection", normal(std=rank**-0.5))
        table["bigram_scale"] = Parameter((), "scalar", constant(val=0.05))
    if ve_layers:
        table["ve_table"] = Parameter((V, hp.ve_dim), "table", normal(std=0.01))
        table["ve_proj"] = Parameter((kv_dim, hp.ve_dim), "projection", zero)
        table["ve_scale"] = Parameter((), "scalar", constant(val=0.1))
        table["ve_layer_scale"] = Parameter((ve_layers,), "scalar", one)
    table["residual_scale"] = Parameter((later,), "scalar", constant(val=hp.residual_scale_init))
    if later and hp.feedback_mode != "none":
        table["feedback_U"] = Parameter((D, hp.feedback_rank), "scalar", zero)
        table["feedback_V"] = Parameter((D, hp.feedback_rank), "scalar", normal(std=D**-0.5))
        table["feedback_d"] = Parameter((D,), "scalar", one)
    return table


class GPT(nn.Module):
    """The model. Parameters are float32; `dtype` is what it computes in."""

    @torch.no_grad()
    def __init__(self, hp: Hyperparameters, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hp, self.dtype = hp, dtype
        for name, row in parameter_table(hp).items():
            self.register_parameter(name, nn.Parameter(torch.empty(row.shape)))
            row.start(self.get_parameter(name))
        depth = torch.arange(1, hp.num_layers + 1).float().rsqrt()  # deeper layers read less of x
        for name, buffer in zip(("cos", "sin", "depth"), (*rotary_table(hp), depth), strict=True):
            self.register_buffer(name, buffer, persistent=False)

    def parameters_of(self, part: str) -> tuple[Tensor, ...]:
        """Those whose names begin so, in the table's order; none where the part is turned off."""
        return tuple(p for name, p in self.named_parameters() if name.startswith(part))

    def layers(self, floors: Mapping[str, Tensor] | None) -> list[Layer]:
        """The weights of each unique layer; with `floors`, the core's are fake-quantized."""
        hp, L = self.hp, self.hp.num_layers
        core = [hp.core_start, hp.core_end - hp.core_start, L - hp.core_end]

        def by_layer(bank: str) -> Tensor:  # (N, rows, cols) -> (N/L, L, rows, cols)
            w = self.get_parameter(bank).unflatten(0, (-1, L))
            if floors is None:
                return w
            before, scope, after = w.split(core, dim=1)
            floor = floors[bank].unflatten(0, (-1, L)).split(core, dim=1)[1].flatten()
            floor = floor.repeat_interleave(scope.size(2))[:, None]  # of each row
            stored = fake_quantize(any_size(scope.flatten(0, 2)), any_size(floor))
            return torch.cat([before, stored.view_as(scope), after], dim=1)

        (q, out), (k, v) = by_layer("qo_bank"), by_layer("kv_bank")
        [up], [down] = by_layer("mlp_up_bank"), by_layer("mlp_down_bank")
        depth = self.depth[:, None, None]
        qkv, out = depth * torch.cat([q, k, v], dim=1), self.attn_scale[..., None] * out
        up, down = depth * up, self.mlp_scale[..., None] * down
        # unbind, not indexing: its backward is one stack, not a full-size zero for every layer.
        parts = (qkv, out, up, down, self.resid_mix, self.q_gain)  # of a Layer, in its order
        rows = [t.to(self.dtype).unbind() for t in parts]
        xsa = [i >= L - hp.xsa_last_n and not hp.core_start <= i < hp.core_end for i in range(L)]
        chunks = map(hp.chunk_of, range(L))
        return [Layer(*row) for row in zip(*rows, xsa, chunks, strict=True)]

    def value_embeddings(self, ids: Tensor) -> list[Scaled | None]:
        """For each layer its value embeddings (modded-nanogpt) (B, T, G*E) and scale, or None."""
        values: list[Scaled | None] = [None] * self.hp.num_layers
        if self.hp.ve_layer_ids:
            value = F.embedding(ids, self.ve_table.to(self.dtype)) @ self.ve_proj.to(self.dtype).T
            scales = (self.ve_scale * self.ve_layer_scale).to(self.dtype).unbind()
            for i, scale in zip(self.hp.ve_layer_ids, scales, strict=True):
                values[i] = (value, scale)
        return values

    def hidden(
        self, ids: Tensor, num_passes: int, floors: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Stability]:
        """ids (B, T) int32 -> the tail's output (B, T, D), and the stability of the passes."""
        hp, T = self.hp, ids.size(1)
        rope = (self.cos[:T], self.sin[:T], hp.rope_dims // 2)
        bigram, feedback = self.parameters_of("bigram_"), self.parameters_of("feedback_")
        x0 = embed(any_size(ids), self.tok_emb, bigram, self.smear_gate, self.dtype)
        layers, values = self.layers(floors), self.value_embeddings(ids)

        def run(x: Tensor, start: int, end: int, skips: Sequence = (), keep: int = 1) -> list:
            part = slice(start, end)
            rows = zip_longest(layers[part], values[part], skips)
            return run_layers(x, [*rows], x0, rope, keep)

        stem = run(x0, 0, hp.core_start, keep=hp.core_start)
        core = lambda z: run(z, hp.core_start, hp.core_end)[-1]  # noqa: E731
        h, stability = recurrence(stem[-1], core, num_passes, self.residual_scale, feedback)
        # The tail's first layer gets the stem's last output (U-Net skips, Ronneberger et al. 2015).
        skips = zip(stem[:0:-1], self.skip_weight.to(self.dtype).unbind(), strict=False)
        return run(h, hp.core_end, hp.num_layers, [*skips])[-1], stability

    def logits(self, ids: Tensor, num_passes: int) -> Tensor:
        """ids (B, T) int32 -> the logits of each next token (B, T, V) float32."""
        x, _ = self.hidden(ids, num_passes)
        return next_token_logits(x, self.tok_emb, self.hp.logit_softcap)

    def forward(
        self, ids: Tensor, targets: Tensor, num_passes: int,
        floors: Mapping[str, Tensor] | None = None, score_last: int | None = None,
    ) -> tuple[Tensor, Stability]:  # fmt: skip
        """ids, targets (B, T) int32 -> the losses in nats (B, T) float32, and the stability.

        floors: of each bank's matrices (N, 1, 1), for QAT. score_last: score only so many last
        positions -> (B, score_last)."""
        x, stability = self.hidden(ids, num_passes, floors)
        if score_last:
            x, targets = x[:, -score_last:], targets[:, -score_last:]
        scored = any_size(x.flatten(0, 1)), any_size(targets.flatten())
        losses = token_losses(*scored, self.tok_emb, self.hp.logit_softcap)
        return losses.view_as(targets), stability


# --- 7. Optimization: flat parameters, Parallel Muon and AdamW, weight averages -------------------

BANKS = ("mlp_up_bank", "mlp_down_bank", "qo_bank", "kv_bank")  # Muon's, the largest first
ADAM_GROUPS = ("table", "projection", "scalar")
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # till 2.12
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class FlatParameters:
    """All parameters as views of one float32 buffer, their gradients as views of another.

    Muon's banks come first, each padded to `world_size` equal shards, then AdamW's groups.
    Collectives work in place, and clipping, averaging, snapshots and SGD are one kernel each."""

    ALIGNMENT = 64  # elements; kernels want every parameter to start at a multiple of 16 bytes

    def __init__(self, model: GPT, world_size: int = 1) -> None:
        named, table = dict(model.named_parameters()), parameter_table(model.hp)
        self.shapes = {name: p.shape for name, p in named.items()}
        self.places: dict[str, slice] = {}  # of each parameter
        self.spans: dict[str, slice] = {}  # of each bank with its padding, and of each AdamW group
        members = {bank: [bank] for bank in BANKS}
        members |= {g: [n for n in named if table[n].group == g] for g in ADAM_GROUPS}
        size = 0
        for group, names in members.items():
            start = size
            for name in names:
                self.places[name] = slice(size, size + named[name].numel())
                unit = self.ALIGNMENT
                if group in BANKS:
                    unit = world_size * math.lcm(named[name][0].numel(), self.ALIGNMENT)
                size += math.ceil(named[name].numel() / unit) * unit
            self.spans[group] = slice(start, size)
        assert set(self.places) == set(named), "every parameter is optimized exactly once"
        self.banks_end = self.spans["table"].start
        self.data, self.grad = torch.zeros(2, size, device=model.tok_emb.device).unbind()
        for name, p in named.items():
            p.data = self.data[self.places[name]].view(p.shape).copy_(p.data)
            p.grad = self.grad[self.places[name]].view(p.shape)

    def shard(self, flat: Tensor, bank: str, runtime: Runtime) -> Tensor:
        """This rank's rows (N/R, rows, cols) of a bank inside `flat`."""
        rows = flat[self.spans[bank]].view(-1, *self.shapes[bank][1:])
        return rows.chunk(runtime.world_size)[runtime.rank]

    def gather(self, flat: Tensor, bank: str, runtime: Runtime) -> Any:
        """Starts to fill a bank of `flat` with every rank's rows of it."""
        rows = self.shard(flat, bank, runtime).view(-1)
        return all_gather(flat[self.spans[bank]], rows, async_op=True)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter's tensor that lies inside `flat`, in the model's order."""
        inside = {n: place for n, place in self.places.items() if place.stop <= len(flat)}
        return {n: flat[inside[n]].view(shape) for n, shape in self.shapes.items() if n in inside}

    def whole(self, span: slice) -> nn.Parameter:
        """A part of the buffer, with its gradient, as one parameter for an optimizer."""
        parameter = nn.Parameter(self.data[span])
        parameter.grad = self.grad[span]
        return parameter


def newton_schulz(g: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """About U V' of g = U S V' (n, rows, cols): x <- a x + (b A + c A^2) x with A = x x'.

    Muon's quintic coefficients (Jordan et al. 2024): their slope at 0 is as steep as it can be
    while singular values stay within about [0.7, 1.2]. Speed matters here, exactness not."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """Parallel Muon on the banks, AdamW on the rest; call `reduce` after backward, then `step`.

    Muon: Jordan et al. 2024. A bank's rows are matrices. Rank r of R updates the r-th of R equal
    parts of each bank, zero-padded, and that part of its momentum alone (PR 549). One step:
        reduce-scatter all banks, all-reduce the rest      -> summed gradients, their global norm
        for each bank: momentum, Newton-Schulz, update     -> all-gather while the next one works
        AdamW                                              -> while the last all-gathers fly"""

    def __init__(self, flat: FlatParameters, hp: Hyperparameters, runtime: Runtime) -> None:
        self.flat, self.hp, self.runtime = flat, hp, runtime
        self.momentum = torch.zeros_like(flat.data[: flat.banks_end])
        self.bank_grads = {bank: flat.shard(flat.grad, bank, runtime) for bank in BANKS}
        self.rest = flat.grad[flat.banks_end :]
        rates = [(hp.tied_embed_lr, hp.adam_wd), (hp.scalar_lr, hp.adam_wd), (hp.scalar_lr, 0.0)]
        groups = [
            {"params": [flat.whole(flat.spans[name])], "base_lr": lr, "weight_decay": decay}
            for name, (lr, decay) in zip(ADAM_GROUPS, rates, strict=True)
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=(hp.beta1, hp.beta2), fused=True)

    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks; returns their global norm, a scalar tensor.

        A rank's loss is divided by the whole batch's tokens, so the sum is the mean's gradient."""
        flat, runtime = self.flat, self.runtime
        if runtime.world_size > 1:
            works = [dist.all_reduce(self.rest, async_op=True)]
            for bank in BANKS:
                shard = torch.empty_like(flat.shard(self.momentum, bank, runtime))
                self.bank_grads[bank], source = shard, flat.grad[flat.spans[bank]]
                works.append(reduce_scatter(shard.view(-1), source, async_op=True))
            for work in works:
                work.wait()
        squares = torch.stack([g.square().sum() for g in self.bank_grads.values()]).sum()
        return (runtime.sum_(squares) + self.rest.square().sum()).sqrt()

    def matrix_squares(self) -> dict[str, Tensor]:
        """The mean squared gradient of each of a bank's matrices (N, 1, 1), once reduced."""
        found, rank, world_size = {}, self.runtime.rank, self.runtime.world_size
        for bank, grads in self.bank_grads.items():
            squares = grads.new_zeros(world_size, len(grads))
            squares[rank] = grads.square().mean((1, 2))
            squares = self.runtime.sum_(squares).flatten()
            found[bank] = squares[: self.flat.shapes[bank][0], None, None]
        return found

    @torch.no_grad()
    def step(self, norm: Tensor, lr_scale: float, momentum: float) -> None:
        """One update from the reduced gradients, clipped by their global norm."""
        works = []
        clip = (self.hp.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        for bank in BANKS:
            self.update_bank(bank, self.bank_grads[bank] * clip, lr_scale, momentum)
            if self.runtime.world_size > 1:
                works.append(self.flat.gather(self.flat.data, bank, self.runtime))
        self.rest.mul_(clip)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for work in works:
            work.wait()

    def update_bank(self, bank: str, grad: Tensor, lr_scale: float, momentum: float) -> None:
        """Muon with Nesterov momentum on this rank's rows of a bank.

        MuonEq-R (arXiv 2603.28254) levels the rows of the gradient first. Cautious weight decay
        (arXiv 2510.12402) leaves a weight alone that the update makes larger."""
        rows = self.flat.shard(self.flat.data, bank, self.runtime)  # (n, rows, cols)
        buffer = self.flat.shard(self.momentum, bank, self.runtime).mul_(momentum).add_(grad)
        grad = F.normalize(grad.add_(buffer, alpha=momentum), dim=-1, eps=1e-7)
        dtype = torch.bfloat16 if rows.is_cuda else torch.float32
        update = newton_schulz(grad, dtype)
        shape_scale = math.sqrt(max(1.0, rows.size(-2) / rows.size(-1)))
        lr = self.hp.matrix_lr * lr_scale
        rows.sub_(rows * (update * rows > 0), alpha=lr * lr_scale * self.hp.muon_wd)
        rows.add_(update, alpha=-lr * shape_scale)


class WeightAverage:
    """EMA and SWA in the time of the run's progress, so that a run of any length averages alike."""

    def __init__(self, hp: Hyperparameters, weights: Tensor) -> None:
        self.hp, self.weights = hp, weights
        self.ema = weights.clone() if "ema" in hp.weight_average else None
        self.swa = torch.zeros_like(weights) if "swa" in hp.weight_average else None
        self.samples, self.last_progress, self.last_sample = 0, 0.0, -1.0

    def update(self, progress: float, swa: bool) -> None:
        """After a step that began at `progress`; swa: whether SWA has begun."""
        passed, self.last_progress = progress - self.last_progress, progress
        if self.ema is not None:
            # A share of what has passed, so that the mean has no part of the weights at the start.
            new, all_ = (math.expm1(-span / self.hp.ema_frac) for span in (passed, progress))
            self.ema.lerp_(self.weights, new / all_ if progress else 1.0)
        if self.swa is not None and swa and progress - self.last_sample >= self.hp.swa_frac:
            self.samples, self.last_sample = self.samples + 1, progress
            self.swa.lerp_(self.weights if self.ema is None else self.ema, 1 / self.samples)

    def result(self) -> Tensor:
        """The weights to export; where both are on, SWA averaged EMA's."""
        if self.samples:
            return self.swa
        return self.weights if self.ema is None else self.ema


# --- 8. Training: the plan of a step, warm-up, then the clock and the loop, checkpoints -----------


class StepPlan(NamedTuple):
    """What a step does; a function of its number and of the run's progress alone."""

    num_passes: int
    cuts: int  # sequences that each window is cut into
    qat: bool
    swa: bool
    lr_scale: float
    momentum: float


def plan_step(hp: Hyperparameters, step: int, progress: float) -> StepPlan:
    """progress: from 0 to 1, the larger of step / iterations and elapsed / wall-clock cap."""
    passes = [n for start, n in hp.schedule if start <= progress][-1]
    cuts = [n for start, n in read_schedule(hp.seq_len_schedule) if start <= progress][-1]
    lr_scale = min(1.0, max(0.0, 1 - progress) / hp.warmdown_frac)
    warm = min(1.0, progress / hp.muon_momentum_warmup_frac)
    momentum = (1 - warm) * hp.muon_momentum_warmup_start + warm * hp.muon_momentum
    # A momentum of m averages 1 / (1 - m) steps, at most muon_momentum_frac of the run's steps, of
    # which there are step / progress at its pace. A bound below 0.85 hurts (records/NOTES.md).
    bound = 1 - progress / max(1, step) / hp.muon_momentum_frac
    momentum = min(momentum, max(0.85, bound))
    qat, swa = lr_scale < hp.late_qat_threshold, lr_scale < hp.swa_lr_scale
    return StepPlan(passes, cuts, qat, swa, lr_scale, momentum)


def step_kinds(hp: Hyperparameters) -> list[tuple[int, int, bool]]:
    """The (passes, cuts, QAT) of the run's steps, in their order: each needs graphs of its own.

    A phase of less than 1/10,000 of the run is not worth them, and may be missed."""
    plans = [plan_step(hp, 0, i / 10_000) for i in range(10_000)]
    return list(dict.fromkeys((plan.num_passes, plan.cuts, plan.qat) for plan in plans))


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class BatchLimit:
    """How many sequences are computed at once: halved where the GPU's memory does not hold them."""

    def __init__(self, sequences: int, log: Log) -> None:
        self.sequences, self.log = sequences, log

    def run(self, work: Callable[[int], Any]) -> Any:
        """work(sequences), which begins anew when it ran out of memory. Raises UserError."""
        while True:
            try:
                return work(self.sequences)
            except torch.OutOfMemoryError:
                require(self.sequences > 1, "not one sequence fits the GPU: lower train_seq_len")
            self.sequences //= 2
            torch.cuda.empty_cache()
            self.log.event("out_of_memory", sequences_at_once=self.sequences)


def near_equal_parts(rows: Tensor, most: int) -> list[Tensor]:
    """Cuts rows (B, ...) into the fewest near-equal parts of at most so many rows."""
    return list(rows.tensor_split(math.ceil(len(rows) / most))) if len(rows) else []


class Clock:
    """The run's progress and stops: what rank 0's clock and any rank's signals decide, all follow.

    A GPU is one step behind the host. Training stops before a step that would end after the cap,
    were it as slow as the slowest of the last ones."""

    def __init__(self, trainer: Trainer) -> None:
        self.hp, self.runtime, self.stop = trainer.hp, trainer.runtime, trainer.stop
        self.cap = self.hp.max_wallclock_seconds or math.inf
        self.progress, self.interrupted = trainer.average.last_progress, False
        self.recent = [0.0]  # seconds of the last steps
        self.runtime.barrier()
        self.last = self.last_checkpoint = time.perf_counter()
        self.started = self.last - trainer.elapsed

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def read(self, step: int) -> tuple[float, bool, bool]:
        """As `step` begins: the run's progress, whether it ends, whether a checkpoint is due."""
        now, total = time.perf_counter(), self.hp.iterations
        self.recent = [*self.recent[-15:], now - self.last]
        self.last = now
        begin = now - self.started + self.recent[-1] * self.runtime.on_gpu
        over = begin >= self.cap or begin + max(self.recent) > self.cap
        every = self.hp.checkpoint_seconds or math.inf
        in_time = self.cap - begin >= min(every, self.cap / 10)  # near the end it is not worth it
        due = in_time and now - self.last_checkpoint >= every
        told = [float(x) * self.runtime.is_main for x in (begin / self.cap, over, due)]
        told = torch.tensor([*told, self.stop.noted], dtype=torch.float64)
        by_time, over, due, signals = self.runtime.sum_(told).tolist()
        self.last_checkpoint = now if due else self.last_checkpoint
        self.interrupted = signals > 0
        by_steps = 0.0 if total is None else step / max(1, total)
        self.progress = max(self.progress, min(by_time, 1.0), by_steps)  # it never goes back
        ends = over > 0 or self.interrupted or step == total
        return self.progress, ends, due > 0

    def forecast(self, passes: int) -> str:
        left = min(self.cap, self.elapsed() / max(self.progress, 1e-9)) - self.elapsed()
        return f"{passes} passes, {1000 * self.recent[-1]:.0f} ms a step, {left:.0f} s left"

    def fields(self, step: int) -> dict[str, str]:
        spent = 1000 * self.elapsed()
        return {"train_time": f"{spent:.0f}ms", "step_avg": f"{spent / max(1, step):.2f}ms"}


class Trainer:
    """Trains `model` on `data`. All that a run carries from step to step lies here."""

    def __init__(
        self, model: GPT, data: Data, runtime: Runtime, log: Log, stop: Interrupts
    ) -> None:
        self.hp, self.model, self.data, self.runtime = model.hp, model, data, runtime
        self.log, self.stop = log, stop
        self.limit = BatchLimit(self.hp.micro_batch_tokens // self.hp.train_seq_len, log)
        self.flat = FlatParameters(model, runtime.world_size)
        self.optimizer = Optimizer(self.flat, self.hp, runtime)
        self.average = WeightAverage(self.hp, self.flat.data)
        self.step, self.elapsed = 0, 0.0  # steps done, and their seconds
        self.plan: StepPlan | None = None  # of the last step
        self.phase_start = 0  # the step that first had as many passes as the last one
        self.floor_index: int | None = None  # of QAT, once it has begun
        self.squares = self.optimizer.matrix_squares()  # of the last steps; zeros before
        self.norm_sent: tuple[Tensor, torch.cuda.Event | None, int] | None = None  # to the host

    def accumulate(
        self, batch: Tensor, passes: int, floors: dict | None = None, cuts: int = 1
    ) -> Tensor:
        """Gradients of this rank's windows (B, T+1), each cut into so many sequences; returns sums
        for the log: nats, text bytes, proxy, then growth, update and feedback of each pass, times
        B. Short sequences first: Li et al. 2022 (arXiv 2108.06084); attention costs less."""
        return self.limit.run(partial(self.accumulate_parts, batch, passes, floors, cuts))

    def accumulate_parts(
        self, batch: Tensor, passes: int, floors: dict | None, cuts: int, at_once: int
    ) -> Tensor:
        hp = self.hp
        self.flat.grad.zero_()
        sums = torch.zeros(3 + 3 * passes, device=self.runtime.device)
        for part in near_equal_parts(batch, at_once):
            ids, targets = (t.reshape(cuts * len(part), -1) for t in (part[:, :-1], part[:, 1:]))
            losses, stability = self.model(ids, targets, passes, floors)
            nats, proxy = losses.sum(), stability.jacobian_proxy.sum() / cuts
            weighted = hp.jacobian_proxy_weight * proxy / hp.batch_seqs
            (nats / hp.train_batch_tokens + weighted).backward()
            text_bytes = self.data.token_bytes.of(ids, targets).sum()
            counts = torch.stack([nats.detach(), text_bytes, proxy.detach()])
            sums += torch.cat([counts, len(part) * torch.cat(stability[1:])])
        return sums

    def warm_up(self, evaluator: Evaluator) -> None:
        """Runs every graph of the run on random tokens of its own, then restores the weights.

        So nothing is compiled, tuned or allocated once the clock runs; a throwaway optimizer opens
        the ranks' communication, a throwaway evaluation trains on its text."""
        hp, flat, runtime, kept = self.hp, self.flat, self.runtime, self.flat.data.clone()
        generator = torch.Generator().manual_seed(hp.seed)
        random = partial(torch.randint, hp.vocab_size, generator=generator, dtype=torch.int32)
        optimizer, floors = Optimizer(flat, hp, runtime), step_floors(0, self.squares)
        kinds = step_kinds(hp)
        steps = max(hp.warmup_steps, len(kinds)) if hp.warmup_steps else 0
        for i in range(steps):
            self.log.progress(f"warm-up: step {i + 1} of {steps}")
            batch = random(self.data.loader.shape).to(runtime.device)
            passes, cuts, qat = kinds[i * len(kinds) // steps]
            self.accumulate(batch, passes, floors if qat else None, cuts)
            optimizer.step(optimizer.reduce(), 1.0, 0.9)
        if steps and runtime.compiles:
            text = random((hp.ttt_chunk_tokens + 2 * hp.train_seq_len,)).numpy()
            data = self.data._replace(val_tokens=text)
            rehearsal = Evaluator(hp, data, runtime, Log(None))
            # What fits the memory is found out once.
            rehearsal.scoring, rehearsal.training = evaluator.scoring, evaluator.training
            rehearsal.run_all(self.model, flat, kinds[-1][0])
        flat.data.copy_(kept)
        flat.grad.zero_()

    def train(self, evaluator: Evaluator, checkpoints: Path, until: float = 1.0) -> bool:
        """Trains to the run's end, or to `until` of its progress; whether a signal ended it."""
        hp, log, clock, graphs = self.hp, self.log, Clock(self), graphs_compiled()
        log.has_results, score = True, ""
        while True:
            progress, ends, checkpoint_due = clock.read(self.step)
            if ends or progress >= until:
                break
            if checkpoint_due:
                self.check_norm()  # no checkpoint of a run that has diverged
                self.elapsed = clock.elapsed()
                save_checkpoint(self, checkpoints)
                clock.last = time.perf_counter()  # the next step will not be as long
            sums, norm = self.take_step(progress)
            if self.step % hp.train_log_every == 0 or self.step in (1, 10):
                score = self.log_step(sums, norm, clock)
            if hp.val_loss_every and self.step % hp.val_loss_every == 0:
                self.runtime.barrier()
                since, passes = time.perf_counter(), self.plan.num_passes
                evaluator.run("validation", self.model, hp.train_seq_len, passes, step=self.step)
                clock.last = time.perf_counter()
                clock.started += clock.last - since  # it is not the run's time
            log.progress(f"step {self.step}, {score}, {clock.forecast(self.plan.num_passes)}")
        self.check_norm()
        self.runtime.barrier()
        self.elapsed, memory = clock.elapsed(), torch.cuda.max_memory_allocated() >> 20
        facts = {"graphs_compiled_after_start": graphs_compiled() - graphs}
        facts |= {"peak_memory_mib": memory, "interrupted": int(clock.interrupted)}
        log.event("stop", step=self.step, **clock.fields(self.step), **facts)
        return clock.interrupted

    def take_step(self, progress: float) -> tuple[Tensor, Tensor]:
        """One optimizer update; returns what `accumulate` does, and the gradient's norm."""
        before, plan = self.plan, plan_step(self.hp, self.step, progress)
        self.plan, at, floors = plan, {"step": self.step, "progress": progress}, None
        if before is None or plan.num_passes != before.num_passes:
            self.phase_start = self.step
            self.log.event("progressive_passes", **at, num_passes=plan.num_passes)
        if before is None or plan.cuts != before.cuts:
            self.log.event("seq_len", **at, tokens=self.hp.train_seq_len // plan.cuts)
        if plan.swa and not (before and before.swa) and self.average.swa is not None:
            self.log.event("swa", **at)
        if plan.qat and self.floor_index is None:
            weights, limit = self.flat.named(self.flat.data), model_limit(self.hp)
            guess = estimate_floor_index(weights, self.squares, limit)
            self.floor_index = index = self.runtime.from_main(guess)
            self.log.event("late_qat", **at, floor_index=index, floor=floor_value(index))
        if plan.qat:
            floors = step_floors(self.floor_index, self.squares)
        batch = self.data.loader.batch(self.step)
        sums = self.accumulate(batch, plan.num_passes, floors, plan.cuts)
        norm = self.optimizer.reduce()
        if plan.swa or plan.qat:
            self.squares = self.optimizer.matrix_squares()
        self.optimizer.step(norm, plan.lr_scale, plan.momentum)
        self.average.update(progress, plan.swa)
        self.step += 1
        # The host waits for the step before, and so is never further ahead than this one.
        sent = norm.detach().to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if norm.is_cuda else None
        self.check_norm()
        self.norm_sent = (sent, arrived, self.step)
        return sums, norm

    def check_norm(self) -> None:
        """Waits for the norm that is on its way. Raises FloatingPointError if it is not finite."""
        if self.norm_sent is None:
            return
        (norm, arrived, step), self.norm_sent = self.norm_sent, None
        if arrived is not None:
            arrived.synchronize()
        if not math.isfinite(norm):
            text = f"step {step}: the gradient's norm is {float(norm)}, the run diverged"
            raise FloatingPointError(f"{text}: lower matrix_lr or residual_scale_init")

    def log_step(self, sums: Tensor, norm: Tensor, clock: Clock) -> str:
        """Logs a step in a line for people and one for plots; returns its scores in words."""
        hp, plan, step = self.hp, self.plan, self.step
        nats, text_bytes, proxy, *ratios = self.runtime.sum_(sums).tolist()
        ratios = (np.array(ratios).reshape(3, -1) / hp.batch_seqs).tolist()
        loss, bpb = nats / hp.train_batch_tokens, nats / math.log(2) / max(1, text_bytes)
        facts = {"step": f"{step}/{hp.iterations}" if hp.iterations else step}
        facts |= {"train_loss": f"{loss:.4f}", "train_bpb": f"{bpb:.4f}"}
        facts |= {"passes": plan.num_passes, "qat": int(plan.qat), "lr_scale": plan.lr_scale}
        self.log.event(**facts, grad_norm=norm.item(), **clock.fields(step))
        facts = {"step": step, "jacobian_proxy": proxy / hp.batch_seqs}
        facts |= zip(("growth", "update", "feedback_norm"), ratios, strict=True)
        self.log.event("passes", **facts, residual_scale=self.model.residual_scale.tolist())
        return f"loss {loss:.3f}, {bpb:.3f} bits per byte"

    def average_weights(self) -> int:
        """Puts the averaged weights into the model; the passes to score them with: those that are
        set, or else those that training reached."""
        self.flat.data.copy_(self.average.result())
        kind, samples = self.hp.weight_average, self.average.samples
        self.log.event("weight_average", kind=kind, swa_samples=samples)
        reached = (self.plan or plan_step(self.hp, 0, 0.0)).num_passes
        passes, steps = self.hp.eval_passes or reached, self.step - self.phase_start
        if passes > reached or (self.phase_start and steps < self.step / 100):
            text = f"scored with {passes} passes, and only the last {steps} of {self.step} steps"
            self.log.event("warning", text=f"{text} had {reached}")
        return passes


COUNTS = ("step", "elapsed", "phase_start", "floor_index")  # of a trainer
SAMPLES = ("samples", "last_progress", "last_sample")  # of its average


def run_state(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a resumed run must share with the one that it continues, and the tensors that training
    carries from step to step, in the layout of flat.data."""
    hp, average = trainer.hp, trainer.average
    names = ("seed", "train_batch_tokens", "weight_average")
    fixed = hp.architecture() | {name: getattr(hp, name) for name in names}
    fixed |= {f"{f['split']} data": f["fingerprint"] for f in trainer.data.facts}
    del fixed["eval_passes"]  # training does not depend on it
    tensors = {"data": trainer.flat.data, "momentum": trainer.optimizer.momentum}
    tensors |= {"ema": average.ema, "swa": average.swa}
    return fixed, {name: t for name, t in tensors.items() if t is not None}


def save_checkpoint(trainer: Trainer, folder: Path) -> bool:
    """Writes a digest, then torch.save's bytes; on every rank: whether it was written.

    Tensors are stored by name, for any number of ranks. Training draws no random numbers and the
    loader's place is the step, so that nothing else has to be kept."""
    flat, runtime, momentum = trainer.flat, trainer.runtime, trainer.optimizer.momentum
    if runtime.world_size > 1:
        for work in [flat.gather(momentum, bank, runtime) for bank in BANKS]:
            work.wait()
    if not runtime.is_main:
        return runtime.from_main(None)
    fixed, tensors = run_state(trainer)
    state = {"settings": fixed, "adam": trainer.optimizer.adam.state_dict()}
    state["squares"] = trainer.squares
    state |= {name: getattr(trainer, name) for name in COUNTS}
    state |= {name: getattr(trainer.average, name) for name in SAMPLES}
    state["tensors"] = {kind: flat.named(t.to("cpu", copy=True)) for kind, t in tensors.items()}
    torch.save(state, buffer := io.BytesIO())
    path, data = folder / f"step_{trainer.step:08d}.pt", buffer.getvalue()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(path, hashlib.sha256(data).digest() + data)
        # It and one more stay. Those of later steps, which a resumed run left behind, go first.
        found = sorted(folder.glob("step_*.pt"), key=lambda other: (other <= path, other))
        for old in (*found[:-2], *folder.glob("step_*.tmp")):
            old.unlink()
    except OSError as error:  # the run goes on, and older checkpoints stay
        trainer.log.event("checkpoint_failed", path=path, reason=error.strerror)
        return runtime.from_main(False)
    trainer.log.event("checkpoint", step=trainer.step, path=path, bytes=32 + len(data))
    return runtime.from_main(True)


def read_checkpoint(folder: Path, runtime: Runtime, log: Log) -> dict[str, Any] | None:
    """The newest whole checkpoint, the same on every rank, or None. Nothing in it is executed."""
    for path in runtime.from_main(sorted(folder.glob("step_*.pt"), reverse=True)):
        data = runtime.from_main(path.read_bytes() if runtime.is_main else None)
        if hashlib.sha256(data[32:]).digest() == data[:32]:
            return torch.load(io.BytesIO(data[32:]), map_location="cpu", weights_only=True)
        log.event("checkpoint_damaged", path=path)
    return None


def load_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Brings `trainer` to its newest checkpoint, if there is one. Raises UserError."""
    state = read_checkpoint(folder, trainer.runtime, trainer.log)
    if state is None:
        text = f"{folder} holds no whole checkpoint: training begins at step 0"
        trainer.log.event("warning", text=text)
        return
    average, adam = trainer.average, trainer.optimizer.adam
    (new, tensors), old = run_state(trainer), state["settings"]
    differ = [f"{k}={new.get(k)} (was {old.get(k)})" for k in new | old if new.get(k) != old.get(k)]
    text = f"resume: the checkpoint is of another run: {', '.join(differ)}"
    require(not differ, f"{text}: give what it began with, or choose another run_id")
    for kind, tensor in tensors.items():
        for name, view in trainer.flat.named(tensor).items():
            view.copy_(state["tensors"][kind][name])
    trainer.squares = {b: s.to(tensors["data"].device) for b, s in state["squares"].items()}
    adam.load_state_dict(adam.state_dict() | {"state": state["adam"]["state"]})
    for owner, names in ((trainer, COUNTS), (average, SAMPLES)):
        for name in names:
            setattr(owner, name, state[name])
    trainer.plan = plan_step(trainer.hp, trainer.step - 1, average.last_progress)
    spent = f"{1000 * trainer.elapsed:.0f}ms"
    trainer.log.event("resume", step=trainer.step, train_time=spent)


# --- 9. Compression: GPTQ-lite int6, one knob for the size, lzma, a reader that trusts nothing ----

# GPTQ-lite's clip candidates, as quantiles of a row's |w|; 1.0 does not clip.
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT6_LEVELS, INT8_LEVELS = 31, 127
SMALL_TENSOR = 65_536  # elements; up to here a tensor is stored as float16, not quantized
# The export's size knob is a whole number n: no quantization step is finer than 2^(-n/512).
FLOOR_STEPS_PER_OCTAVE, FINEST_FLOOR_INDEX = 512, 512 * 14
ARTIFACT_MAGIC = b"SGR2"
MAX_MODEL_BYTES = 1 << 30  # an artifact that claims more is refused before anything is allocated


def row_scales(w: Tensor, levels: int, floor: Tensor) -> Tensor:
    """The quantization step (..., rows, 1) of each row of w (..., rows, cols).

    GPTQ-lite (PR 414): of the clips at CLIP_QUANTILES of a row's |w| the one with the least squared
    error, counted with the step as stored: float16, and no finer than `floor`, a scalar tensor."""
    places = [(1 - quantile) * (w.size(-1) - 1) for quantile in CLIP_QUANTILES]  # from the largest
    top = w.abs().topk(min(w.size(-1), 2 + int(max(places)))).values
    best = torch.zeros_like(top[..., :1])
    least = torch.full_like(best, math.inf)
    for place in places:
        low, high = int(place), min(int(place) + 1, top.size(-1) - 1)
        clip = torch.lerp(top[..., low, None], top[..., high, None], place - low)
        scale = torch.maximum(clip / levels, floor).half().float()
        error = (quantize(w, scale, levels) * scale - w).square().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best


def quantize(w: Tensor, scale: Tensor, levels: int) -> Tensor:
    """w in steps of `scale`: whole numbers in -levels..levels, as floats."""
    return torch.round(w / scale).clamp(-levels, levels)


@compiled
def fake_quantize(w: Tensor, floor: Tensor) -> Tensor:
    """What the export stores of w (..., rows, cols), with the gradient of w itself."""
    with torch.no_grad():
        scale = row_scales(w, INT6_LEVELS, floor)
        stored = quantize(w, scale, INT6_LEVELS) * scale
    return stored + (w - w.detach())  # the second term is exactly 0


def floor_value(index: int) -> float:
    return 2.0 ** (-index / FLOOR_STEPS_PER_OCTAVE)


def step_floors(index: int, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The finest quantization step of each of a bank's matrices (N, 1, 1): on average that of
    `index`, times F^(-1/2) of a matrix whose mean squared gradient is F (0: not known).

    To round a matrix with step s costs about F s^2, F its Fisher information, and a bit a weight
    halves s: bits are spent best where F s^2 is equal. F^(-1/2) is bounded to [1/4, 4]. That such
    traces differ by matrix but hardly by seed: PR 1412."""
    usual = torch.cat([s.flatten() for s in squares.values()]).log().mean().exp()
    shares = {bank: (s / usual).clamp(1 / 16, 16).rsqrt() for bank, s in squares.items()}
    return {bank: floor_value(index) * share.nan_to_num(1.0) for bank, share in shares.items()}


def storage_levels(name: str, shape: Sequence[int]) -> int:
    """Largest integer that a tensor is quantized to: 31 (int6), 127 (int8), or 0 for float16."""
    int8 = len(shape) == 2 and math.prod(shape) > SMALL_TENSOR
    return INT6_LEVELS if name in BANKS else INT8_LEVELS if int8 else 0


def payload_bytes(shapes: Mapping[str, Sequence[int]]) -> int:
    """Bytes that `pack` makes: 2 an element of float16, else 1 and 2 for each row's scale."""
    total = 0
    for name, shape in shapes.items():
        size, rows = math.prod(shape), math.prod(shape[:-1])
        total += size + 2 * rows if storage_levels(name, shape) else 2 * size
    return total


def pack(tensors: Mapping[str, Tensor], floors: Mapping[str, Tensor]) -> bytes:
    """Every tensor in order: its row scales in float16, then integers as unsigned bytes."""
    parts, finest = [], torch.tensor(floor_value(FINEST_FLOOR_INDEX))
    for name, w in tensors.items():
        levels = storage_levels(name, w.shape)
        if levels:
            scale = row_scales(w, levels, floors.get(name, finest).to(w.device))
            parts += [scale.half(), (quantize(w, scale, levels) + levels).to(torch.uint8)]
        else:
            parts.append(w.half())
    return b"".join(part.cpu().numpy().tobytes() for part in parts)


def unpack(payload: bytes, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """The dequantized float32 tensors of a payload of `payload_bytes(shapes)`."""
    tensors, stream = {}, io.BytesIO(payload)

    def take(dtype: type, shape: Sequence[int]) -> Tensor:
        array = np.frombuffer(stream.read(math.prod(shape) * np.dtype(dtype).itemsize), dtype)
        return torch.from_numpy(array.astype(np.float32)).reshape(tuple(shape))

    for name, shape in shapes.items():
        levels = storage_levels(name, shape)
        scale = take(np.float16, (*shape[:-1], 1)) if levels else 1.0
        tensors[name] = (take(np.uint8 if levels else np.float16, shape) - levels) * scale
    return tensors


def huffman(data: bytes) -> bytes:
    """Deflate without matches, a new code every 32,768 bytes: quantized weights repeat nothing.

    The recipe's banks take 0.7% more than their entropy; by lzma's own model they took 2.6%."""
    coder = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def compress(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], floors: Mapping[str, Tensor]
) -> bytes:
    """The artifact: xz( magic, header length, JSON header, huffman(payload) )."""
    text = json.dumps(header, separators=(",", ":")).encode()
    start = ARTIFACT_MAGIC + len(text).to_bytes(4, "little") + text
    return lzma.compress(start + huffman(pack(tensors, floors)), preset=0)


def entropy_bytes(tensors: Mapping[str, Tensor], floors: Mapping[str, Tensor]) -> float:
    """Bytes of the artifact if banks were coded at their entropy: close to it, and at once."""
    total = float(payload_bytes({n: w.shape for n, w in tensors.items()}))
    for w, floor in ((tensors[name], floors[name]) for name in BANKS):
        scale = row_scales(w, INT6_LEVELS, floor)
        integers = (quantize(w, scale, INT6_LEVELS) + INT6_LEVELS).to(torch.uint8).flatten()
        share = torch.bincount(integers, minlength=2 * INT6_LEVELS + 1).double() / w.numel()
        bits = torch.special.entr(share).sum().item() / math.log(2)
        total -= w.numel() * (1 - bits / 8)
    return total


def estimate_floor_index(
    tensors: Mapping[str, Tensor], squares: Mapping[str, Tensor], limit_bytes: float
) -> int:
    """The finest floor whose estimated size fits: where the export's search starts, and QAT's."""
    size = lambda i: entropy_bytes(tensors, step_floors(i, squares))  # noqa: E731
    return bisect.bisect(range(1, FINEST_FLOOR_INDEX + 1), limit_bytes, key=size)


def export(
    hp: Hyperparameters, tensors: Mapping[str, Tensor], squares: Mapping[str, Tensor],
    path: Path, log: Log,
) -> Path:  # fmt: skip
    """Writes an artifact that fits beside the code, close to the finest; returns where it lies.

    squares: see step_floors. The size is estimated, and the estimate corrected twice. Raises
    UserError if none fits."""

    @cache
    def attempt(index: int) -> bytes:
        return compress(hp.architecture(), tensors, step_floors(index, squares))

    limit, step = model_limit(hp), 1
    budget = limit
    for _ in range(2):
        budget *= limit / len(attempt(estimate_floor_index(tensors, squares, budget)))
    finest = estimate_floor_index(tensors, squares, budget)
    while (model := len(attempt(finest))) > limit and finest:
        finest, step = max(0, finest - step), 2 * step
    fits, code = model <= limit, hp.artifact_limit_bytes - limit
    target = path if fits else path.with_suffix(".oversize.xz")
    path = write_or_rescue(target, attempt(finest), log)
    sizes = {"code_bytes": code, "model_bytes": model, "total_bytes": code + model}
    knob = {"floor_index": finest, "floor": floor_value(finest)}
    log.event("artifact", path=path, **sizes, margin_bytes=limit - model, **knob)
    text = f"artifact_limit_bytes={hp.artifact_limit_bytes}: code and model need {code + model}"
    require(fits, f"{text} at the coarsest setting, kept as {path}: make the model smaller")
    return path


def read_header(text: bytes) -> Hyperparameters:
    """The settings in an artifact's header, checked like a user's. Raises ValueError."""
    header, names = json.loads(text), Hyperparameters().architecture()
    require(isinstance(header, dict) and set(header) == set(names), "its header is another one")
    T = header["train_seq_len"]
    fitted = {"train_batch_tokens": T, "micro_batch_tokens": T, "eval_stride": 1}
    fitted |= {"seq_len_schedule": "0.0:1"}
    settings = {name.upper(): str(value) for name, value in (header | fitted).items()}
    hp, _ = read_configuration(settings, [])
    require(hp.vocab_size is not None, "its header has no vocabulary")
    return hp


def read_artifact(path: Path) -> tuple[Hyperparameters, dict[str, Tensor]]:
    """The architecture, as settings, and the float32 tensors of an artifact.

    The file is untrusted and nothing in it is executed: the settings in its header are checked
    like a user's, and the payload must have exactly the size that they imply. Raises UserError."""
    damaged = (lzma.LZMAError, zlib.error, EOFError, ValueError, RecursionError, OverflowError)
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 26)
    try:
        start = stream.decompress(path.read_bytes(), 8)
        length = int.from_bytes(start[4:], "little")
        foreign = start[:4] != ARTIFACT_MAGIC or not 0 < length < 1 << 16
        require(not foreign, "it does not begin like one of this version")
        hp = read_header(stream.decompress(b"", length))
        shapes = {name: row.shape for name, row in parameter_table(hp).items()}
        size = payload_bytes(shapes)
        require(size <= MAX_MODEL_BYTES, f"it claims {size} bytes of weights")
        coded, codes = stream.decompress(b"", 2 * size), zlib.decompressobj(-15)
        payload = codes.decompress(coded, size + 1)  # one more than there is: it reads to the end
        ended = stream.eof and codes.eof and not stream.unused_data + codes.unused_data
        whole = len(payload) == size and ended
        require(whole, "it has too few or too many bytes")
    except OSError as error:
        raise UserError(f"artifact {path} cannot be read: {error.strerror}") from None
    except damaged as error:
        text = f"artifact {path} is damaged or foreign ({error}): copy or export it again"
        raise UserError(text) from None
    return hp, unpack(payload, shapes)


# --- 10. Evaluation: three ways, each scores every token exactly once -----------------------------


def scoring_windows(first: int, last: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows that score targets first..last-1 once each, in order: rows (start, from, to).

    Target t is token t+1. A window feeds the `seq_len` tokens from `start` and scores targets
    from..to-1; it ends with the last of them, unless the text has only just begun."""
    opening = min(last, max(first + stride, seq_len))
    to = np.array([*range(opening, last, stride), last], dtype=np.int64)
    return np.stack([np.maximum(to - seq_len, 0), np.append(first, to[:-1]), to], axis=1)


class Evaluator:
    """Scores a text of tokens; target t is token t+1, and its loss is final once it is scored."""

    def __init__(self, hp: Hyperparameters, data: Data, runtime: Runtime, log: Log) -> None:
        self.hp, self.runtime, self.log = hp, runtime, log
        self.scoring = BatchLimit(hp.eval_batch_seqs, log)
        self.training = BatchLimit(hp.micro_batch_tokens // hp.train_seq_len, log)
        self.tokens = torch.from_numpy(data.val_tokens.astype(np.int32)).to(runtime.device)
        self.num_targets = len(self.tokens) - 1
        self.bytes = data.token_bytes.of(self.tokens[:-1], self.tokens[1:])

    @torch.no_grad()
    def score(
        self, model: GPT, targets: range, stride: int, passes: int, name: str | None = None
    ) -> Tensor:
        """The losses in nats (targets,) float32, on every rank; ranks share the windows.

        Windows are scored in batches of one shape, with a head on the last `stride` positions only
        where all that a window scores lies in them. name: shows the progress under it."""
        work = partial(self.score_windows, model, targets, stride, passes, name)
        losses, times_scored = self.scoring.run(work)
        for x in (losses, times_scored):
            self.runtime.sum_(x)
        if not bool((times_scored[:-1] == 1).all()):
            raise RuntimeError("a target was not scored exactly once: this is a fault of scoring")
        return losses[:-1]

    def score_windows(
        self, model: GPT, targets: range, stride: int, passes: int, name: str | None, size: int
    ) -> tuple[Tensor, Tensor]:
        """What this rank finds, `size` windows at once: losses, and how often each was found."""
        T, device = self.hp.train_seq_len, self.runtime.device
        # One more slot takes what is computed but not to be kept.
        losses = torch.zeros(len(targets) + 1, device=device)
        times_scored = torch.zeros_like(losses, dtype=torch.int32)
        windows = scoring_windows(targets.start, targets.stop, T, stride)
        mine = windows[self.runtime.share(len(windows))]
        late = mine[:, 1] >= mine[:, 0] + T - stride
        for chosen, count in ((mine[late], stride), (mine[~late], T)):
            for at in range(0, len(chosen), size):
                part = chosen[at : at + size]
                rows = np.pad(part, ((0, size - len(part)), (0, 0)))  # the added ones score nothing
                start, first, last = torch.from_numpy(rows).to(device).unsqueeze(2).unbind(1)
                batch = self.tokens[start + torch.arange(T + 1, device=device)]
                found, _ = model(batch[:, :-1], batch[:, 1:], passes, score_last=count)
                target = start + torch.arange(T - count, T, device=device)
                kept = (target >= first) & (target < last)
                place = torch.where(kept, target - targets.start, len(targets)).flatten()
                losses.index_copy_(0, place, found.flatten())
                times_scored.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
                if name:
                    self.log.progress(f"{name} {min(1, (at + size) / len(chosen)):4.0%}")
        return losses, times_scored

    def bits_per_byte(self, losses: Tensor) -> float:
        """Of the text's first len(losses) targets."""
        return losses.double().sum().item() / math.log(2) / int(self.bytes[: len(losses)].sum())

    def report(self, name: str, losses: Tensor, since: float, **more: Any) -> None:
        """Logs val_loss (nats a token) and val_bpb of the whole text."""
        scores = {"val_loss": f"{losses.double().mean().item():.8f}"}
        scores |= {"val_bpb": f"{self.bits_per_byte(losses):.8f}", "tokens": len(losses)}
        seconds = f"{time.perf_counter() - since:.3f}"
        self.log.event(name, **scores, bytes=int(self.bytes.sum()), seconds=seconds, **more)
        self.log.has_results = True

    def run(self, name: str, model: GPT, stride: int, passes: int, **more: Any) -> Tensor:
        """Scores the whole text with windows `stride` apart; returns the losses (n-1,)."""
        since = time.perf_counter()
        losses = self.score(model, range(self.num_targets), stride, passes, name)
        self.report(name, losses, since, passes=passes, **more)
        return losses

    def run_all(self, model: GPT, flat: FlatParameters, passes: int) -> Tensor:
        """Plain, sliding, test-time training; returns the losses of the last of them."""
        hp, deadline = self.hp, time.perf_counter() + (self.hp.eval_wallclock_seconds or math.inf)
        losses = self.run("final_int6_roundtrip_exact", model, hp.train_seq_len, passes)
        if hp.sliding_eval:
            losses = self.run("final_int6_sliding_window_exact", model, hp.eval_stride, passes)
        if hp.ttt_enabled:
            losses = self.run_ttt(model, flat, passes, deadline)
        return losses

    def run_ttt(self, model: GPT, flat: FlatParameters, passes: int, deadline: float) -> Tensor:
        """Score-first test-time training (PR 461): each chunk is scored, its losses are final, and
        only then the parameters are trained on it (not on the last). Returns the losses (n-1,).

        deadline: on the clock of time.perf_counter. A chunk is not trained on where all that are
        left, scored and trained on like those before it, would end after the deadline."""
        hp, since, trained = self.hp, time.perf_counter(), 0
        sgd = torch.optim.SGD([flat.whole(slice(None))], momentum=0.9)
        starts = range(0, self.num_targets, hp.ttt_chunk_tokens)
        losses = torch.zeros(self.num_targets, device=self.tokens.device)
        for i, first in enumerate(starts, 1):
            chunk = range(first, min(first + hp.ttt_chunk_tokens, self.num_targets))
            losses[first : chunk.stop] = self.score(model, chunk, hp.eval_stride, passes)
            now, left = time.perf_counter(), len(starts) - i
            if i % max(1, len(starts) // 20) == 0:
                bpb, at = self.bits_per_byte(losses[: chunk.stop]), f"{i}/{len(starts)}"
                self.log.event("ttt_chunk", chunk=at, val_bpb=bpb, time=f"{now - since:.1f}s")
            chunk_seconds = (now - since) / i
            if not trained:  # a guess: scoring a stride costs a window, training on it thrice that
                chunk_seconds *= 1 + 3 * hp.ttt_epochs * hp.eval_stride / hp.train_seq_len
            in_time = now + left * chunk_seconds < deadline
            if left and self.runtime.from_main(in_time):
                cosine = math.cos(math.pi * (i - 1) / (len(starts) - 1))
                sgd.param_groups[0]["lr"] = hp.ttt_lr * 0.5 * (1 + cosine)
                self.train_on(model, flat, sgd, chunk, passes)
                trained += 1
            self.log.progress(f"legal_ttt {i}/{len(starts)} chunks")
        epochs = f"{trained * hp.ttt_epochs}/{(len(starts) - 1) * hp.ttt_epochs}"
        self.report("legal_ttt_exact", losses, since, passes=passes, epochs=epochs)
        return losses

    def train_on(
        self, model: GPT, flat: FlatParameters, sgd: Any, targets: range, passes: int
    ) -> None:
        """Epochs of SGD over the whole windows of a scored chunk; ranks share each batch."""
        hp, T = self.hp, self.hp.train_seq_len
        whole = range(targets.start, targets.stop - T + 1, T)  # none in a chunk below T tokens
        starts = torch.tensor(whole, dtype=torch.int64, device=self.tokens.device)
        for batch in list(starts.split(hp.ttt_batch_seqs)) * hp.ttt_epochs:
            self.training.run(partial(self.accumulate, model, flat, batch, passes))
            norm = self.runtime.sum_(flat.grad).norm()
            flat.grad.mul_((1 / (norm + 1e-6)).clamp(max=1.0))
            sgd.step()

    def accumulate(
        self, model: GPT, flat: FlatParameters, starts: Tensor, passes: int, at_once: int
    ) -> None:
        """Gradients of this rank's share of the windows that begin at `starts`."""
        flat.grad.zero_()
        mine, T = starts[self.runtime.share(len(starts))], self.hp.train_seq_len
        for part in near_equal_parts(mine, at_once):
            rows = self.tokens[part[:, None] + torch.arange(T + 1, device=part.device)]
            losses, _ = model(rows[:, :-1], rows[:, 1:], passes)
            (losses.sum() / (len(starts) * T)).backward()


# --- 11. Kernels: written by hand for speed, not needed to understand the method ------------------


class Heads(torch.autograd.Function):
    """q = gain rot(n(x_q)), k = rot(n(x_k)), v = x_v of x (B, T, H+2G, E); n: rms_norm of a head.

    Norms of q and k: Henry et al. 2020 (QK-norm). The backward is written out, for with
    u = rot' dq the gradients of norm and gain need one and the same sum, u'n; autograd's own moves
    more memory."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, half: int
    ) -> tuple[Tensor, ...]:
        H, G = len(gain), (x.size(2) - len(gain)) // 2
        gain = F.pad(gain, (0, G), value=1.0)[:, None]
        ctx.save_for_backward(x, gain, cos, sin)
        ctx.half = half
        qk, v = x.split([H + G, G], dim=2)
        q, k = (gain * rotate(rms_norm(qk), cos, sin, half)).split([H, G], dim=2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        x, gain, cos, sin = ctx.saved_tensors
        exact = torch.promote_types(x.dtype, torch.float32)
        x, u = x[:, :, : len(gain)].to(exact), torch.cat([dq, dk], dim=2)
        u = rotate(u, cos, -sin, ctx.half).to(exact)
        scale = (x.square().mean(-1, keepdim=True) + RMS_EPS).rsqrt()
        n = scale * x
        along = (u * n).sum(-1, keepdim=True)
        dx = gain * scale * (u - n * along / x.size(-1))
        dgain = along.sum((0, 1, 3))[: dq.size(2)].to(gain.dtype)
        return torch.cat([dx.to(dv.dtype), dv], dim=2), dgain, None, None, None


if triton is not None:

    @triton.jit
    def fused_product_kernel(
        a: tl.tensor_descriptor, b: tl.tensor_descriptor, s: tl.tensor_descriptor,
        out: tl.tensor_descriptor, N: tl.constexpr, K: tl.constexpr, BACKWARD: tl.constexpr,
    ) -> None:  # fmt: skip
        """See fused_product. A block makes many tiles of 128x128, each in two halves of columns."""
        columns: tl.constexpr = N // 128
        tiles = tl.cdiv(out.shape[0], 128) * columns
        for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=not BACKWARD):
            m, n = tile // columns * 128, tile % columns * 128
            product = tl.zeros((128, 128), tl.float32)
            for k in range(0, K, 64):
                product = tl.dot(a.load([m, k]), b.load([n, k]).T, product)
            left, right = product.reshape(128, 2, 64).permute(0, 2, 1).split()
            for i in tl.static_range(2):
                part = left if i == 0 else right
                if BACKWARD:
                    known = s.load([m, n + 64 * i])
                    negative = (known.to(tl.int16, bitcast=True) & 1) == 1
                    result = part * tl.where(negative, -1, 2) * tl.sqrt(known.to(tl.float32))
                else:
                    leaky = tl.where(part < 0, 0.5 * part, part)
                    # A bfloat16 is the upper half of a float32: its last bit is 0x10000. CUDA's NaN
                    # has all bits set, and would not stay one.
                    bits = tl.minimum((leaky * leaky).to(tl.int32, bitcast=True), 0x7FC00000)
                    even, odd = (bits + 0x10000) & -0x20000, bits & -0x20000 | 0x10000
                    result = tl.where(part < 0, odd, even).to(tl.float32, bitcast=True)
                out.store([m, n + 64 * i], result.to(out.dtype))

    @library.custom_op("train_gpt::fused_product", mutates_args=())
    def fused_product(a: Tensor, b: Tensor, s: Tensor | None) -> Tensor:
        """s = leaky(u)^2 of u = a b', u's sign in its last bit; given s of a u, a b' times ds/du.

        a (M, K), b (N, K), s and the result (M, N): bfloat16; K in multiples of 64, N of 128."""
        out = a.new_empty(a.size(0), b.size(0))
        blocks = 2 * torch.cuda.get_device_properties(a.device).multi_processor_count
        tensors = [t.contiguous() for t in (a, b, out if s is None else s, out)]
        tiles = [TensorDescriptor.from_tensor(t, [128, 64]) for t in tensors]
        fused_product_kernel[(blocks,)](*tiles, *b.shape, s is not None)
        return out

    fused_product.register_fake(lambda a, b, s: a.new_empty(a.size(0), b.size(0)))


class FusedMLP(torch.autograd.Function):
    """leaky(x up')^2 down' of x (M, D), squared inside the product: on an H100 a step of 786,432
    tokens takes 574 ms, not 601, and 3.1 of 17.0 GiB less.

    u = x up' is never written. Backward needs |leaky(u)|, the root of the square s, and the sign of
    u, which is s's last bit: s is rounded to an even bfloat16, or to an odd one if u < 0. That errs
    by 2^-7 at most, as rounding u before the square would."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        s = fused_product(x, up, None)
        ctx.save_for_backward(x, up, down, s)
        return F.linear(s, down)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
        x, up, down, s = ctx.saved_tensors
        du = fused_product(dy, down.T, s)
        return du @ up, du.T @ x, dy.T @ s


def fuses_mlp(device: torch.device, dtype: torch.dtype, up_shape: Sequence[int]) -> bool:
    """Whether FusedMLP is used: in bfloat16 on Hopper, for whose copies and products it is made."""
    fits = dtype == torch.bfloat16 and up_shape[0] % 128 == 0 == up_shape[1] % 64
    nvidia = device.type == "cuda" and torch.version.hip is None and triton is not None
    return fits and nvidia and torch.cuda.get_device_capability(device)[0] == 9


# --- 12. Main: settings -> data -> model -> train -> average -> export -> load -> evaluate --------


def run_files(hp: Hyperparameters, runtime: Runtime) -> tuple[Path, Path, Path, bool]:
    """Log, artifact, folder of checkpoints, and whether a resumed run has only to be scored. Raises
    UserError where a run would lose another's files."""
    run_id = runtime.from_main(hp.run_id or f"{time.strftime('%Y%m%d_%H%M%S')}_seed{hp.seed}")
    suffixes = (".txt", ".int6.xz", ".checkpoints")
    log, artifact, checkpoints = (Path(hp.output_dir) / f"{run_id}{end}" for end in suffixes)
    written = log.read_bytes() if log.is_file() else b""
    last = written[written.rfind(b"\nstop ") :] if b"\nstop " in written else b""
    exported, early = b"\nartifact " in last, b" interrupted:1" in last
    # A run that a signal ended goes on, if it can; then the artifact that it exported is replaced.
    goes_on = bool(last) and (early or not exported) and any(checkpoints.glob("step_*.pt"))
    goes_on, exported = (hp.resume and x for x in (goes_on, exported and not goes_on))
    unscored = b"\nevaluated " not in last and artifact.is_file()
    only_scored = runtime.from_main(exported and unscored)
    kept = (artifact,) if hp.resume else (log, artifact, checkpoints)
    kept = (log,) if hp.evaluate else () if goes_on or only_scored else kept
    existing = runtime.from_main([str(path) for path in kept if path.exists()])
    also = {str(artifact): f", or score it again with --evaluate {artifact}"}
    also |= {str(checkpoints): ", or go on from its checkpoint with --resume"}
    remedy = "choose another run_id" + next((also[path] for path in also if path in existing), "")
    require(not existing, f"run_id: {', '.join(existing)} would be overwritten: {remedy}")
    # A finished run's artifact may lie elsewhere: its folder's disk was full.
    text = f"run_id: {log} is of a finished run, which is not resumed"
    require(only_scored or not runtime.from_main(exported), f"{text}: choose another run_id")
    return log, artifact, checkpoints, only_scored


def check_paths(hp: Hyperparameters) -> None:
    """Raises UserError with all that is wrong with the paths that were given."""
    output, losses = Path(hp.output_dir).absolute(), Path(hp.token_losses or "losses.npy")
    folder = next(path for path in (output, *output.parents) if path.exists())
    room = bool(hp.evaluate) or shutil.disk_usage(folder).free > hp.artifact_limit_bytes
    artifact, tokenizer = Path(hp.evaluate or __file__), find_tokenizer(hp)
    shards = any(Path(hp.data_path).glob("fineweb_val_*.bin"))
    known = tokenizer.is_file() or not (shards or hp.tokenizer_path)  # else it is the data's fault
    require_all(
        (artifact.is_file(), f"artifact {artifact} cannot be read: no such file"),
        (shards, f"data_path={hp.data_path} holds no fineweb_val_*.bin: {DATA_REMEDY}"),
        (known, f"tokenizer_path={tokenizer} is missing: set it"),
        (losses.parent.is_dir() and not losses.is_dir(), f"token_losses={losses} can be no file"),
        (room, f"output_dir={output}: less than {hp.artifact_limit_bytes} bytes free"),
    )


def model_limit(hp: Hyperparameters) -> int:
    """Bytes that the code leaves for the model."""
    return hp.artifact_limit_bytes - Path(__file__).stat().st_size


def write_aside(path: Path, data: bytes) -> None:
    """Writes a file, through links, that is either whole or not there."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # what is left of it may be what fills the disk
        raise


def write_or_rescue(path: Path, data: bytes, log: Log) -> Path:
    """Writes a file; into the temporary folder if `path` cannot be written. Where it lies."""
    with suppress(OSError):
        write_aside(path, data)
        return path
    rescued = Path(tempfile.mkdtemp(prefix="train_gpt_")) / path.name
    text = f"{path} cannot be written, {rescued} is instead"
    log.event("warning", text=text)
    print(f"warning: {text}", file=sys.stderr)  # the log may be on the same full disk
    write_aside(rescued, data)
    return rescued


def log_header(hp: Hyperparameters, sources: Mapping[str, str], runtime: Runtime, log: Log) -> None:
    code = Path(__file__).read_bytes()
    digest = hashlib.sha256(code).hexdigest()
    log.event("code", name=Path(__file__).name, bytes=len(code), sha256=digest)
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "numpy": np.__version__}
    versions |= {"sentencepiece": spm.__version__, "triton": getattr(triton, "__version__", None)}
    log.event("versions", python=sys.version.split()[0], **versions)
    cpu = f"{os.uname().machine} x{os.cpu_count()}"
    name = torch.cuda.get_device_name() if runtime.on_gpu else cpu
    if runtime.on_gpu and runtime.dtype == torch.float32:
        log.event("warning", text="computes in float32: this GPU has no bfloat16, or dtype is set")
    log.event("device", name=name, world_size=runtime.world_size, dtype=str(runtime.dtype)[6:])
    texts = {f.name: str(getattr(hp, f.name)) for f in fields(hp)}  # a float reads back equal
    defaults = {name: text for name, text in texts.items() if sources[name] == "default"}
    for name in [name for name in texts if name not in defaults]:
        log.event("config", name=name, value=texts[name], source=sources[name])
    log.event("defaults", **defaults)


def build_model(hp: Hyperparameters, runtime: Runtime, log: Log) -> GPT:
    torch._dynamo.config.recompile_limit = 128
    if hasattr(torch._inductor.config.triton, "mix_order_reduction"):  # since torch 2.10
        # It joins resid_mix's gradient, sums over tokens, to the norms' backward: 50 ms of a step
        # on an H100, where apart they take 38 (torch 2.11).
        torch._inductor.config.triton.mix_order_reduction = False
    size = payload_bytes({name: row.shape for name, row in parameter_table(hp).items()})
    text = f"the model would have {size} bytes of weights, at most {MAX_MODEL_BYTES} can be stored"
    require(size <= MAX_MODEL_BYTES, f"{text}: lower model_dim, num_layers or bigram_vocab_size")
    torch.manual_seed(hp.seed)
    model = GPT(hp, runtime.dtype).to(runtime.device)
    facts = {"parameters": sum(p.numel() for p in model.parameters())}
    fused = fuses_mlp(runtime.device, runtime.dtype, model.mlp_up_bank.shape[1:])
    facts |= {"fused_mlp": int(fused), "compile": "on" if runtime.compiles else "off"}
    log.event("model", **facts)
    if not runtime.on_gpu and facts["parameters"] * hp.train_batch_tokens > 1e11:
        text = "a step of this size may take minutes on a CPU: --env scripts/demo.env is small"
        log.event("warning", text=text)
    return model


def adopt(hp: Hyperparameters, stored: Hyperparameters) -> Hyperparameters:
    """The run's settings with the architecture of an artifact; what only training needs, fitted."""
    T = stored.train_seq_len
    fitted = {"train_batch_tokens": T, "micro_batch_tokens": max(T, hp.micro_batch_tokens)}
    fitted |= {"eval_stride": min(T, hp.eval_stride), "seq_len_schedule": "0.0:1"}
    fitted["eval_passes"] = hp.eval_passes or stored.eval_passes or stored.max_passes
    return replace(hp, **(stored.architecture() | fitted))


def train(
    trainer: Trainer, evaluator: Evaluator, artifact: Path, checkpoints: Path
) -> tuple[int, Path]:
    """Trains, averages and exports; the exit code so far, and where the artifact lies."""
    hp, log, stop = trainer.hp, trainer.log, trainer.stop
    if hp.resume:
        load_checkpoint(trainer, checkpoints)
    trainer.warm_up(evaluator)
    log.phase("warm_up")
    keeps = hp.on_signal == "checkpoint"
    second = "; a second signal ends it at once"
    exports = f"the run exports and scores what it has{second}"
    stop.advice = f"the run writes a checkpoint and ends{second}" if keeps else exports
    interrupted = trainer.train(evaluator, checkpoints)
    log.phase("training")
    if interrupted and keeps and save_checkpoint(trainer, checkpoints):
        return EXIT_CHECKPOINTED, artifact
    stop.advice = exports
    passes = trainer.average_weights()
    evaluator.run("pre_quant_exact", trainer.model, hp.train_seq_len, passes)
    log.phase("pre_quant_evaluation")
    if trainer.runtime.is_main:
        tensors = trainer.flat.named(trainer.flat.data)
        scored = replace(hp, eval_passes=passes)
        artifact = export(scored, tensors, trainer.squares, artifact, log)
    log.phase("export")
    return EXIT_EXPORTED if interrupted else 0, artifact


def evaluate(hp: Hyperparameters, artifact: Path, evaluator: Evaluator) -> None:
    """Scores a fresh model with the weights of the artifact as it lies on the disk."""
    runtime, log, graphs = evaluator.runtime, evaluator.log, graphs_compiled()
    stored, tensors = runtime.from_main(read_artifact(artifact) if runtime.is_main else None)
    hp = adopt(hp, stored)
    if hp.eval_passes > (stored.eval_passes or stored.max_passes):
        log.event("warning", text=f"scores with {hp.eval_passes} passes, more than the run itself")
    model = build_model(hp, runtime, log)
    model.load_state_dict(tensors)
    losses = evaluator.run_all(model, FlatParameters(model), hp.eval_passes)
    log.event("evaluated", graphs_compiled=graphs_compiled() - graphs)
    log.phase("evaluation")
    if hp.token_losses and runtime.is_main:
        np.save(buffer := io.BytesIO(), losses.cpu().numpy())
        write_or_rescue(Path(hp.token_losses), buffer.getvalue(), log)


def check_same_run(hp: Hyperparameters, data: Data, log: Path, artifact: Path) -> None:
    """Raises UserError unless an exported run is scored with its own seed, model and text."""
    written, stored = log.read_text("utf-8"), read_artifact(artifact)[0].architecture()
    stored["eval_passes"] = hp.eval_passes  # it may be scored with others
    seed = any(f"{key}:{hp.seed} " in written for key in (" seed", "name:seed value"))
    text = f"fingerprint:{data.facts[-1]['fingerprint']}\n" in written
    own = "give what it began with, or choose another run_id"
    require_all(
        (seed, f"resume: seed={hp.seed} is not that of {log}: {own}"),
        (stored == hp.architecture(), f"resume: the model is not that of {artifact}: {own}"),
        (text, f"resume: data_path={hp.data_path} has other validation data than {log}: {own}"),
    )


def run(hp: Hyperparameters, sources: dict[str, str], runtime: Runtime, stop: Interrupts) -> int:
    """Settings -> data -> model -> train, average, export -> load -> evaluate; the exit code."""
    check_paths(hp)
    path, artifact, checkpoints, only_scored = run_files(hp, runtime)
    if hp.evaluate:
        artifact = Path(hp.evaluate)
        hp = adopt(hp, runtime.from_main(read_artifact(artifact)[0] if runtime.is_main else None))
        given = "eval_passes" if sources["eval_passes"] != "default" else ""
        sources |= {name: "artifact" for name in hp.architecture() if name != given}
    hp, data = open_data(hp, runtime)
    if only_scored:
        check_same_run(hp, data, path, artifact)
    log, code = Log(path if runtime.is_main else None, hp.resume), 0
    try:
        log.event("run", run_id=path.stem, started=time.strftime("%Y%m%d_%H%M%S"))
        log_header(hp, sources, runtime, log)
        for facts in data.facts:
            log.event("data", **facts)
        log.phase("start")
        evaluator = Evaluator(hp, data, runtime, log)
        if not (hp.evaluate or only_scored):
            trainer = Trainer(build_model(hp, runtime, log), data, runtime, log, stop)
            code, artifact = train(trainer, evaluator, artifact, checkpoints)
        if code != EXIT_CHECKPOINTED:
            again = f"--evaluate {artifact} --data-path {hp.data_path} and the same settings"
            stop.advice, stop.farewell = "", f": score {artifact} with {again}"
            evaluate(hp, artifact, evaluator)
        return code
    except BaseException as error:
        log.abandon(error)
        raise


def main() -> int:
    """Returns the exit code; see the head of this file."""
    runtime, stop = None, Interrupts()
    stop.install()
    try:
        hp, sources = read_configuration(os.environ, sys.argv[1:])
        runtime = Runtime.start(hp)
        with sdpa_kernel(ATTENTION, set_priority=True):
            code = run(hp, sources, runtime, stop)
        runtime.barrier()  # torchrun ends the others as soon as one leaves with another code than 0
        return code
    except (UserError, FloatingPointError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return EXIT_MISTAKE if isinstance(error, UserError) else EXIT_DIVERGED
    finally:
        if runtime is not None and runtime.world_size > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    code = main()
    with suppress(OSError):  # a full disk
        sys.stdout.flush()
    os._exit(code)  # the usual exit aborts now and then, in threads that gloo leaves (torch 2.13)
