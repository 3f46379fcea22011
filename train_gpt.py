"""Stable Growing Recurrence: a GPT that grows by re-applying its core while it trains.

    stem -> core, core, ... -> tail      1 pass, then 2, then 3 as the run proceeds

Sharing the core buys depth that costs no bytes; residual scaling, error feedback and a Jacobian
proxy loss keep the repetition stable. One run trains for a fixed wall clock, averages and
quantizes the weights to int6, compresses them so that code + model fit 16,000,000 bytes, reloads
the file, and scores the validation text in bits per byte: plain, with sliding windows, and with
score-first test-time training.

    torchrun --standalone --nproc_per_node=8 train_gpt.py        one node of 8 GPUs, 600 s
    python train_gpt.py                                          one process, GPU or CPU
    torchrun --nnodes 2 --nproc_per_node=8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        train_gpt.py                                             two nodes (run it on each)
    python train_gpt.py --evaluate logs/RUN.int6.xz              score an artifact again
    python train_gpt.py --help                                   every setting, its unit and default

Contents (grep -n '^# [0-9]*\\. ' train_gpt.py):
    1. Constants    2. Configuration  3. Runtime and log  4. Data        5. Layers
    6. Recurrence   7. Model          8. Optimization     9. Compression 10. Evaluation
    11. Training    12. Main

Shapes: B batch, T time, D model, H query heads, G kv heads, E head dim, F mlp, V vocabulary,
L unique layers, K passes, N bank rows, R ranks. Every setting is an environment variable
(RESIDUAL_SCALE_INIT) and a flag (--residual-scale-init); the flag wins.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import lzma
import math
import os
import platform
import re
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# --------------------------------------------------------------------------------------------------
# 1. Constants
# --------------------------------------------------------------------------------------------------

# The field's shard format: 256 little-endian int32 header words, then uint16 tokens.
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_WORDS = 20240520, 1, 256

# Quintic iteration whose slope at 0 is as steep as it can be while singular values stay within
# about [0.7, 1.2] (Jordan et al., Muon, 2024). Fast convergence matters here, exactness does not.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

# Clip candidates of GPTQ-lite, as quantiles of a row's |w|; 1.0 (no clipping) is always among them.
CLIP_QUANTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
INT6_LEVELS, INT8_LEVELS = 31, 127
# The export's size knob is an integer n: no row's quantization step is finer than 2^(-n/512).
FLOOR_STEPS_PER_OCTAVE, FINEST_FLOOR_INDEX = 512, 512 * 14
# A quantized weight is nearly incompressible but for its entropy. A dictionary as small as lzma
# allows and no context bits code it best: 4.788 bits a weight at 4.740 bits of entropy, against
# 4.863 for preset 6, in a quarter of the time.
LZMA_FILTERS = [
    {"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 4096, "lc": 0, "lp": 0, "pb": 0}
]
ARTIFACT_MAGIC = b"SGR1"
MAX_MODEL_BYTES = 1 << 30  # an artifact that claims more is refused before anything is allocated
SMALL_TENSOR = 65_536  # elements; up to here a tensor is stored as float16, not quantized

RMS_EPS = 1e-6


class UserError(ValueError):
    """A mistake in what the program was given; the text names the value, the rule, the remedy."""


# --------------------------------------------------------------------------------------------------
# 2. Configuration: every setting once, with its type, bounds, default and help
# --------------------------------------------------------------------------------------------------


def option(
    group: str,
    default: Any,
    text: str,
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field of `Hyperparameters`; bounds `low`, `high` include their value."""
    rule = {"low": low, "high": high, "above": above, "choices": choices}
    return field(default=default, metadata={"group": group, "text": text, **rule})


run_option = partial(option, "run")
data_option = partial(option, "data")
model_option = partial(option, "model")
recurrence_option = partial(option, "recurrence")
optim_option = partial(option, "optimization")
average_option = partial(option, "averaging and quantization-aware training")
eval_option = partial(option, "evaluation")


@dataclass(frozen=True)
class Hyperparameters:
    """The configuration of a run. Fractions (`_frac`) are of the run's progress from 0 to 1."""

    # Run
    run_id: str | None = run_option(None, "name of the log and artifact; none: date, time and seed")
    seed: int = run_option(1337, "seed of the weights and of the data order", low=0)
    output_dir: str = run_option("logs", "folder of the log and the artifact")
    iterations: int | None = run_option(None, "steps after which training ends; none: no limit")
    max_wallclock_seconds: float | None = run_option(
        600.0, "seconds of training after which it ends; none: no limit", above=0
    )
    warmup_steps: int = run_option(20, "steps before the clock starts, then undone", low=0)
    train_log_every: int = run_option(50, "steps between lines of the log", low=1)
    val_loss_every: int | None = run_option(
        None, "steps between validations, the clock stopped; none: only at the end", low=1
    )
    dtype: str = run_option(
        "auto",
        "arithmetic of the model; auto: bfloat16 on a GPU, else float32",
        choices=("auto", "bfloat16", "float32"),
    )
    compile: str = run_option(
        "auto",
        "what torch.compile compiles; auto: regions on a GPU, else off",
        choices=("auto", "off", "regions", "model"),
    )
    attention: str = run_option(
        "auto",
        "attention kernel; auto: the first of fa3, sdpa, plain that runs",
        choices=("auto", "fa3", "sdpa", "plain"),
    )
    # Data
    data_path: str = data_option(
        "./data/datasets/fineweb10B_sp1024", "folder of fineweb_{train,val}_*.bin shards"
    )
    tokenizer_path: str = data_option(
        "./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of the shards"
    )
    train_batch_tokens: int = data_option(786_432, "tokens of a step, all ranks together", low=1)
    micro_batch_tokens: int = data_option(
        98_304, "most tokens that a rank takes through the model at once", low=1
    )
    shuffle: bool = data_option(True, "read windows of all shards in a seeded random order")
    # Model
    vocab_size: int = model_option(1024, "pieces of the tokenizer", low=8, high=65_536)
    train_seq_len: int = model_option(2048, "tokens of a training and evaluation window", low=8)
    num_layers: int = model_option(11, "unique layers", low=1, high=256)
    model_dim: int = model_option(512, "width of the residual stream", low=8, high=16_384)
    num_heads: int = model_option(8, "query heads", low=1, high=256)
    num_kv_heads: int = model_option(4, "key and value heads", low=1, high=256)
    mlp_mult: float = model_option(3.0, "MLP width over model width", above=0, high=64)
    rope_base: float = model_option(10_000.0, "RoPE base at a length of 1,024", above=1)
    rope_dims: int = model_option(16, "dims of each head that RoPE turns", low=0)
    qk_gain_init: float = model_option(1.5, "start of the gain of each query head")
    xsa_last_n: int = model_option(4, "last layers with XSA (never the core's)", low=0)
    bigram_vocab_size: int = model_option(512, "rows of BigramHash; 0: off", low=0, high=1 << 20)
    bigram_dim: int = model_option(32, "width of BigramHash's rows", low=1, high=16_384)
    ve_dim: int = model_option(128, "width of the value embedding table", low=1, high=16_384)
    ve_layers: str = model_option("9,10", "layers with value embeddings; none: off")
    logit_softcap: float = model_option(30.0, "bound of the logits", above=0)
    tied_embed_init_std: float = model_option(0.005, "std of the embedding at the start", above=0)
    # Recurrence
    core_start: int = recurrence_option(4, "first layer of the core", low=0)
    core_end: int = recurrence_option(7, "layer after the core's last", low=1)
    passes_schedule: str = recurrence_option(
        "0.0:1,0.626:2,0.813:3",
        "start:passes,...; a start with a point is a fraction of the run, without one a step",
    )
    num_passes: int | None = recurrence_option(
        None, "train with this fixed number of passes; none: the schedule", low=1, high=64
    )
    eval_passes: int | None = recurrence_option(
        None, "passes in evaluation; none: the schedule's last", low=1, high=64
    )
    residual_scale_init: float = recurrence_option(0.5, "start of each later pass's scale")
    feedback_mode: str = recurrence_option(
        "diagonal",
        "error feedback: d*U(V'h), U(V'h) or off",
        choices=("none", "identity", "diagonal"),
    )
    feedback_rank: int = recurrence_option(2, "columns of U and V", low=1, high=1024)
    per_pass_feedback: bool = recurrence_option(False, "a diagonal d for each pass")
    jacobian_proxy_weight: float = recurrence_option(0.01, "weight of the proxy in the loss", low=0)
    interpass_rmsnorm: bool = recurrence_option(
        False, "rms_norm of h before passes after the first"
    )
    # Optimization
    matrix_lr: float = optim_option(0.025, "Muon's learning rate", low=0)
    tied_embed_lr: float = optim_option(0.035, "AdamW's learning rate of the tables", low=0)
    scalar_lr: float = optim_option(0.025, "AdamW's learning rate of all else", low=0)
    muon_momentum: float = optim_option(0.99, "Muon's momentum", low=0, high=1)
    muon_momentum_warmup_start: float = optim_option(0.92, "Muon's first momentum", low=0, high=1)
    muon_momentum_warmup_frac: float = optim_option(
        0.237, "fraction in which the momentum rises (1,500 of 6,330 steps)", low=0, high=1
    )
    muon_backend_steps: int = optim_option(5, "Newton-Schulz iterations", low=1, high=20)
    muon_wd: float = optim_option(0.04, "decoupled weight decay of the banks", low=0)
    adam_wd: float = optim_option(0.04, "decoupled weight decay of tables and projections", low=0)
    beta1: float = optim_option(0.9, "AdamW's first decay", low=0, high=1)
    beta2: float = optim_option(0.95, "AdamW's second decay", low=0, high=1)
    adam_eps: float = optim_option(1e-8, "AdamW's epsilon", above=0)
    grad_clip_norm: float = optim_option(0.3, "bound of the global gradient's norm", above=0)
    warmdown_frac: float = optim_option(
        0.55, "last fraction, in which the learning rate falls to 0", low=0, high=1
    )
    # Averaging and QAT
    weight_average: str = average_option(
        "ema", "weights that are exported", choices=("none", "ema", "swa", "ema_swa")
    )
    ema_frac: float = average_option(
        0.0526, "EMA's horizon (decay 0.997 in 6,330 steps)", above=0, high=1
    )
    swa_frac: float = average_option(
        0.0079, "fraction between SWA's samples (50 of 6,330 steps)", low=0, high=1
    )
    swa_lr_scale: float = average_option(0.2, "SWA starts below this lr scale", low=0, high=1)
    late_qat_threshold: float = average_option(
        0.15, "fake quantization starts below this lr scale; 0: never", low=0, high=1
    )
    qat_scope: str = average_option("core", "layers under QAT", choices=("core", "all"))
    # Evaluation
    evaluate: str | None = eval_option(None, "score this artifact instead of training")
    artifact_limit_bytes: int = eval_option(
        16_000_000, "most bytes of code and compressed model together", low=1
    )
    eval_stride: int = eval_option(64, "tokens that a sliding window scores", low=1)
    eval_batch_seqs: int = eval_option(64, "windows that a rank scores at once", low=1)
    sliding_eval: bool = eval_option(True, "score with sliding windows")
    ttt_enabled: bool = eval_option(True, "score with score-first test-time training")
    ttt_lr: float = eval_option(0.002, "SGD's learning rate for the first chunk", low=0)
    ttt_momentum: float = eval_option(0.9, "SGD's momentum", low=0, high=1)
    ttt_epochs: int = eval_option(3, "epochs over each chunk once it is scored", low=0)
    ttt_chunk_tokens: int = eval_option(32_768, "tokens of a chunk", low=1)
    ttt_batch_seqs: int = eval_option(32, "most sequences of an SGD step, all ranks", low=1)
    ttt_grad_clip: float = eval_option(1.0, "bound of the gradient's norm", above=0)
    token_losses: str | None = eval_option(
        None, "write the last evaluation's float32 loss of every token to this .npy file"
    )

    def __post_init__(self) -> None:
        errors = [e for f in fields(self) if (e := bound_error(f, getattr(self, f.name)))]
        errors += list(self.rule_errors()) if not errors else []
        if errors:
            raise UserError("\n".join(errors))

    def rule_errors(self) -> Iterator[str]:
        """What no single field can check: a text for each rule that is broken."""

        def check(ok: bool, text: str) -> Iterator[str]:
            if not ok:
                yield text

        n = self.num_layers
        yield from check(
            self.iterations is not None or self.max_wallclock_seconds is not None,
            "iterations and max_wallclock_seconds are both none: set one, or training never ends",
        )
        yield from check(
            self.iterations is None or self.iterations >= 0,
            f"iterations={self.iterations} is negative: give a number of steps, or none",
        )
        yield from check(
            self.train_batch_tokens % self.train_seq_len == 0,
            f"train_batch_tokens={self.train_batch_tokens} is no multiple of train_seq_len="
            f"{self.train_seq_len}: use {max(1, self.batch_seqs) * self.train_seq_len}",
        )
        yield from check(
            self.micro_batch_tokens >= self.train_seq_len,
            f"micro_batch_tokens={self.micro_batch_tokens} holds no window of train_seq_len="
            f"{self.train_seq_len}: raise it",
        )
        yield from check(
            self.core_start < self.core_end <= n,
            f"core_start={self.core_start}, core_end={self.core_end}: the core must be a non-empty "
            f"range inside the {n} layers (0 <= core_start < core_end <= {n})",
        )
        yield from check(
            self.model_dim % self.num_heads == 0 and self.num_heads % self.num_kv_heads == 0,
            f"model_dim={self.model_dim}, num_heads={self.num_heads}, num_kv_heads="
            f"{self.num_kv_heads}: each must be a multiple of the next",
        )
        head_dim = self.model_dim // self.num_heads
        yield from check(
            self.rope_dims % 2 == 0 and self.rope_dims <= head_dim,
            f"rope_dims={self.rope_dims} must be even and at most the head dim {head_dim}",
        )
        yield from check(
            self.bigram_vocab_size != 1,
            "bigram_vocab_size=1 leaves no row for a pair: use 0 (off) or at least 2",
        )
        yield from check(
            self.eval_stride <= self.train_seq_len,
            f"eval_stride={self.eval_stride} exceeds the window train_seq_len={self.train_seq_len} "
            "and would skip tokens: lower it",
        )
        try:
            layers = self.ve_layer_ids
            yield from check(
                len(set(layers)) == len(layers) and all(0 <= i < n for i in layers),
                f"ve_layers={self.ve_layers}: layers must differ and lie in 0..{n - 1}",
            )
        except ValueError:
            yield f"ve_layers={self.ve_layers} is no list of layers: write 9,10 or none"
        try:
            passes = self.max_passes
            yield from check(
                passes > 1 or (self.eval_passes or 1) == 1,
                f"eval_passes={self.eval_passes} needs a second pass in training: {passes} is the "
                "most that the schedule reaches",
            )
        except UserError as error:
            yield str(error)

    @property
    def batch_seqs(self) -> int:
        return self.train_batch_tokens // self.train_seq_len

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def ve_layer_ids(self) -> tuple[int, ...]:
        off = self.ve_layers.strip().lower() in ("", "none")
        return () if off else tuple(int(i) for i in self.ve_layers.split(","))

    @property
    def growth(self) -> tuple[tuple[int | float, int], ...]:
        """The schedule as (start, passes): an int start is a step, a float a fraction."""
        if self.num_passes is not None:
            return ((0, self.num_passes),)
        return parse_passes_schedule(self.passes_schedule)

    @property
    def max_passes(self) -> int:
        return max(passes for _, passes in self.growth)

    @property
    def passes_in_evaluation(self) -> int:
        return self.eval_passes or self.growth[-1][1]

    def architecture(self) -> dict[str, Any]:
        """The settings that an artifact must carry for its weights to mean anything."""
        groups = ("model", "recurrence")
        return {
            f.name: getattr(self, f.name) for f in fields(self) if f.metadata["group"] in groups
        }


