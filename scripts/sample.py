"""Shows what an artifact writes, or hands its weights to other tools.

    python scripts/sample.py logs/RUN.int6.xz "Once upon a time"
    python scripts/sample.py logs/RUN.int6.xz "The river" --passes 1,2,3 --temperature 0.7
    python scripts/sample.py logs/RUN.int6.xz --export model.safetensors

The artifact is loaded in a fresh process and nothing in it is executed. Its tokenizer is the one
that --tokenizer names, that the log beside the artifact names, or that lies beside it. Text is
printed as it comes; the window slides, so it may be of any length. --passes compares what the same
model writes when it applies its core so many times.

--export writes the dequantized float32 weights in the format of safetensors (pip install
safetensors), and beside them the architecture as JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt  # the first of these: it says what to install
from train_gpt import GPT, Hyperparameters, UserError, require

# isort: split
import torch
from inspect_logs import LogError, read_run, run_command
from sentencepiece import SentencePieceProcessor
from torch import Tensor

ROOT = Path(train_gpt.__file__).parent


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        usage="sample.py ARTIFACT [PROMPT] [options]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("artifact", type=Path, help="a file that train_gpt.py exported, RUN.int6.xz")
    add("prompt", nargs="?", default="", help="how the text begins; none: a new document")
    add("--tokens", type=int, default=200, help="how many to write [200]")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token [0.8]")
    add("--top-k", type=int, default=0, help="only the k likeliest tokens; 0: all [0]")
    add("--top-p", type=float, default=0.95, help="only the likeliest with this sum [0.95]")
    add("--seed", type=int, default=1337)
    add("--passes", default="", help="1,2,3: a text for each; none: as the run scored itself")
    add("--tokenizer", type=Path, help="the run's tokenizer.model")
    add("--export", type=Path, metavar="FILE", help="write the weights instead of a text")
    return parser


def check_arguments(args: argparse.Namespace) -> list[int]:
    """The numbers of passes that were asked for. Raises UserError with every mistake."""
    words = args.passes.split(",") if args.passes else []
    right = all(word.isdecimal() and 1 <= int(word) <= 64 for word in words)
    train_gpt.require_all(
        (right, f"--passes {args.passes}: write numbers from 1 to 64, such as 1,2,3"),
        (args.tokens >= 1, f"--tokens {args.tokens}: must be at least 1"),
        (0 <= args.seed < 1 << 63, f"--seed {args.seed}: must be from 0 to {(1 << 63) - 1}"),
        (
            args.temperature == 0 or 1e-3 <= args.temperature < math.inf,
            f"--temperature {args.temperature}: must be 0, or finite and at least 0.001",
        ),
        (args.top_k >= 0, f"--top-k {args.top_k}: must be at least 0"),
        (0 < args.top_p <= 1, f"--top-p {args.top_p}: must be above 0 and at most 1"),
    )
    return [int(word) for word in words]


def load(path: Path) -> GPT:
    """The model of an artifact, on the GPU if there is one. Raises UserError."""
    hp, tensors = train_gpt.read_artifact(path)
    runtime = train_gpt.Runtime.start(Hyperparameters(compile="off"))
    model = GPT(hp, runtime.dtype)
    model.load_state_dict(tensors)
    return model.to(runtime.device).eval()


def find_tokenizer(artifact: Path, named: Path | None) -> Path:
    """Raises UserError if there is none."""
    places = [artifact.with_name("tokenizer.model")]
    if named:
        places = [named / "tokenizer.model" if named.is_dir() else named]
    stem = artifact.name.removesuffix(".int6.xz")
    # The trainer's log, and that of a seed of run_seeds.sh.
    beside = [artifact.with_name(stem + end) for end in (".txt", ".log")]
    for log in [] if named else filter(Path.is_file, beside):
        with suppress(LogError):
            logged = read_run(log).config.get("tokenizer_path")
            places = [Path(logged), ROOT / logged, *places] if logged else places
    places = list(dict.fromkeys(places))
    for place in places:
        if place.is_file():
            return place
    text = f"tokenizer: {' and '.join(map(str, places))} not found"
    raise UserError(f"{text}: name the run's tokenizer with --tokenizer")


def encode(tokenizer: SentencePieceProcessor, prompt: str) -> list[int]:
    """BOS and the prompt's tokens. Raises UserError for what is no text."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt[:60]!r} is no valid text: give it as UTF-8") from None
    ids = [tokenizer.bos_id(), *tokenizer.Encode(prompt)]
    require(tokenizer.unk_id() not in ids, f"the prompt {prompt[:60]!r} has unknown characters")
    return ids


