"""Prints the demo's closing table: what the run scored, and what lzma and unigrams make of it.

    python scripts/demo_report.py logs/RUN.txt

The two baselines read the same validation text as the run: lzma (preset 9) compresses its text,
the unigram model codes its tokens with the training tokens' frequencies.
"""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import numpy as np
from run_log import Run, read_run

sys.path.append(str(Path(__file__).parents[1]))
import train_gpt


def tokens_of(run: Run, split: str) -> np.ndarray:
    paths = train_gpt.find_data_shards(Path(run.config["data_path"]), split)
    return np.concatenate([train_gpt.open_data_shard(path) for path in paths])


def lzma_bpb(run: Run, tokens: np.ndarray) -> float:
    """Bits per byte of lzma on the text that `tokens` decode to."""
    vocab_size = int(run.config["vocab_size"])
    tokenizer = train_gpt.load_tokenizer(Path(run.config["tokenizer_path"]), vocab_size)
    ids = [int(t) for t in tokens if not tokenizer.IsControl(int(t))]
    text = tokenizer.Decode(ids).encode()
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def unigram_bpb(run: Run, train: np.ndarray, val: np.ndarray) -> float:
    """Bits per byte of the validation tokens under the training tokens' smoothed frequencies."""
    counts = np.bincount(train, minlength=int(run.config["vocab_size"])) + 1.0
    bits = -np.log2(counts / counts.sum())[val[1:]].sum()
    return float(bits) / run.scores["quantized"].bytes


def main(path: str) -> None:
    run = read_run(Path(path))
    val = tokens_of(run, "val")
    names = {
        "pre_quant": "before quantization, windows side by side",
        "quantized": "int6 artifact, windows side by side",
        "sliding": "int6 artifact, sliding windows",
        "ttt": "int6 artifact, sliding + test-time training",
    }
    rows = [("bits per byte of the validation text", "")]
    rows += [(f"  {text}", f"{run.scores[key].val_bpb:.4f}") for key, text in names.items()]
    rows.append(("  for comparison: lzma", f"{lzma_bpb(run, val):.4f}"))
    rows.append(
        ("  for comparison: unigram model", f"{unigram_bpb(run, tokens_of(run, 'train'), val):.4f}")
    )
    rows.append(("bytes", ""))
    rows += [(f"  {key.removesuffix('_bytes')}", f"{size:,}") for key, size in run.bytes.items()]
    rows.append(("seconds", ""))
    rows += [(f"  {name}", f"{seconds:.1f}") for name, seconds in run.phase_seconds.items()]
    for left, right in rows:
        print(f"{left:48}{right:>12}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python scripts/demo_report.py logs/RUN.txt")
    main(sys.argv[1])