def bound_error(f: Any, value: Any) -> str | None:
    """The rule of field `f` that `value` breaks, or None."""
    rule = f.metadata
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return f"{f.name}={value} must be finite"
    if rule["choices"] and value not in rule["choices"]:
        return f"{f.name}={value} must be one of {', '.join(rule['choices'])}"
    if rule["low"] is not None and value < rule["low"]:
        return f"{f.name}={value} must be at least {rule['low']}"
    if rule["above"] is not None and value <= rule["above"]:
        return f"{f.name}={value} must be above {rule['above']}"
    if rule["high"] is not None and value > rule["high"]:
        return f"{f.name}={value} must be at most {rule['high']}"
    return None


def parse_passes_schedule(text: str) -> tuple[tuple[int | float, int], ...]:
    """`0.0:1,0.626:2` -> ((0.0, 1), (0.626, 2)). Starts are all steps or all fractions."""
    remedy = "write start:passes,... such as 0.0:1,0.626:2,0.813:3 or 0:1,4500:2"
    try:
        pairs = [item.split(":") for item in text.split(",")]
        entries = tuple((float(s) if "." in s else int(s), int(p)) for s, p in pairs)
    except ValueError:
        raise UserError(f"passes_schedule={text} is malformed: {remedy}") from None
    starts = [start for start, _ in entries]
    if starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
        raise UserError(f"passes_schedule={text}: starts must begin at 0 and rise: {remedy}")
    if len({type(s) for s in starts if s}) > 1 or any(
        isinstance(s, float) and s >= 1 for s in starts
    ):
        raise UserError(f"passes_schedule={text}: starts are all steps or all below 1.0: {remedy}")
    if any(not 1 <= passes <= 64 for _, passes in entries):
        raise UserError(f"passes_schedule={text}: passes must lie in 1..64: {remedy}")
    return entries


def parse_value(kind: str, text: str) -> Any:
    """The text of a flag or variable as the annotated type. Raises ValueError."""
    base = kind.removesuffix(" | None")
    if base != kind and text.strip().lower() in ("", "none"):
        return None
    if base == "bool":
        known = {"1": True, "true": True, "0": False, "false": False}
        if text.strip().lower() not in known:
            raise ValueError("not a boolean: use 0, 1, false or true")
        return known[text.strip().lower()]
    if base in ("int", "float"):
        try:
            return {"int": int, "float": float}[base](text)
        except ValueError:
            article = {"int": "an integer", "float": "a number"}[base]
            raise ValueError(f"not {article}") from None
    return text


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def build_parser() -> argparse.ArgumentParser:
    summary, launches = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="train_gpt.py",
        description=summary,
        epilog=launches,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups: dict[str, Any] = {}
    for f in fields(Hyperparameters):
        rule, kind = f.metadata, str(f.type)
        group = groups.setdefault(rule["group"], parser.add_argument_group(rule["group"]))
        text = f"{rule['text']} [{f.name.upper()}={f.default}]".replace("%", "%%")
        if kind == "bool":
            action = argparse.BooleanOptionalAction
            group.add_argument(flag_name(f.name), action=action, help=text)
        else:
            choices = "{" + ",".join(rule["choices"]) + "}" if rule["choices"] else ""
            metavar = choices or kind.removesuffix(" | None").upper()
            group.add_argument(flag_name(f.name), metavar=metavar, help=text)
    return parser


def read_configuration(
    env: Mapping[str, str], argv: Sequence[str]
) -> tuple[Hyperparameters, dict[str, str]]:
    """Settings from defaults, then `env`, then `argv`; and where each came from.

    Raises UserError with every mistake at once.
    """
    known, unknown = build_parser().parse_known_args(argv)
    flags = vars(known)
    values, sources, errors = {}, {}, [f"unknown argument {a}: see --help" for a in unknown]
    for f in fields(Hyperparameters):
        sources[f.name] = (
            "flag" if f.name in flags else "env" if f.name.upper() in env else "default"
        )
        if sources[f.name] == "default":
            continue
        raw = flags[f.name] if sources[f.name] == "flag" else env[f.name.upper()]
        try:
            values[f.name] = raw if isinstance(raw, bool) else parse_value(str(f.type), raw)
        except ValueError as error:
            errors.append(f"{f.name}={raw} ({sources[f.name]}) is {error}")
    try:
        hp = Hyperparameters(**values)
    except UserError as error:
        errors.append(str(error))
    if errors:
        raise UserError("\n".join(errors))
    return hp, sources


# --------------------------------------------------------------------------------------------------
# 3. Runtime and log: which process this is, what it computes on, and the one writer of the log
# --------------------------------------------------------------------------------------------------


@dataclass
class Runtime:
    """One process of the job. Collectives are no-ops when it is alone."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def start(cls, hp: Hyperparameters) -> Runtime:
        """Joins the process group that torchrun describes; alone without torchrun."""
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = torch.device("cpu")
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if device.index >= torch.cuda.device_count():
                raise UserError(
                    f"LOCAL_RANK={device.index} has no GPU: {torch.cuda.device_count()} are visible; "
                    "lower --nproc_per_node"
                )
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        if "RANK" in os.environ and world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, device_id=device if device.type == "cuda" else None)
        auto = torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype = auto if hp.dtype == "auto" else getattr(torch, hp.dtype)
        return cls(rank, world_size, device, dtype)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_(self, x: Tensor) -> Tensor:
        """Sums `x` over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(x)
        return x

    def barrier(self) -> None:
        if self.world_size > 1:
            self.sum_(torch.zeros(1, device=self.device)).item()

    def from_main(self, value: Any) -> Any:
        """Rank 0's value (anything small), on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def share(self, count: int) -> range:
        """This rank's contiguous part of range(count); parts differ by at most one."""
        return range(
            self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size
        )

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def log_text(value: Any) -> str:
    """A value as the log's grammar allows: no white space; sequences joined by commas."""
    if isinstance(value, (tuple, list)):
        return ",".join(log_text(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return quote(str(value), safe="!\"#$&'()*+,-./:;<=>?@[]^_`{|}~") or "none"


class Log:
    """Writes lines `event key:value key:value`; white space in a value is percent-encoded."""

    def __init__(self, path: Path | None) -> None:
        self.started = time.perf_counter()
        self.file = None
        self.bar = False
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("x", encoding="utf-8")
        except FileExistsError:
            raise UserError(
                f"run_id: the log {path} exists and is never overwritten: choose another run_id"
            ) from None
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write {path} ({error.strerror}): choose another output_dir"
            ) from None

    def event(self, name: str = "", /, **pairs: Any) -> None:
        """One line; `name` is empty for the lines of single steps, as is the field's custom."""
        if self.file is None:
            return
        words = [name] if name else []
        line = " ".join(words + [f"{key}:{log_text(value)}" for key, value in pairs.items()])
        self.clear_bar()
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()

    def progress(self, fraction: float, what: str) -> None:
        """A bar on a terminal; nothing elsewhere, where the lines of the log show progress."""
        if self.file is None or not sys.stdout.isatty():
            return
        filled = round(30 * min(fraction, 1.0))
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r[{bar}] {fraction:4.0%} {what}\033[K", end="", flush=True)
        self.bar = True

    def clear_bar(self) -> None:
        if self.bar:
            print("\r\033[K", end="")
            self.bar = False

    def phase(self, name: str, since: float) -> float:
        """Logs the seconds of a phase that began at `since`; returns now."""
        now = time.perf_counter()
        self.event("phase", name=name, seconds=f"{now - since:.3f}")
        return now


# --------------------------------------------------------------------------------------------------
# 4. Data: shards on disk -> the same global batches for every world size
# --------------------------------------------------------------------------------------------------


def find_data_shards(data_path: Path, split: str) -> list[Path]:
    """The shards of split `train` or `val`, in order. Raises UserError if there are none."""
    paths = sorted(data_path.glob(f"fineweb_{split}_*.bin"))
    if not paths:
        raise UserError(
            f"data_path={data_path} holds no fineweb_{split}_*.bin: download the data with "
            "data/download_fineweb.py, make it with data/prepare_text.py, or set DATA_PATH"
        )
    return paths


def open_data_shard(path: Path) -> np.ndarray:
    """The tokens of a shard as a read-only memory map of uint16. Raises UserError."""
    remedy = "download or prepare it again"
    if not path.is_file():
        raise UserError(f"data shard {path} is missing: {remedy}")
    size, header_bytes = path.stat().st_size, 4 * SHARD_HEADER_WORDS
    if size < header_bytes:
        raise UserError(f"data shard {path} has {size} bytes, less than its header: {remedy}")
    header = np.fromfile(path, dtype="<i4", count=SHARD_HEADER_WORDS)
    if (header[0], header[1]) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(
            f"data shard {path} starts with {header[0]}, {header[1]} instead of magic "
            f"{SHARD_MAGIC} and version {SHARD_VERSION}: it is no token shard; {remedy}"
        )
    count = int(header[2])
    if size != header_bytes + 2 * count:
        raise UserError(
            f"data shard {path}: its header counts {count} tokens, its {size} bytes hold "
            f"{(size - header_bytes) / 2:g}: {remedy}"
        )
    if count == 0:
        raise UserError(f"data shard {path} holds no tokens: {remedy}")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))