def choose(logits: Tensor, args: argparse.Namespace, generator: torch.Generator) -> int:
    """A token of logits (V,), float32 on the CPU: the likeliest ones, then a draw among them."""
    if args.temperature == 0:
        return int(logits.argmax())
    values, order = (logits / args.temperature).sort(descending=True)
    share = values.softmax(0)
    kept = share.cumsum(0) - share < args.top_p  # the first is always kept
    if args.top_k:
        kept &= torch.arange(len(share)) < args.top_k
    drawn = torch.multinomial(share * kept, 1, generator=generator)
    return int(order[drawn])


@torch.inference_mode()
def generate(
    model: GPT, ids: Sequence[int], banned: Sequence[int], passes: int, args: argparse.Namespace
) -> Iterator[int]:
    """args.tokens tokens that follow ids; each sees the window's tokens before it."""
    ids, T, device = list(ids), model.hp.train_seq_len, model.tok_emb.device
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.tokens):
        seen = ids[-T:]
        # A GPU plans its kernels for each shape, so there it always gets a whole window: tokens
        # after the text cannot change what is read before them.
        rest = [0] * (T - len(seen)) if device.type == "cuda" else []
        window = torch.tensor([seen + rest], dtype=torch.int32, device=device)
        logits = model.logits(window, passes)[0, len(seen) - 1].cpu()
        logits[list(banned)] = -torch.inf
        ids.append(choose(logits, args, generator))
        yield ids[-1]


def write_text(tokenizer: SentencePieceProcessor, ids: list[int], tokens: Iterator[int]) -> None:
    """Prints the text of ids, then more of it as soon as a token ends whole characters."""
    text = tokenizer.Decode(ids)
    print(text, end="", flush=True)
    for token in tokens:
        ids = [*ids, token]
        longer = tokenizer.Decode(ids)
        if not longer.endswith("\ufffd"):  # bytes of a character that is not whole yet
            print(longer[len(text) :], end="", flush=True)
            text = longer
    print()


def export(model: GPT, path: Path) -> None:
    """Writes the weights, and the architecture beside them. Raises UserError."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise UserError("--export needs a package: pip install safetensors") from None
    architecture = json.dumps(model.hp.architecture(), indent=1)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    description = path.with_suffix(".json")
    for target, data in ((path, save(weights)), (description, architecture.encode())):
        require(not target.exists(), f"--export: {target} would be overwritten: choose another")
        try:
            train_gpt.write_aside(target, data)
        except OSError as error:
            text = f"--export: {target} cannot be written ({error.strerror})"
            raise UserError(f"{text}: choose another folder") from None
        print(f"{target}: {len(data):,} bytes")


def run(args: argparse.Namespace) -> None:
    """Raises UserError."""
    asked, model = check_arguments(args), load(args.artifact)
    if args.export:
        export(model, args.export)
        return
    path = find_tokenizer(args.artifact, args.tokenizer)
    tokenizer, hp = train_gpt.load_tokenizer(path), model.hp
    pieces, digest = tokenizer.vocab_size(), hashlib.sha256(path.read_bytes()).hexdigest()
    own = pieces == hp.vocab_size and hp.tokenizer_sha256 in (None, digest)
    require(own, f"tokenizer {path} is not the model's: name the run's own with --tokenizer")
    ids = encode(tokenizer, args.prompt)
    if len(ids) > hp.train_seq_len:
        text = f"the prompt has {len(ids)} tokens, the model sees the last {hp.train_seq_len}"
        print(f"note: {text}", file=sys.stderr)
    special = (tokenizer.IsControl, tokenizer.IsUnknown, tokenizer.IsUnused)
    banned = [i for i in range(pieces) if any(test(i) for test in special)]
    most = hp.max_passes
    single = most > 1 or max(asked, default=1) == 1
    require(single, f"--passes {args.passes}: the model has no repeats, use 1")
    for passes in asked or [hp.eval_passes or most]:
        if len(asked) > 1:
            print(f"--- passes: {passes}")
        write_text(tokenizer, ids, generate(model, ids, banned, passes, args))


def main(argv: Sequence[str]) -> int:
    args = make_parser().parse_intermixed_args(argv)
    try:
        run(args)
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    run_command(main)