def data_fingerprint(paths: Sequence[Path]) -> str:
    """A hash of every shard's name, header and 4,096 tokens at each end: 16 hex digits."""
    digest = hashlib.sha256()
    for path in paths:
        tokens = open_data_shard(path)
        digest.update(f"{path.name}:{len(tokens)}:".encode())
        digest.update(tokens[:4096].tobytes() + tokens[-4096:].tobytes())
    return digest.hexdigest()[:16]


def check_token_ids(paths: Sequence[Path], vocab_size: int) -> None:
    """Raises UserError if a token of a shard is no piece of the vocabulary."""
    for path in paths:
        largest = int(open_data_shard(path).max())
        if largest >= vocab_size:
            raise UserError(
                f"data shard {path} holds token {largest}, outside the vocabulary of "
                f"vocab_size={vocab_size}: use the tokenizer that it was made with"
            )


def load_tokenizer(path: Path, vocab_size: int) -> spm.SentencePieceProcessor:
    """The SentencePiece model at `path`. Raises UserError unless it has `vocab_size` pieces."""
    if not path.is_file():
        raise UserError(
            f"tokenizer_path={path} is missing: set TOKENIZER_PATH to the shards' model"
        )
    tokenizer = spm.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(path.read_bytes())
    except (RuntimeError, OSError):
        raise UserError(f"tokenizer_path={path} is no SentencePiece model") from None
    if tokenizer.vocab_size() != vocab_size:
        raise UserError(
            f"tokenizer_path={path} has {tokenizer.vocab_size()} pieces, the model vocab_size="
            f"{vocab_size}: set VOCAB_SIZE={tokenizer.vocab_size()} or use another tokenizer"
        )
    if tokenizer.IsUnknown(tokenizer.PieceToId("▁")):
        raise UserError(
            f"tokenizer_path={path} has no piece for the space, so bytes are miscounted"
        )
    return tokenizer


class TokenBytes:
    """The bytes of text that each target token stands for: what val_bpb divides by.

    A byte-fallback piece is 1 byte; another piece its UTF-8 length without a leading `▁`, plus 1
    for that `▁` unless the token before it is a boundary (control, unknown or unused); a
    boundary token is 0 bytes.
    """

    def __init__(self, tokenizer: spm.SentencePieceProcessor, device: torch.device) -> None:
        length, space, boundary = [], [], []
        for i in range(tokenizer.vocab_size()):
            piece = tokenizer.IdToPiece(i)
            is_boundary = tokenizer.IsControl(i) or tokenizer.IsUnknown(i) or tokenizer.IsUnused(i)
            is_byte = tokenizer.IsByte(i)
            has_space = piece.startswith("▁") and not (is_boundary or is_byte)
            text_bytes = 1 if is_byte else len(piece.removeprefix("▁").encode())
            length.append(0 if is_boundary else text_bytes)
            space.append(has_space)
            boundary.append(is_boundary)
        self.length = torch.tensor(length, dtype=torch.int32, device=device)
        self.space = torch.tensor(space, dtype=torch.int32, device=device)
        self.inner = 1 - torch.tensor(boundary, dtype=torch.int32, device=device)

    def of(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes of each `target` that follows `previous` (any equal shapes), int32."""
        return self.length[target] + self.space[target] * self.inner[previous]


def check_token_bytes(tokenizer: Any, table: TokenBytes, tokens: np.ndarray) -> int:
    """The bytes of a prefix of `tokens`. Raises UserError if the table and its text disagree.

    Decoding is the independent reference: it knows nothing of the table. The space that opens a
    document (its first `▁`) is not counted, as in the table.
    """
    prefix = tokens[:200_000].astype(np.int64)
    while len(prefix) > 1 and tokenizer.IsByte(int(prefix[-1])):
        prefix = prefix[:-1]  # a character cut in two would decode to U+FFFD
    boundaries = [i for i, t in enumerate(prefix.tolist()) if not table.inner[t]]
    decoded = 0
    for start, end in zip([-1, *boundaries], [*boundaries, len(prefix)], strict=True):
        ids = prefix[start + 1 : end].tolist()
        text = tokenizer.Decode(ids)
        opens = start >= 0 and ids and tokenizer.IdToPiece(ids[0]).startswith("▁")
        decoded += len((text.removeprefix(" ") if opens else text).encode())
    ids = torch.from_numpy(prefix).to(table.length.device)
    first = len(tokenizer.Decode(prefix[:1].tolist()).encode())
    counted = first + int(table.of(ids[:-1], ids[1:]).sum())
    if counted != decoded:
        raise UserError(
            f"the tokenizer's pieces count {counted} bytes for a text of {decoded}: val_bpb would "
            "be wrong; use a SentencePiece model with byte fallback and a piece for the space"
        )
    return counted


class BatchLoader:
    """Windows of T+1 tokens in a global order that depends on the seed and nothing else.

    The order of an epoch is a permutation of the windows of all shards; each epoch cuts the
    shards at another phase, so that a repeated text is at least cut elsewhere. Step s takes the
    next `batch_seqs` windows of the order and a rank its share of them, so every world size
    trains on the same global batches, and no window repeats before all were used.
    """

    def __init__(self, shards: Sequence[np.ndarray], hp: Hyperparameters, runtime: Runtime) -> None:
        self.shards, self.runtime = shards, runtime
        self.seq_len, self.seed, self.shuffle = hp.train_seq_len, hp.seed, hp.shuffle
        self.batch_seqs, self.share = hp.batch_seqs, runtime.share(hp.batch_seqs)
        windows = [max(0, (len(tokens) - self.seq_len) // self.seq_len) for tokens in shards]
        self.first_window = np.cumsum([0, *windows])
        self.epoch_windows = int(self.first_window[-1])
        if self.epoch_windows == 0:
            raise UserError(
                f"data_path: no training shard holds two windows of train_seq_len={self.seq_len} "
                "tokens: prepare more text or lower train_seq_len"
            )
        self.epoch = -1
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self.pending: dict[int, Future[Tensor]] = {}

    def start_epoch(self, epoch: int) -> None:
        rng = np.random.default_rng([self.seed, epoch])
        self.epoch, self.phase, self.order = epoch, 0, np.arange(self.epoch_windows)
        if self.shuffle:
            self.phase = int(rng.integers(self.seq_len))
            rng.shuffle(self.order)

    def window(self, index: int) -> np.ndarray:
        """The T+1 tokens of the window at `index` of the endless global order."""
        epoch, place = divmod(index, self.epoch_windows)
        if epoch != self.epoch:
            self.start_epoch(epoch)
        number = int(self.order[place])
        shard = bisect.bisect_right(self.first_window, number) - 1
        start = self.phase + (number - int(self.first_window[shard])) * self.seq_len
        return self.shards[shard][start : start + self.seq_len + 1]

    def gather(self, step: int) -> Tensor:
        shape = (len(self.share), self.seq_len + 1)
        batch = torch.empty(shape, dtype=torch.int32, pin_memory=self.runtime.device.type == "cuda")
        rows = batch.numpy()
        for row, i in enumerate(self.share):
            rows[row] = self.window(step * self.batch_seqs + i)
        return batch

    def batch(self, step: int) -> Tensor:
        """This rank's windows of `step`, (B, T+1) int32, copied to the device asynchronously."""
        for ahead in (step, step + 1, step + 2):
            if ahead not in self.pending:
                self.pending[ahead] = self.pool.submit(self.gather, ahead)
        return self.pending.pop(step).result().to(self.runtime.device, non_blocking=True)


# --------------------------------------------------------------------------------------------------
# 5. Layers: pure functions of tensors, so that one compiled block serves every layer and pass
# --------------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    """The weights of one unique layer, matrices in the compute dtype."""

    q: Tensor  # (D, D)
    k: Tensor  # (G*E, D)
    v: Tensor  # (G*E, D)
    out: Tensor  # (D, D)
    mlp_up: Tensor  # (F, D)
    mlp_down: Tensor  # (D, F)
    ln_scale: Tensor  # (), 1/sqrt(i+1)
    attn_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    resid_mix: Tensor  # (2, D)
    q_gain: Tensor  # (H,)


class Options(NamedTuple):
    """What differs between layers beside their weights; each combination is one graph."""

    num_heads: int
    num_kv_heads: int
    xsa: bool
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]


def rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),), eps=RMS_EPS)


def rotary_table(hp: Hyperparameters) -> tuple[Tensor, Tensor]:
    """cos and sin (T, rope_dims/2) for every position; NTK-scaled base beyond a length of 1,024."""
    length, dims = hp.train_seq_len, hp.rope_dims
    stretch = max(1.0, length / 1024) ** (dims / (dims - 2)) if dims > 2 else 1.0
    inverse = (hp.rope_base * stretch) ** -(torch.arange(0, dims, 2).float() / max(dims, 1))
    angles = torch.outer(torch.arange(length).float(), inverse)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the first dims of each head of x (B, T, H, E) by its position (half-split pairs)."""
    cos, sin = (t[None, : x.size(1), None].to(x.dtype) for t in rope)  # (1, T, 1, dims/2)
    half = cos.size(-1)
    a, b, rest = x.split([half, half, x.size(-1) - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def exclude_self(y: Tensor, v: Tensor) -> Tensor:
    """XSA: removes from each head's output y (B, T, H, E) its part along its own v (B, T, G, E)."""
    y = y.unflatten(2, (v.size(2), -1))  # (B, T, G, H/G, E)
    v = F.normalize(v, dim=-1).unsqueeze(3)
    return (y - (y * v).sum(-1, keepdim=True) * v).flatten(2, 3)


def attention(
    x: Tensor, layer: Layer, rope: tuple[Tensor, Tensor], value: Tensor | None, options: Options
) -> Tensor:
    """Causal grouped-query attention, (B, T, D) -> (B, T, D); `value` (B, T, G*E) joins v."""
    groups, width = options.num_kv_heads, layer.v.size(0)
    qkv = F.linear(x, torch.cat([layer.q, layer.k, layer.v]))
    q, k, v = qkv.split([layer.q.size(0), width, width], dim=-1)
    v = (v if value is None else v + value).unflatten(-1, (groups, -1))  # (B, T, G, E)
    q, k = q.unflatten(-1, (options.num_heads, -1)), k.unflatten(-1, (groups, -1))
    q, k = rotate(rms_norm(q), rope), rotate(rms_norm(k), rope)
    y = options.attend(q * layer.q_gain[:, None].to(q.dtype), k, v)  # (B, T, H, E)
    if options.xsa:
        y = exclude_self(y, v)
    return F.linear(y.flatten(2), layer.out)


def mlp(x: Tensor, layer: Layer) -> Tensor:
    return F.linear(F.leaky_relu(F.linear(x, layer.mlp_up), 0.5).square(), layer.mlp_down)


def block(
    x: Tensor,
    x0: Tensor,
    layer: Layer,
    rope: tuple[Tensor, Tensor],
    value: Tensor | None,
    skip: tuple[Tensor, Tensor] | None,
    options: Options,
) -> Tensor:
    """One layer. x, x0 (B, T, D): the stream and the embedding that it started from.

    skip: a stem layer's output (B, T, D) and its weight (D,), added first (tail only).
    """
    mix, attn_scale, mlp_scale = (
        t.to(x.dtype) for t in (layer.resid_mix, layer.attn_scale, layer.mlp_scale)
    )
    if skip is not None:
        x = x + skip[1].to(x.dtype) * skip[0]
    x = mix[0] * x + mix[1] * x0
    normed = rms_norm(x) * layer.ln_scale
    x = x + attn_scale * attention(normed, layer, rope, value, options)
    return x + mlp_scale * mlp(rms_norm(x) * layer.ln_scale, layer)


def embed(
    ids: Tensor, table: Tensor, smear_gate: Tensor, bigram: tuple[Tensor, ...], dtype: torch.dtype
) -> Tensor:
    """ids (B, T) -> x0 (B, T, D): token and bigram embeddings, normed, then smeared."""
    x = F.embedding(ids, table.to(dtype))
    if bigram:
        rows, projection, scale = (t.to(dtype) for t in bigram)
        x = x + scale * F.linear(F.embedding(bigram_rows(ids, len(rows)), rows), projection)
    x = rms_norm(x)
    gate = smear_gate.sigmoid().to(dtype)
    return (1 - gate) * x + gate * F.pad(x, (0, 0, 1, 0))[:, :-1]


def bigram_rows(ids: Tensor, num_rows: int) -> Tensor:
    """BigramHash's row of each position of ids (B, T) int32; the last row is for position 0."""
    ids = ids.int()
    rows = torch.bitwise_xor(36313 * ids[:, 1:], 27191 * ids[:, :-1]) % (num_rows - 1)
    return F.pad(rows, (1, 0), value=num_rows - 1)


def token_losses(x: Tensor, targets: Tensor, table: Tensor, softcap: float) -> Tensor:
    """Cross-entropy in nats of each target: x (B, T, D), targets (B, T) -> (B, T) float32."""
    logits = F.linear(rms_norm(x), table.to(x.dtype)).float()
    logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), reduction="none")
    return losses.view_as(targets)


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reference: the whole (T, T) matrix, in float32. q (B, T, H, E), k and v (B, T, G, E)."""
    shared = q.size(2) // k.size(2)
    k, v = (t.float().repeat_interleave(shared, dim=2) for t in (k, v))
    scores = torch.einsum("bthe,bshe->bhts", q.float(), k) / math.sqrt(q.size(-1))
    future = torch.ones(q.size(1), q.size(1), dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v).to(q.dtype)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if q.device.type == "cpu":  # the CPU's kernel is slower with grouped heads than with copies
        k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, E)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)


def fa3_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    y = flash_attn_func(q, k, v, causal=True)
    return y[0] if isinstance(y, tuple) else y


def choose_attention(hp: Hyperparameters, runtime: Runtime) -> tuple[str, Callable[..., Tensor]]:
    """The first kernel that runs forward and backward here, and what the log calls it."""

    def runs(attend: Callable[..., Tensor]) -> bool:
        head_dim = hp.model_dim // hp.num_heads
        q, k, v = (
            torch.randn(1, 256, heads, head_dim, device=runtime.device, dtype=runtime.dtype)
            for heads in (hp.num_heads, hp.num_kv_heads, hp.num_kv_heads)
        )
        try:
            attend(q.requires_grad_(), k, v).sum().backward()
        except (ImportError, RuntimeError, NotImplementedError):
            return False
        return True

    def prefer_cudnn(enabled: bool) -> None:
        torch.backends.cuda.enable_flash_sdp(not enabled)
        torch.backends.cuda.enable_mem_efficient_sdp(not enabled)
        torch.backends.cuda.enable_math_sdp(not enabled)
        torch.backends.cuda.enable_cudnn_sdp(enabled)

    wanted = ("fa3", "sdpa", "plain") if hp.attention == "auto" else (hp.attention,)
    if "fa3" in wanted and runs(fa3_attention):
        return "fa3", fa3_attention
    if "sdpa" in wanted and runtime.device.type == "cuda":
        # cuDNN: 2.23 ms forward + backward at 48x2048, 8/4 heads of 64 on an H100; FlashAttention 2,
        # PyTorch's own first choice: 3.64 ms.
        prefer_cudnn(True)
        if runs(sdpa_attention):
            return "sdpa_cudnn", sdpa_attention
        prefer_cudnn(False)
    if "sdpa" in wanted and runs(sdpa_attention):
        return "sdpa", sdpa_attention
    if "plain" in wanted:
        return "plain", plain_attention
    raise UserError(f"attention={hp.attention} does not run here: use auto")


# --------------------------------------------------------------------------------------------------
# 6. Recurrence: the core applied K times, and what keeps that stable
# --------------------------------------------------------------------------------------------------


class Stability(NamedTuple):
    """How the passes behaved on one batch; norms of each sequence, over (T, D), in float32."""

    jacobian_proxy: Tensor  # (B,), the only one with a gradient
    growth: Tensor  # (K,) mean of |h_{k+1}| / |h_k|
    update: Tensor  # (K,) mean of |h_{k+1} - h_k| / |h_k|
    feedback: Tensor  # (K,) mean of |c_k| / |h_k|


def sequence_norm(x: Tensor) -> Tensor:
    # (B, T, D) -> (B,); vector_norm's gradient at 0 is 0, where a square root's is infinite
    return torch.linalg.vector_norm(x, dim=(1, 2), dtype=torch.float32)


class Recurrence(nn.Module):
    """h_{k+1} = h_k + a_k F(h_k + c_k),  F(z) = core(z) - z,  c_k = d * (U V'h_k).

    Pass 0 is the plain core: a_0 = 1 and c_0 = 0, so that a model trained with one pass grows
    without a jump. The proxy J = sum_k relu(|h_{k+1} - h_k| / |h_k| - 1)^2 is taken of each
    sequence and averaged (not of the whole batch), so that it does not depend on how the batch
    is cut into ranks and micro-batches.
    """

    def __init__(self, hp: Hyperparameters) -> None:
        super().__init__()
        later = hp.max_passes - 1  # passes that have a scale; pass k uses entry k-1
        self.mode, self.interpass_rmsnorm = hp.feedback_mode, hp.interpass_rmsnorm
        self.residual_scale = nn.Parameter(torch.full((later,), hp.residual_scale_init))
        if self.mode == "none" or later == 0:
            self.mode = "none"
            return
        # Exactly one factor starts at zero: the correction is 0, U's gradient is not. (With all
        # three at zero every gradient is zero for ever: the branch would never learn.)
        self.U = nn.Parameter(torch.zeros(hp.model_dim, hp.feedback_rank))
        self.V = nn.Parameter(torch.randn_like(self.U) / math.sqrt(hp.model_dim))
        if self.mode == "diagonal":
            rows = later if hp.per_pass_feedback else 1
            self.d = nn.Parameter(torch.ones(rows, hp.model_dim))

    def correction(self, h: Tensor, pass_idx: int) -> Tensor | None:
        """c_k (B, T, D); None stands for 0."""
        if pass_idx == 0 or self.mode == "none":
            return None
        U, V = self.U.to(h.dtype), self.V.to(h.dtype)
        c = (h @ V) @ U.T
        if self.mode == "identity":
            return c
        return self.d[min(pass_idx, len(self.d)) - 1].to(h.dtype) * c

    def forward(
        self, h: Tensor, core: Callable[[Tensor], Tensor], num_passes: int
    ) -> tuple[Tensor, Stability]:
        proxy = torch.zeros(len(h), device=h.device)
        records = []
        for k in range(num_passes):
            if k > 0 and self.interpass_rmsnorm:
                h = rms_norm(h)
            c = self.correction(h, k)
            z = h if c is None else h + c
            if k == 0:
                h_next = core(z)
            else:
                # A pass beyond those of training uses the last scale that was trained.
                scale = self.residual_scale[min(k, len(self.residual_scale)) - 1].to(h.dtype)
                h_next = h + scale * (core(z) - z)
            proxy, record = measure_pass(proxy, h, h_next, c)
            records.append(record)
            h = h_next
        return h, Stability(proxy, *torch.stack(records).unbind(1))


def measure_pass(
    proxy: Tensor, h: Tensor, h_next: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Adds a pass's term to the proxy (B,); returns growth, update and feedback ratios (3,)."""
    size = sequence_norm(h) + 1e-6
    update = sequence_norm(h_next - h) / size
    feedback = torch.zeros_like(size) if c is None else sequence_norm(c) / size
    record = torch.stack([sequence_norm(h_next) / size, update, feedback]).mean(1).detach()
    return proxy + F.relu(update - 1).square(), record


# --------------------------------------------------------------------------------------------------
# 7. Model: banks of matrices, stem -> core x passes -> tail, tied head
# --------------------------------------------------------------------------------------------------

BANKS = ("mlp_up_bank", "mlp_down_bank", "qo_bank", "kv_bank")  # largest first
TABLES = ("tok_emb", "bigram_table", "ve_table")
PROJECTIONS = ("bigram_proj", "ve_proj")


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


class GPT(nn.Module):
    """The model; parameters are float32, `dtype` is what it computes in."""

    def __init__(
        self,
        hp: Hyperparameters,
        dtype: torch.dtype = torch.float32,
        attend: Callable[..., Tensor] = plain_attention,
        compile_regions: bool = False,
    ) -> None:
        super().__init__()
        self.hp, self.dtype = hp, dtype
        self.region = compiled if compile_regions else lambda function: function
        self.options = Options(hp.num_heads, hp.num_kv_heads, False, attend)
        L, D, width = hp.num_layers, hp.model_dim, hp.model_dim // hp.num_heads * hp.num_kv_heads
        parameter = lambda *shape: nn.Parameter(torch.empty(shape))  # noqa: E731
        self.qo_bank, self.kv_bank = parameter(2 * L, D, D), parameter(2 * L, width, D)
        self.mlp_up_bank = parameter(L, hp.mlp_dim, D)
        self.mlp_down_bank = parameter(L, D, hp.mlp_dim)
        self.tok_emb = parameter(hp.vocab_size, D)
        self.smear_gate = parameter(D)
        self.attn_scale, self.mlp_scale = parameter(L, D), parameter(L, D)
        self.resid_mix, self.q_gain = parameter(L, 2, D), parameter(L, hp.num_heads)
        self.skip_weight = parameter(min(hp.core_start, L - hp.core_end), D)
        if hp.bigram_vocab_size:
            self.bigram_table = parameter(hp.bigram_vocab_size, hp.bigram_dim)
            self.bigram_proj = parameter(D, hp.bigram_dim)
            self.bigram_scale = parameter()
        if hp.ve_layer_ids:
            self.ve_table = parameter(hp.vocab_size, hp.ve_dim)
            self.ve_proj = parameter(width, hp.ve_dim)
            self.ve_scale = parameter()
            self.ve_layer_scale = parameter(len(hp.ve_layer_ids))
        self.recurrence = Recurrence(hp)
        cos, sin = rotary_table(hp)
        self.register_buffer("rope_cos", cos, persistent=False)
        self.register_buffer("rope_sin", sin, persistent=False)
        ln_scale = torch.arange(1, L + 1).float().rsqrt()
        self.register_buffer("ln_scale", ln_scale, persistent=False)
        self.initialize()

    @torch.no_grad()
    def initialize(self) -> None:
        """Orthogonal inputs, zero outputs: every block starts as the identity."""
        L = self.hp.num_layers
        for matrix in (*self.qo_bank[:L], *self.kv_bank, *self.mlp_up_bank):
            nn.init.orthogonal_(matrix)
        self.qo_bank[L:].zero_()
        self.mlp_down_bank.zero_()
        nn.init.normal_(self.tok_emb, std=self.hp.tied_embed_init_std)
        self.smear_gate.zero_()
        for ones in (self.attn_scale, self.mlp_scale, self.skip_weight):
            ones.fill_(1.0)
        self.resid_mix[:, 0], self.resid_mix[:, 1] = 1.0, 0.0
        self.q_gain.fill_(self.hp.qk_gain_init)
        if self.hp.bigram_vocab_size:
            # One factor at zero, not both: the rows of pairs that were never seen stay silent.
            self.bigram_table.zero_()
            nn.init.normal_(self.bigram_proj, std=self.hp.bigram_dim**-0.5)
            self.bigram_scale.fill_(0.05)
        if self.hp.ve_layer_ids:
            nn.init.normal_(self.ve_table, std=0.01)
            self.ve_proj.zero_()
            self.ve_scale.fill_(0.1)
            self.ve_layer_scale.fill_(1.0)

    def layers(self, qat_floor: Tensor | None) -> list[Layer]:
        """The weights of each unique layer; with `qat_floor`, fake-quantized in QAT's scope."""
        hp, L = self.hp, self.hp.num_layers
        quantized = range(0)
        if qat_floor is not None:
            quantized = range(hp.core_start, hp.core_end) if hp.qat_scope == "core" else range(L)
        fake = partial(self.region(fake_quantize), floor=qat_floor)
        # unbind, not indexing: its backward is one stack, not a full-size zero for every layer.
        cast_first = [bank if quantized else bank.to(self.dtype) for bank in self.banks()]
        qo, kv, up, down = (bank.unbind() for bank in cast_first)
        vectors = (self.ln_scale, self.attn_scale, self.mlp_scale, self.resid_mix, self.q_gain)
        layers = []
        for i, row in enumerate(zip(*(t.unbind() for t in vectors), strict=True)):
            matrices = (qo[i], kv[i], kv[L + i], qo[L + i], up[i], down[i])
            if i in quantized:
                matrices = tuple(fake(w) for w in matrices)
            layers.append(Layer(*(w.to(self.dtype) for w in matrices), *row))
        return layers

    def banks(self) -> tuple[Tensor, ...]:
        return self.qo_bank, self.kv_bank, self.mlp_up_bank, self.mlp_down_bank

    def value_embeddings(self, ids: Tensor) -> dict[int, Tensor]:
        """For each layer that has one, what is added to v: (B, T, G*E)."""
        hp = self.hp
        if not hp.ve_layer_ids:
            return {}
        table, projection = self.ve_table.to(self.dtype), self.ve_proj.to(self.dtype)
        value = self.ve_scale.to(self.dtype) * F.linear(F.embedding(ids, table), projection)
        scales = self.ve_layer_scale.to(self.dtype).unbind()
        return {i: scale * value for i, scale in zip(hp.ve_layer_ids, scales, strict=True)}

    def forward(
        self,
        ids: Tensor,
        targets: Tensor,
        num_passes: int,
        qat_floor: Tensor | None = None,
        score_last: int | None = None,
    ) -> tuple[Tensor, Stability]:
        """ids, targets (B, T) -> the losses in nats (B, T) float32, and how the passes behaved.

        score_last: score only so many last positions -> (B, score_last).
        """
        hp, L = self.hp, self.hp.num_layers
        bigram = ()
        if hp.bigram_vocab_size:
            bigram = (self.bigram_table, self.bigram_proj, self.bigram_scale)
        layers, values = self.layers(qat_floor), self.value_embeddings(ids)
        x0 = self.region(embed)(ids, self.tok_emb, self.smear_gate, bigram, self.dtype)

        def apply(i: int, x: Tensor, skip: tuple[Tensor, Tensor] | None = None) -> Tensor:
            in_core = hp.core_start <= i < hp.core_end
            options = self.options._replace(xsa=i >= L - hp.xsa_last_n and not in_core)
            rope = (self.rope_cos, self.rope_sin)
            return self.region(block)(x, x0, layers[i], rope, values.get(i), skip, options)

        def core(x: Tensor) -> Tensor:
            for i in range(hp.core_start, hp.core_end):
                x = apply(i, x)
            return x

        x, skips = x0, []
        for i in range(hp.core_start):
            x = apply(i, x)
            skips.append(x)
        x, stability = self.recurrence(x, core, num_passes)
        weights = self.skip_weight.unbind()
        for j, i in enumerate(range(hp.core_end, L)):
            x = apply(i, x, (skips.pop(), weights[j]) if j < len(weights) else None)
        last = slice(-(score_last or ids.size(1)), None)
        head = self.region(token_losses)
        losses = head(x[:, last], targets[:, last], self.tok_emb, hp.logit_softcap)
        return losses, stability


def parameter_group(name: str) -> str:
    """How a parameter is optimized: muon, or one of AdamW's groups table, projection, scalar."""
    leaf = name.rsplit(".", 1)[-1]
    known = {"muon": BANKS, "table": TABLES, "projection": PROJECTIONS}
    return next((group for group, names in known.items() if leaf in names), "scalar")


# --------------------------------------------------------------------------------------------------
# 8. Optimization: flat parameters, Parallel Muon and AdamW, the plan of a step, weight averages
# --------------------------------------------------------------------------------------------------


class FlatParameters:
    """All parameters as views of one float32 buffer, their gradients as views of another.

    The order is muon's banks (each padded to `world_size` equal shards of rows), then AdamW's
    groups. So a reduce-scatter reads a bank where autograd wrote it, an all-gather writes it where
    the model reads it, and clipping, averaging, snapshots and SGD are one kernel each.
    """

    def __init__(self, model: GPT, world_size: int = 1) -> None:
        named = dict(model.named_parameters())
        groups = {name: parameter_group(name) for name in named}
        order = [name for name in BANKS if name in named]
        self.spans: dict[str, slice] = {}  # of each bank and of each AdamW group
        self.places: dict[str, slice] = {}  # of each parameter
        size = 0
        for bank in order:
            rows = math.ceil(len(named[bank]) / world_size) * world_size
            padded = rows * named[bank][0].numel()
            self.places[bank] = slice(size, size + named[bank].numel())
            self.spans[bank] = slice(size, size + padded)
            size += padded
        for group in ("table", "projection", "scalar"):
            start = size
            for name in (n for n, g in groups.items() if g == group):
                self.places[name] = slice(size, size + named[name].numel())
                size += named[name].numel()
            self.spans[group] = slice(start, size)
        assert set(self.places) == set(named), "every parameter is optimized exactly once"
        device = model.tok_emb.device
        self.data, self.grad = torch.zeros(2, size, device=device).unbind()
        self.shapes = {name: p.shape for name, p in named.items()}
        for name, p in named.items():
            view = self.data[self.places[name]].view(p.shape)
            p.data = view.copy_(p.data)
            p.grad = self.grad[self.places[name]].view(p.shape)

    def shard(self, flat: Tensor, bank: str, runtime: Runtime) -> Tensor:
        """This rank's rows (n, rows, cols) of a bank inside `flat`."""
        rows = flat[self.spans[bank]].view(-1, *self.shapes[bank][1:])
        return rows.chunk(runtime.world_size)[runtime.rank]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Every parameter's tensor inside `flat`, a buffer laid out as `data`; the model's order."""
        return {name: flat[self.places[name]].view(shape) for name, shape in self.shapes.items()}


def newton_schulz(g: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """An approximation of U V' of g = U S V': (n, rows, cols) -> singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for _ in range(steps):  # x <- a x + (b A + c A^2) x,  A = x x'
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Optimizer:
    """Parallel Muon on the banks, AdamW on the rest; call `reduce` after backward, then `step`.

    Each rank holds the momentum of, and orthogonalizes, its own rows of each bank:
        reduce-scatter all banks, all-reduce the rest      -> averaged gradients, their global norm
        for each bank: momentum, Newton-Schulz, update     -> all-gather while the next one works
        AdamW                                              -> while the last all-gathers fly
    """

    def __init__(self, flat: FlatParameters, hp: Hyperparameters, runtime: Runtime) -> None:
        self.flat, self.hp, self.runtime = flat, hp, runtime
        self.banks = [name for name in BANKS if name in flat.spans]
        data, grad = flat.data, flat.grad
        self.momentum = {b: torch.zeros_like(flat.shard(data, b, runtime)) for b in self.banks}
        self.shard_grads = {b: flat.shard(grad, b, runtime) for b in self.banks}
        settings = {
            "table": (hp.tied_embed_lr, hp.adam_wd),
            "projection": (hp.scalar_lr, hp.adam_wd),
            "scalar": (hp.scalar_lr, 0.0),
        }
        self.small = slice(flat.spans["table"].start, flat.spans["scalar"].stop)
        groups = []
        for name, (lr, decay) in settings.items():
            whole = nn.Parameter(data[flat.spans[name]])
            whole.grad = grad[flat.spans[name]]
            groups.append({"params": [whole], "lr": lr, "base_lr": lr, "weight_decay": decay})
        betas = (hp.beta1, hp.beta2)
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=hp.adam_eps, fused=True)

    def reduce(self) -> Tensor:
        """Sums the gradients over the ranks and returns their global norm, a scalar tensor.

        Each rank's loss is already divided by the tokens of the whole batch, so the sum is the
        gradient of the global mean.
        """
        flat, runtime = self.flat, self.runtime
        if runtime.world_size > 1:
            works = []
            for bank in self.banks:
                shard = torch.empty_like(self.momentum[bank])
                self.shard_grads[bank] = shard
                whole = flat.grad[flat.spans[bank]]
                works.append(dist.reduce_scatter_tensor(shard.flatten(), whole, async_op=True))
            works.append(dist.all_reduce(flat.grad[self.small], async_op=True))
            for work in works:
                work.wait()
        squares = torch.stack([g.square().sum() for g in self.shard_grads.values()]).sum()
        return (runtime.sum_(squares) + flat.grad[self.small].square().sum()).sqrt()

    @torch.no_grad()
    def step(self, norm: Tensor, lr_scale: float, momentum: float) -> None:
        """One update from the reduced gradients, clipped by their global norm."""
        hp, flat, runtime = self.hp, self.flat, self.runtime
        clip = (hp.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0)
        works = []
        for bank in self.banks:
            shard, buffer = flat.shard(flat.data, bank, runtime), self.momentum[bank]
            self.update_rows(shard, self.shard_grads[bank] * clip, buffer, lr_scale, momentum)
            if runtime.world_size > 1:
                whole = flat.data[flat.spans[bank]]
                works.append(dist.all_gather_into_tensor(whole, shard.flatten(), async_op=True))
        flat.grad[self.small].mul_(clip)
        for group in self.adam.param_groups:
            group["lr"] = group["base_lr"] * lr_scale
        self.adam.step()
        for work in works:
            work.wait()

    def update_rows(
        self, rows: Tensor, grad: Tensor, buffer: Tensor, lr_scale: float, momentum: float
    ) -> None:
        """Muon with Nesterov momentum and decoupled weight decay on (n, rows, cols), in place."""
        lr = self.hp.matrix_lr * lr_scale
        buffer.mul_(momentum).add_(grad)
        nesterov = grad.add_(buffer, alpha=momentum)
        dtype = torch.bfloat16 if rows.device.type == "cuda" else torch.float32
        update = newton_schulz(nesterov, self.hp.muon_backend_steps, dtype)
        shape_scale = math.sqrt(max(1.0, rows.size(-2) / rows.size(-1)))
        rows.mul_(1 - lr * self.hp.muon_wd).add_(update, alpha=-lr * shape_scale)


class StepPlan(NamedTuple):
    """What a step does; a function of its number and of the run's progress alone."""

    num_passes: int
    lr_scale: float
    momentum: float
    qat: bool
    swa: bool


def plan_step(hp: Hyperparameters, step: int, progress: float) -> StepPlan:
    """progress: from 0 to 1, the larger of step / iterations and elapsed / wall-clock cap."""
    num_passes = 1
    for start, passes in hp.growth:
        reached = progress if isinstance(start, float) else step
        num_passes = passes if reached >= start else num_passes
    lr_scale = min(1.0, max(0.0, 1 - progress) / max(hp.warmdown_frac, 1e-9))
    warm = min(1.0, progress / max(hp.muon_momentum_warmup_frac, 1e-9))
    momentum = (1 - warm) * hp.muon_momentum_warmup_start + warm * hp.muon_momentum
    qat, swa = lr_scale < hp.late_qat_threshold, lr_scale < hp.swa_lr_scale
    return StepPlan(num_passes, lr_scale, momentum, qat, swa)


class WeightAverage:
    """EMA and SWA in the time of the run's progress, so that a run of any length averages alike."""

    def __init__(self, hp: Hyperparameters, flat: FlatParameters) -> None:
        self.hp, self.weights = hp, flat.data
        self.ema = flat.data.clone() if "ema" in hp.weight_average else None
        self.swa = torch.zeros_like(flat.data) if "swa" in hp.weight_average else None
        self.samples, self.last_progress, self.last_sample = 0, 0.0, -1.0

    def update(self, progress: float, swa: bool) -> None:
        """After a step that brought the run to `progress`."""
        passed, self.last_progress = progress - self.last_progress, progress
        if self.ema is not None:
            self.ema.lerp_(self.weights, -math.expm1(-passed / self.hp.ema_frac))
        if self.swa is not None and swa and progress - self.last_sample >= self.hp.swa_frac:
            self.samples, self.last_sample = self.samples + 1, progress
            source = self.weights if self.ema is None else self.ema
            self.swa.lerp_(source, 1 / self.samples)

    def result(self) -> Tensor:
        """The weights to export; SWA averages EMA's weights where both are on."""
        if self.swa is not None and self.samples:
            return self.swa
        return self.weights if self.ema is None else self.ema


# --------------------------------------------------------------------------------------------------
# 9. Compression: GPTQ-lite int6, one knob for the size, lzma, and a reader that trusts nothing
# --------------------------------------------------------------------------------------------------


def row_scales(w: Tensor, levels: int, floor: Tensor) -> Tensor:
    """The step (..., rows, 1) of each row of w (..., rows, cols), float32 values of float16.

    GPTQ-lite: of the clips at CLIP_QUANTILES of the row's |w| the one with the least squared
    error, as it will be with the floor and the float16 rounding. No step is finer than `floor`.
    """
    cols = w.size(-1)
    top = w.abs().topk(min(cols, 2 + int((1 - CLIP_QUANTILES[0]) * (cols - 1)))).values
    best, least = None, None
    for quantile in CLIP_QUANTILES:
        place = (1 - quantile) * (cols - 1)  # from the largest down, as torch.quantile's linear
        low, part = int(place), place - int(place)
        clip = torch.lerp(
            top[..., low : low + 1], top[..., min(low + 1, top.size(-1) - 1)][..., None], part
        )
        scale = torch.maximum(clip / levels, floor).half().float()
        error = (quantized(w, scale, levels) * scale - w).square().sum(-1, keepdim=True)
        best = scale if best is None else torch.where(error < least, scale, best)
        least = error if least is None else torch.minimum(error, least)
    return best


def quantized(w: Tensor, scale: Tensor, levels: int) -> Tensor:
    """Integers (as floats) of w in -levels..levels."""
    return torch.round(w / scale).clamp(-levels, levels)


def fake_quantize(w: Tensor, floor: Tensor) -> Tensor:
    """The value that the export stores of w (rows, cols), with the gradient of w itself."""
    with torch.no_grad():
        scale = row_scales(w, INT6_LEVELS, floor)
        stored = quantized(w, scale, INT6_LEVELS) * scale
    return stored + (w - w.detach())  # the second term is exactly 0


def floor_value(index: int) -> float:
    return 2.0 ** (-index / FLOOR_STEPS_PER_OCTAVE)


def storage(name: str, shape: torch.Size) -> str:
    """How an artifact stores a parameter: int6 or int8 with float16 row scales, or float16."""
    if name in BANKS:
        return "int6"
    return "int8" if len(shape) == 2 and shape.numel() > SMALL_TENSOR else "float16"


def pack(tensors: dict[str, Tensor], floor: float) -> bytes:
    """The payload: every tensor in order; row scales, then integers offset to unsigned bytes."""
    parts = []
    for name, w in tensors.items():
        kind = storage(name, w.shape)
        if kind == "float16":
            parts.append(w.half())
            continue
        levels = INT6_LEVELS if kind == "int6" else INT8_LEVELS
        least = torch.tensor(floor if kind == "int6" else floor_value(FINEST_FLOOR_INDEX))
        scale = row_scales(w, levels, least.to(w.device))
        parts += [scale.half(), (quantized(w, scale, levels) + levels).to(torch.uint8)]
    return b"".join(part.contiguous().cpu().numpy().tobytes() for part in parts)


def payload_bytes(shapes: Mapping[str, torch.Size]) -> int:
    def size(name: str, shape: torch.Size) -> int:
        if storage(name, shape) == "float16":
            return 2 * shape.numel()
        return shape.numel() + 2 * shape[:-1].numel()

    return sum(size(name, shape) for name, shape in shapes.items())


def unpack(payload: bytes, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The dequantized float32 tensors of a payload whose size was checked."""
    tensors, at = {}, 0

    def take(dtype: type, shape: torch.Size) -> Tensor:
        nonlocal at
        array = np.frombuffer(payload, dtype=dtype, count=shape.numel(), offset=at)
        at += array.nbytes
        return torch.from_numpy(array.astype(np.float32)).view(shape)

    for name, shape in shapes.items():
        kind = storage(name, shape)
        if kind == "float16":
            tensors[name] = take(np.float16, shape)
        else:
            scale = take(np.float16, torch.Size((*shape[:-1], 1)))
            levels = INT6_LEVELS if kind == "int6" else INT8_LEVELS
            tensors[name] = (take(np.uint8, shape) - levels) * scale
    return tensors


def compress(hp: Hyperparameters, tensors: dict[str, Tensor], floor_index: int) -> bytes:
    """The artifact: xz( magic, header length, JSON header, payload )."""
    header = json.dumps({"architecture": hp.architecture()}, separators=(",", ":")).encode()
    payload = pack(tensors, floor_value(floor_index))
    whole = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + payload
    return lzma.compress(whole, format=lzma.FORMAT_XZ, filters=LZMA_FILTERS)


def entropy_bytes(tensors: dict[str, Tensor], floor: float) -> float:
    """What `pack` would compress to if every bank were coded at its integers' entropy.

    Within about 1% of lzma's result and a thousand times faster: it starts the search for the
    floor, and gives QAT the floor that the export will need.
    """
    total = 0.0
    for name, w in tensors.items():
        if storage(name, w.shape) != "int6":
            total += payload_bytes({name: w.shape})
            continue
        scale = row_scales(w, INT6_LEVELS, torch.tensor(floor, device=w.device))
        integers = (quantized(w, scale, INT6_LEVELS) + INT6_LEVELS).to(torch.uint8)
        share = (
            torch.bincount(integers.flatten(), minlength=2 * INT6_LEVELS + 1).float() / w.numel()
        )
        total += torch.special.entr(share).sum().item() / math.log(2) * w.numel() / 8
        total += 2 * scale.numel()
    return total


def estimate_floor_index(tensors: dict[str, Tensor], limit_bytes: int) -> int:
    """The finest floor whose estimated size fits."""
    low, high = 0, FINEST_FLOOR_INDEX
    while low < high:
        middle = (low + high + 1) // 2
        fits = 1.01 * entropy_bytes(tensors, floor_value(middle)) <= limit_bytes
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def finest_fitting(
    size_of: Callable[[int], int], guess: int, limit_bytes: int, log: Log
) -> int | None:
    """The largest floor index whose artifact fits, by bisection on its real size.

    Probes a few indices at a time on the CPU's cores (lzma releases the interpreter lock).
    """
    low, high = -1, FINEST_FLOOR_INDEX + 1  # low fits, high does not
    probes = sorted({max(0, min(high - 1, guess + d)) for d in (-64, -24, -8, 0, 8, 24, 64)})
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1))) as pool:
        while high - low > 1:
            for index, size in zip(probes, pool.map(size_of, probes), strict=True):
                log.event("export_probe", floor_index=index, artifact_bytes=size)
                if size <= limit_bytes:
                    low = max(low, index)
                else:
                    high = min(high, index)
            gap = high - low
            probes = sorted({low + gap * i // 8 for i in range(1, 8)} - {low, high, -1})
            if low == -1 and high == 0:
                return None
    return low


def read_artifact(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The architecture and float32 tensors of an artifact. Raises UserError; executes nothing.

    The file is untrusted: its header is bounded, the settings in it are checked like a user's,
    and the payload must have exactly the size that they imply before it is unpacked.
    """
    try:
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=1 << 26)
        start = stream.decompress(path.read_bytes(), max_length=8)
        magic, length = struct.unpack("<4sI", start)
        if magic != ARTIFACT_MAGIC or length > 1 << 16:
            raise ValueError("it does not start as an artifact does")
        header = json.loads(read_exactly(stream, length))
        architecture = header["architecture"]
        shapes = model_shapes(artifact_settings(architecture))
        size = payload_bytes(shapes)
        if size > MAX_MODEL_BYTES:
            raise ValueError(f"it claims {size} bytes of weights, more than {MAX_MODEL_BYTES}")
        payload = read_exactly(stream, size)
        rest = b"" if stream.eof else stream.decompress(b"", max_length=1)
        if rest or not stream.eof or stream.unused_data:
            raise ValueError("it holds more than its model needs")
    except OSError as error:
        raise UserError(f"artifact {path} cannot be read: {error.strerror}") from None
    except (lzma.LZMAError, EOFError, struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"artifact {path} is damaged or foreign ({error}): export it again, or copy it again"
        ) from None
    return architecture, unpack(payload, shapes)


def read_exactly(stream: lzma.LZMADecompressor, size: int) -> bytes:
    data = bytearray()
    while len(data) < size and not stream.eof:
        data += stream.decompress(b"", max_length=size - len(data))
    if len(data) != size:
        raise ValueError("it ends early")
    return bytes(data)


def artifact_settings(architecture: Any) -> Hyperparameters:
    """The configuration that an artifact's header describes; raises ValueError or TypeError."""
    known = {f.name: str(f.type) for f in fields(Hyperparameters)}
    expected = Hyperparameters().architecture()
    if not isinstance(architecture, dict) or set(architecture) != set(expected):
        raise ValueError("its header does not describe a model of this program")
    types = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    for name, value in architecture.items():
        base = known[name].removesuffix(" | None")
        optional = base != known[name] and value is None
        if not optional and (type(value) not in types[base]):
            raise ValueError(f"its header gives {name} the wrong type")
    return Hyperparameters(**architecture, train_batch_tokens=architecture["train_seq_len"])


def model_shapes(hp: Hyperparameters) -> dict[str, torch.Size]:
    """The shape of every parameter, in order, without allocating any."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(hp).named_parameters()}


# --------------------------------------------------------------------------------------------------
# 10. Evaluation: every token scored exactly once, plain, sliding, and before each TTT update
# --------------------------------------------------------------------------------------------------


def scoring_windows(first: int, last: int, seq_len: int, stride: int) -> np.ndarray:
    """Windows that score targets first..last-1 once each, in order: rows (from, to) int64.

    Target t is token t+1. A window is the `seq_len` tokens that end with the one before target
    `to`; the first windows of the text start at token 0 instead.
    """
    opening = min(last, max(first + stride, seq_len))
    ends = np.array([opening, *range(opening + stride, last, stride), last], dtype=np.int64)
    ends = np.unique(ends)
    return np.stack([np.concatenate([[first], ends[:-1]]), ends], axis=1)


class Evaluator:
    """Scores the validation tokens; the loss of target t is that of token t+1."""

    def __init__(
        self, tokens: np.ndarray, table: TokenBytes, hp: Hyperparameters, runtime: Runtime, log: Log
    ) -> None:
        if len(tokens) <= hp.train_seq_len:
            raise UserError(
                f"data_path: the validation text has {len(tokens)} tokens, not more than one window "
                f"of train_seq_len={hp.train_seq_len}: prepare more text or lower train_seq_len"
            )
        self.hp, self.table, self.runtime, self.log = hp, table, runtime, log
        self.tokens = torch.from_numpy(tokens.astype(np.int32)).to(runtime.device)
        self.num_targets = len(tokens) - 1
        self.bytes = int(table.of(self.tokens[:-1], self.tokens[1:]).sum())
        self.clear()

    def clear(self) -> None:
        """Forgets all scores; the slot after the last target takes what is not to be kept."""
        self.losses = torch.zeros(self.num_targets + 1, device=self.runtime.device)
        self.times_scored = torch.zeros_like(self.losses, dtype=torch.int32)

    @torch.no_grad()
    def score(self, model: GPT, windows: np.ndarray, passes: int, stride: int) -> None:
        """Scores this rank's share of `windows` in batches of one shape."""
        T, size = self.hp.train_seq_len, self.hp.eval_batch_seqs
        share = self.runtime.share(len(windows))
        mine = windows[share.start : share.stop]
        starts = np.maximum(mine[:, 1] - T, 0)
        narrow = mine[:, 0] >= starts + T - stride  # all that is scored lies in the last `stride`
        for kind, count in ((narrow, stride), (~narrow, T)):
            for at in range(0, int(kind.sum()), size):
                rows = np.zeros((size, 3), dtype=np.int64)  # the rest of the last batch scores none
                chosen = np.column_stack([starts, mine])[kind][at : at + size]
                rows[: len(chosen)] = chosen
                self.score_batch(model, torch.from_numpy(rows), passes, count)

    def score_batch(self, model: GPT, rows: Tensor, passes: int, count: int) -> None:
        """rows (B, 3): start, from, to; scores targets from..to-1 of the last `count` positions."""
        T, device = self.hp.train_seq_len, self.runtime.device
        start, first, last = rows.to(device, non_blocking=True).unsqueeze(2).unbind(1)  # (B, 1)
        batch = self.tokens[start + torch.arange(T + 1, device=device)]
        losses, _ = model(batch[:, :-1], batch[:, 1:], passes, score_last=count)
        target = start + torch.arange(T - count, T, device=device)
        kept = (target >= first) & (target < last)
        place = torch.where(kept, target, self.num_targets).flatten()
        self.losses.index_copy_(0, place, losses.flatten())
        self.times_scored.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))

    def result(self) -> tuple[float, float]:
        """val_loss (nats per token) and val_bpb over all ranks; every target scored once."""
        self.runtime.sum_(self.losses)
        self.runtime.sum_(self.times_scored)
        once = bool((self.times_scored[:-1] == 1).all())
        assert once, "every target is scored exactly once"
        nats = self.losses[:-1].double().sum().item()
        return nats / self.num_targets, nats / math.log(2) / self.bytes

    def run(self, name: str, model: GPT, stride: int, passes: int) -> tuple[float, float]:
        """Scores the whole text with windows `stride` apart and logs the exact result as `name`."""
        started = time.perf_counter()
        self.clear()
        windows = scoring_windows(0, self.num_targets, self.hp.train_seq_len, stride)
        parts = max(1, len(windows) // (64 * self.hp.eval_batch_seqs * self.runtime.world_size))
        for i, part in enumerate(np.array_split(windows, parts)):
            self.score(model, part, passes, stride)
            self.log.progress((i + 1) / parts, name)
        return self.report(name, started)

    def report(self, name: str, started: float) -> tuple[float, float]:
        loss, bpb = self.result()
        seconds = f"{time.perf_counter() - started:.3f}"
        self.log.event(
            name,
            val_loss=f"{loss:.8f}",
            val_bpb=f"{bpb:.8f}",
            tokens=self.num_targets,
            bytes=self.bytes,
            seconds=seconds,
        )
        return loss, bpb

    def run_ttt(self, model: GPT, passes: int) -> tuple[float, float]:
        """Score-first test-time training: each chunk is scored, then trained on; the last is not."""
        hp, started = self.hp, time.perf_counter()
        self.clear()
        flat = FlatParameters(model)
        whole = nn.Parameter(flat.data)
        whole.grad = flat.grad
        sgd = torch.optim.SGD([whole], lr=hp.ttt_lr, momentum=hp.ttt_momentum)
        size = hp.ttt_chunk_tokens
        chunks = [(a, min(a + size, self.num_targets)) for a in range(0, self.num_targets, size)]
        for i, (first, last) in enumerate(chunks):
            windows = scoring_windows(first, last, hp.train_seq_len, hp.eval_stride)
            self.score(model, windows, passes, hp.eval_stride)
            self.report_chunk(i, chunks, started)
            if last == self.num_targets:
                break
            cosine = 0.5 * (1 + math.cos(math.pi * i / max(1, len(chunks) - 1)))
            sgd.param_groups[0]["lr"] = hp.ttt_lr * cosine
            self.train_on(model, flat, sgd, (first, last), passes)
        return self.report("legal_ttt_exact", started)

    def report_chunk(self, i: int, chunks: list[tuple[int, int]], started: float) -> None:
        self.log.progress((i + 1) / len(chunks), "legal_ttt")
        if (i + 1) % max(1, len(chunks) // 20) and i + 1 < len(chunks):
            return
        nats = self.runtime.sum_(self.losses[:-1].double().sum()).item()
        done = slice(0, chunks[i][1] + 1)
        text_bytes = int(self.table.of(self.tokens[done][:-1], self.tokens[done][1:]).sum())
        self.log.event(
            "ttt_chunk",
            chunk=f"{i + 1}/{len(chunks)}",
            val_bpb=nats / math.log(2) / text_bytes,
            time=f"{time.perf_counter() - started:.1f}s",
        )

    def train_on(
        self,
        model: GPT,
        flat: FlatParameters,
        sgd: torch.optim.SGD,
        chunk: tuple[int, int],
        passes: int,
    ) -> None:
        """Epochs of SGD over the whole sequences of a scored chunk; ranks share each batch."""
        hp, T, (first, last) = self.hp, self.hp.train_seq_len, chunk
        starts = list(range(first, last - T + 1, T))
        for _ in range(hp.ttt_epochs):
            for at in range(0, len(starts), hp.ttt_batch_seqs):
                batch = starts[at : at + hp.ttt_batch_seqs]
                share = self.runtime.share(len(batch))
                mine = [self.tokens[s : s + T + 1] for s in batch[share.start : share.stop]]
                flat.grad.zero_()
                for part in micro_batches(mine, hp):
                    part = torch.stack(part)
                    losses, _ = model(part[:, :-1], part[:, 1:], passes)
                    (losses.sum() / (len(batch) * T)).backward()
                self.runtime.sum_(flat.grad)
                norm = flat.grad.norm()
                flat.grad.mul_((hp.ttt_grad_clip / (norm + 1e-6)).clamp(max=1.0))
                sgd.step()


def micro_batches(rows: Any, hp: Hyperparameters) -> list[Any]:
    """Cuts rows into the fewest near-equal parts of at most `micro_batch_tokens`: two sizes."""
    parts = math.ceil(len(rows) / (hp.micro_batch_tokens // hp.train_seq_len))
    cuts = [i * len(rows) // max(1, parts) for i in range(parts + 1)]
    return [rows[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


# --------------------------------------------------------------------------------------------------
# 11. Training: warm-up, then the clock and the loop
# --------------------------------------------------------------------------------------------------


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


class Clock:
    """The run's progress, decided by rank 0 and followed by all at the same step.

    What rank 0 knows when a step starts is shared while it runs and used for the next, so that no
    host waits for another. The time at which that step will start and end is extrapolated: the
    clock stops before a step that would end after the cap.
    """

    def __init__(self, hp: Hyperparameters, runtime: Runtime) -> None:
        self.hp, self.runtime = hp, runtime
        self.ahead = 2 if runtime.device.type == "cuda" else 1  # steps in flight and next
        self.work, self.shared = None, torch.zeros(2, dtype=torch.float64)
        runtime.synchronize()
        runtime.barrier()
        self.started = self.last = time.perf_counter()

    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def pause(self) -> float:
        self.runtime.synchronize()
        return time.perf_counter()

    def resume(self, since: float) -> None:
        passed = time.perf_counter() - since
        self.started, self.last = self.started + passed, self.last + passed

    def progress(self, step: int) -> float:
        """The run's progress as `step` starts; 1 or more: stop before it."""
        hp = self.hp
        if self.work is not None:
            self.work.wait()
        by_time, ends = self.shared.tolist()
        by_steps = step / hp.iterations if hp.iterations else float(hp.iterations == 0)
        self.post()
        return 1.0 if ends else max(by_time, by_steps)

    def post(self) -> None:
        now = time.perf_counter()
        step_seconds, self.last = now - self.last, now
        cap = self.hp.max_wallclock_seconds
        if cap is None:
            return
        start = self.elapsed() + self.ahead * step_seconds
        facts = [min(start / cap, 1.0), float(start + step_seconds > cap)]
        self.shared = torch.tensor(facts if self.runtime.is_main else [0.0, 0.0]).double()
        if self.runtime.world_size > 1:
            self.work = dist.all_reduce(self.shared, op=dist.ReduceOp.MAX, async_op=True)


class Trainer:
    """Trains `model` for the run's budget; what it leaves in `flat.data` is what to export."""

    def __init__(
        self,
        model: GPT,
        loader: BatchLoader,
        evaluator: Evaluator,
        table: TokenBytes,
        runtime: Runtime,
        log: Log,
    ) -> None:
        self.hp, self.model, self.loader, self.evaluator = model.hp, model, loader, evaluator
        self.table, self.runtime, self.log = table, runtime, log
        self.flat = FlatParameters(model, runtime.world_size)
        self.qat_floor: Tensor | None = None
        self.norms: list[tuple[int, Tensor, Any]] = []

    def accumulate(self, batch: Tensor, plan: StepPlan) -> Tensor:
        """Gradients of this rank's sequences (B, T+1); returns sums over them for the log.

        [nats, text bytes, proxy, then growth, update and feedback of each pass, times B]
        """
        hp = self.hp
        sums = torch.zeros(3 + 3 * plan.num_passes, device=self.runtime.device)
        floor = self.qat_floor if plan.qat else None
        for part in micro_batches(batch, hp):
            ids, targets = part[:, :-1], part[:, 1:]
            losses, stability = self.model(ids, targets, plan.num_passes, floor)
            proxy = stability.jacobian_proxy.sum()
            mean_loss = losses.sum() / hp.train_batch_tokens
            (mean_loss + hp.jacobian_proxy_weight * proxy / hp.batch_seqs).backward()
            counts = torch.stack(
                [losses.detach().sum(), self.table.of(ids, targets).sum(), proxy.detach()]
            )
            sums += torch.cat([counts, torch.cat(stability[1:]) * len(part)])
        return sums

    def warm_up(self) -> None:
        """Runs every graph of the run on random tokens, then restores weights and random state.

        Nothing that is compiled, tuned or allocated on first use is left for the timed section;
        the throwaway optimizer also opens the ranks' communication.
        """
        hp, flat = self.hp, self.flat
        weights, rng = flat.data.clone(), torch.get_rng_state()
        generator = torch.Generator().manual_seed(hp.seed)
        shape = (len(self.loader.share), hp.train_seq_len + 1)
        optimizer = Optimizer(flat, hp, self.runtime)
        plans = sorted(run_plans(hp))
        self.qat_floor = torch.tensor(floor_value(0), device=self.runtime.device)
        for i in range(hp.warmup_steps):
            batch = torch.randint(hp.vocab_size, shape, generator=generator, dtype=torch.int32)
            passes, qat = plans[i % len(plans)]
            plan = StepPlan(passes, 1.0, 0.9, qat, False)
            self.accumulate(batch.to(self.runtime.device), plan)
            optimizer.step(optimizer.reduce(), 1.0, 0.9)
            flat.grad.zero_()
            self.log.progress((i + 1) / hp.warmup_steps, "warm-up")
        flat.data.copy_(weights)
        torch.set_rng_state(rng)
        self.qat_floor = None

    def train(self) -> None:
        hp, flat, log = self.hp, self.flat, self.log
        optimizer = Optimizer(flat, hp, self.runtime)
        average = WeightAverage(hp, flat)
        graphs, clock, step, before = graphs_compiled(), Clock(hp, self.runtime), 0, None
        while (progress := clock.progress(step)) < 1:
            plan = plan_step(hp, step, progress)
            self.announce(step, progress, before, plan)
            sums = self.accumulate(self.loader.batch(step), plan)
            norm = optimizer.reduce()
            optimizer.step(norm, plan.lr_scale, plan.momentum)
            flat.grad.zero_()
            average.update(progress, plan.swa)
            self.watch(step, norm)
            step, before = step + 1, plan
            if step % hp.train_log_every == 0 or step in (1, 10):
                self.log_step(step, plan, sums, norm, clock)
            if hp.val_loss_every and step % hp.val_loss_every == 0:
                self.validate(step, plan, clock)
            log.progress(progress, f"step {step} passes {plan.num_passes}")
        self.watch(step, None)
        self.runtime.synchronize()
        seconds, compiled_late = clock.elapsed(), graphs_compiled() - graphs
        log.event(
            "stop",
            step=step,
            train_time=f"{1000 * seconds:.0f}ms",
            step_avg=f"{1000 * seconds / max(1, step):.2f}ms",
            graphs_compiled_after_start=compiled_late,
            peak_memory_mib=torch.cuda.max_memory_allocated() >> 20
            if torch.cuda.is_available()
            else 0,
        )
        log.event("weight_average", kind=hp.weight_average, swa_samples=average.samples)
        flat.data.copy_(average.result())

    def announce(self, step: int, progress: float, before: StepPlan | None, plan: StepPlan) -> None:
        """Logs what changes with this step, and fixes QAT's floor when QAT starts."""
        at = {"step": step, "progress": progress}
        if before is None or plan.num_passes != before.num_passes:
            self.log.event("progressive_passes", **at, num_passes=plan.num_passes)
        if plan.swa and not (before and before.swa) and "swa" in self.hp.weight_average:
            self.log.event("swa", **at)
        if plan.qat and self.qat_floor is None:
            tensors = self.flat.named(self.flat.data)
            limit = self.hp.artifact_limit_bytes - code_bytes()
            index = self.runtime.from_main(estimate_floor_index(tensors, limit))
            self.qat_floor = torch.tensor(floor_value(index), device=self.runtime.device)
            self.log.event("late_qat", **at, floor_index=index, floor=floor_value(index))

    def watch(self, step: int, norm: Tensor | None) -> None:
        """Stops the run at a non-finite gradient; looks one step back, so that no GPU waits."""
        if norm is not None:
            on_gpu = norm.device.type == "cuda"
            copy = norm.detach().to("cpu", non_blocking=True)
            event = torch.cuda.Event() if on_gpu else None
            if event is not None:
                event.record()
            self.norms.append((step, copy, event))
        while len(self.norms) > (0 if norm is None else 1):
            at, value, event = self.norms.pop(0)
            if event is not None:
                event.synchronize()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"step {at}: the gradient's norm is {value.item()}, the run has diverged: lower "
                    "matrix_lr, scalar_lr or residual_scale_init"
                )

    def log_step(self, step: int, plan: StepPlan, sums: Tensor, norm: Tensor, clock: Clock) -> None:
        hp = self.hp
        values = self.runtime.sum_(sums).tolist()
        nats, text_bytes, proxy, *ratios = values
        growth, update, feedback = (
            [v / hp.batch_seqs for v in ratios[i * plan.num_passes : (i + 1) * plan.num_passes]]
            for i in range(3)
        )
        elapsed = 1000 * clock.elapsed()
        self.log.event(
            step=f"{step}/{hp.iterations}" if hp.iterations else step,
            train_loss=f"{nats / hp.train_batch_tokens:.4f}",
            train_bpb=f"{nats / math.log(2) / text_bytes:.4f}",
            jacobian_proxy=proxy / hp.batch_seqs,
            grad_norm=norm.item(),
            lr_scale=plan.lr_scale,
            passes=plan.num_passes,
            qat=int(plan.qat),
            growth=growth,
            update=update,
            feedback_norm=feedback,
            residual_scale=self.model.recurrence.residual_scale.tolist(),
            train_time=f"{elapsed:.0f}ms",
            step_avg=f"{elapsed / step:.2f}ms",
        )

    def validate(self, step: int, plan: StepPlan, clock: Clock) -> None:
        since = clock.pause()
        self.evaluator.clear()
        T = self.hp.train_seq_len
        windows = scoring_windows(0, self.evaluator.num_targets, T, T)
        self.evaluator.score(self.model, windows, plan.num_passes, T)
        loss, bpb = self.evaluator.result()
        self.log.event(step=step, val_loss=f"{loss:.4f}", val_bpb=f"{bpb:.4f}")
        clock.resume(since)


def run_plans(hp: Hyperparameters) -> set[tuple[int, bool]]:
    """Every (passes, QAT) that the run can meet; steps and fractions may meet in any order."""
    by_fraction = {plan_step(hp, 0, i / 1000)[::3] for i in range(1000)}
    passes = {p for p, _ in by_fraction} | {p for _, p in hp.growth}
    if all(isinstance(start, float) for start, _ in hp.growth[1:]):
        return by_fraction
    return {(p, qat) for p in passes for qat in (False, hp.late_qat_threshold > 0)}


# --------------------------------------------------------------------------------------------------
# 12. Main
# --------------------------------------------------------------------------------------------------


def code_bytes() -> int:
    return Path(__file__).stat().st_size


def log_header(hp: Hyperparameters, sources: Mapping[str, str], runtime: Runtime, log: Log) -> None:
    code = Path(__file__).read_bytes()

    log.event(
        "code", name=Path(__file__).name, bytes=len(code), sha256=hashlib.sha256(code).hexdigest()
    )
    log.event(
        "versions",
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        numpy=np.__version__,
        sentencepiece=spm.__version__,
    )
    on_gpu = runtime.device.type == "cuda"
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
    log.event(
        "device",
        type=runtime.device.type,
        name=name,
        world_size=runtime.world_size,
        dtype=runtime.dtype,
    )
    for f in fields(hp):
        log.event("config", name=f.name, value=getattr(hp, f.name), source=sources[f.name])


def build_model(hp: Hyperparameters, runtime: Runtime, log: Log) -> GPT:
    name, attend = choose_attention(hp, runtime)
    mode = hp.compile
    if mode == "auto":
        mode = "regions" if runtime.device.type == "cuda" else "off"
    torch._dynamo.config.recompile_limit = 128
    torch.manual_seed(hp.seed)
    model = GPT(hp, runtime.dtype, attend, mode == "regions").to(runtime.device)
    if mode == "model":
        model.compile(dynamic=False, fullgraph=True)
    count = sum(p.numel() for p in model.parameters())
    log.event("model", parameters=count, attention=name, compile=mode)
    return model


def load_model(path: Path, hp: Hyperparameters, runtime: Runtime, log: Log) -> GPT:
    """A fresh model with the weights of an artifact, read from disk."""
    architecture, tensors = read_artifact(path)
    model = build_model(replace(hp, **architecture), runtime, log)
    model.load_state_dict(tensors)
    return model


def export(hp: Hyperparameters, tensors: dict[str, Tensor], path: Path, log: Log) -> None:
    """Writes the finest artifact that fits beside the code. Raises UserError if none does."""
    budget = hp.artifact_limit_bytes - code_bytes()
    candidates: dict[int, bytes] = {}

    def size_of(index: int) -> int:
        candidates[index] = compress(hp, tensors, index)
        return len(candidates[index])

    best = finest_fitting(size_of, estimate_floor_index(tensors, budget), budget, log)
    target = path if best is not None else path.with_suffix(".oversize.xz")
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(candidates[best or 0])
    temporary.replace(target)
    total = target.stat().st_size + code_bytes()
    log.event(
        "artifact",
        path=target,
        code_bytes=code_bytes(),
        model_bytes=target.stat().st_size,
        total_bytes=total,
        limit_bytes=hp.artifact_limit_bytes,
        margin_bytes=hp.artifact_limit_bytes - total,
        floor_index=best or 0,
        floor=floor_value(best or 0),
    )
    if best is None:
        raise UserError(
            f"artifact_limit_bytes={hp.artifact_limit_bytes}: code and model need {total} bytes even "
            f"at the coarsest setting; the artifact is kept as {target}: make the model smaller"
        )


def evaluate(path: Path, evaluator: Evaluator, runtime: Runtime, log: Log) -> None:
    """Scores the artifact at `path`: plain, sliding, and with test-time training."""
    hp = evaluator.hp
    model, passes = load_model(path, hp, runtime, log), hp.passes_in_evaluation
    evaluator.run("final_int6_roundtrip_exact", model, hp.train_seq_len, passes)
    if hp.sliding_eval:
        evaluator.run("final_int6_sliding_window_exact", model, hp.eval_stride, passes)
    if hp.ttt_enabled:
        evaluator.run_ttt(model, passes)
    if hp.token_losses and runtime.is_main:
        path = Path(hp.token_losses)
        temporary = path.with_suffix(".tmp.npy")
        np.save(temporary, evaluator.losses[:-1].cpu().numpy())
        temporary.replace(path)


def run(hp: Hyperparameters, sources: Mapping[str, str], runtime: Runtime) -> None:
    """The whole program: train and export unless only an artifact is to be scored; evaluate."""
    since = time.perf_counter()
    stamp = time.strftime("%Y%m%d_%H%M%S")
    run_id = runtime.from_main(hp.run_id or f"{stamp}_seed{hp.seed}")
    folder = Path(hp.output_dir)
    log = Log(folder / f"{run_id}.txt" if runtime.is_main else None)
    log.event("run", run_id=run_id, started=stamp)
    log_header(hp, sources, runtime, log)
    data_path = Path(hp.data_path)
    val_paths = find_data_shards(data_path, "val")
    tokenizer = load_tokenizer(Path(hp.tokenizer_path), hp.vocab_size)
    table = TokenBytes(tokenizer, runtime.device)
    check_token_ids(val_paths, hp.vocab_size)
    val_tokens = np.concatenate([open_data_shard(path) for path in val_paths])
    check_token_bytes(tokenizer, table, val_tokens)
    evaluator = Evaluator(val_tokens, table, hp, runtime, log)
    artifact = Path(hp.evaluate) if hp.evaluate else folder / f"{run_id}.int6.xz"
    if not hp.evaluate:
        train_paths = find_data_shards(data_path, "train")
        check_token_ids(train_paths[runtime.rank :: runtime.world_size], hp.vocab_size)
        loader = BatchLoader([open_data_shard(path) for path in train_paths], hp, runtime)
        model = build_model(hp, runtime, log)
        since = log.phase("setup", since)
        trainer = Trainer(model, loader, evaluator, table, runtime, log)
        trainer.warm_up()
        since = log.phase("warm_up", since)
        trainer.train()
        since = log.phase("training", since)
        evaluator.run("pre_quant_exact", model, hp.train_seq_len, hp.passes_in_evaluation)
        since = log.phase("pre_quant_evaluation", since)
        if runtime.is_main:
            export(hp, trainer.flat.named(trainer.flat.data), artifact, log)
        runtime.barrier()
        since = log.phase("export", since)
    evaluate(artifact, evaluator, runtime, log)
    log.phase("evaluation", since)


def main() -> int:
    """Returns the exit code: 0, or 2 after a mistake of the user's."""
    is_main, runtime = int(os.environ.get("RANK", 0)) == 0, None
    try:
        hp, sources = read_configuration(os.environ, sys.argv[1:])
        runtime = Runtime.start(hp)
        run(hp, sources, runtime)
    except (UserError, FloatingPointError) as error:
        if is_main:
            print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr)
        return 2
    finally:
        if runtime is not None:
            runtime.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
