"""Downloads FineWeb as the field uses it: token shards, validation split and tokenizer.

    python data/download_fineweb.py                      80 training shards, 16.2 GB
    python data/download_fineweb.py --train-shards 1     enough to try everything, 0.4 GB
    python data/download_fineweb.py --verify             hash again what is there

A 600 s run on 8 H100s reads about 5 billion tokens: 50 training shards. Run it again after an
interruption, or with more shards: what is complete stays.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.hub import Hub, RemoteFile, bytes_in_flight, place
from data.progress import Progress
from train_gpt import UserError, data_fingerprint, open_data_shard

DATA_DIR = Path(__file__).resolve().parent
REPO_ID, REMOTE_ROOT = "willdepueoai/parameter-golf", "datasets"
RUN_SHARDS = 55  # about 6,500 steps of 786,432 tokens, in shards of 100,000,000
MAX_MANIFEST_BYTES = 16 << 20
FREE_BYTES_KEPT = 256 << 20


@dataclass(frozen=True)
class Export:
    """What the manifest says of one variant: `entries` are its own words, for comparison."""

    dataset: str
    train_shards: int
    val_shards: int
    val_tokens: int | None
    tokenizer_files: tuple[str, ...]
    entries: dict[str, Any]

    @classmethod
    def of(cls, manifest: Any, variant: str) -> Export:
        """Raises UserError if the manifest lacks the variant or is not as it should be."""
        dataset = f"fineweb10B_{variant}"
        try:
            by_name = {entry["name"]: entry for entry in manifest["datasets"]}
            if dataset not in by_name:
                variants = sorted(name.removeprefix("fineweb10B_") for name in by_name)
                raise UserError(f"--variant {variant}: the repository has {', '.join(variants)}")
            entry = by_name[dataset]
            tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
            tokenizer = tokenizers[entry["tokenizer_name"]]
            files = [
                tokenizer[key] for key in ("model_path", "vocab_path", "path") if key in tokenizer
            ]
            stats = entry["stats"]
            val_tokens = stats.get("tokens_val")
            return cls(
                dataset,
                int(stats["files_train"]),
                int(stats["files_val"]),
                None if val_tokens is None else int(val_tokens),
                tuple(tokenizer_path(file) for file in files if file),
                {"dataset": entry, "tokenizer": tokenizer},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"the repository's manifest.json is not of the known form ({error!r}): check "
                "--repo-id and --remote-root"
            ) from None

    def shard_names(self, train_shards: int) -> list[str]:
        """The shards to have: all for validation, the first `train_shards` for training."""
        if not 1 <= train_shards <= self.train_shards:
            raise UserError(
                f"--train-shards {train_shards}: the repository has {self.train_shards}, and "
                "training needs at least 1"
            )
        counts = {"val": self.val_shards, "train": train_shards}
        return [f"fineweb_{split}_{i:06d}.bin" for split, n in counts.items() for i in range(n)]


def tokenizer_path(path: str) -> str:
    """A path of the manifest, refused unless it stays in the folder of tokenizers."""
    if not re.fullmatch(r"tokenizers/[\w.-]+", path) or PurePosixPath(path).name.startswith("."):
        raise UserError(f"the manifest names a tokenizer file {path!r} outside tokenizers/")
    return path


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Downloads FineWeb's token shards and their tokenizer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--variant", default="sp1024", help="tokenization: sp1024 is the field's")
    add("--train-shards", type=int, default=80, help="of 100,000,000 tokens, 200 MB, each")
    add("--repo-id", default=REPO_ID, help="dataset repository on the hub")
    add("--revision", default="main", help="branch, tag or commit of it")
    add("--remote-root", default=REMOTE_ROOT, help="folder in it that holds manifest.json")
    add("--endpoint", help="URL of the hub (default: HF_ENDPOINT, or the public one)")
    add("--data-dir", type=Path, default=DATA_DIR, help="folder to fill")
    add("--parallel", type=int, default=4, help="files at once")
    add("--verify", action="store_true", help="hash files that are there, replace wrong ones")
    args = parser.parse_args(argv)
    if not 1 <= args.parallel <= 64:
        raise UserError(f"--parallel {args.parallel}: from 1 to 64")
    return args


def read_json(path: Path) -> Any:
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes: that is no manifest")
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): remove it, then run again") from None


def fetch_manifest(hub: Hub, args: argparse.Namespace, cache: Path) -> Export:
    """The export as the repository describes it now; kept as data/manifest.json.

    Raises UserError if the manifest of an earlier download says otherwise.
    """
    kept, fresh = args.data_dir / "manifest.json", cache / "manifest.fresh.json"
    [remote] = hub.describe([f"{args.remote_root}/manifest.json".lstrip("/")])
    hub.fetch(remote, fresh, cache, read_json)
    export = Export.of(read_json(fresh), args.variant)
    has_shards = any((args.data_dir / "datasets" / export.dataset).glob("fineweb_*.bin"))
    if kept.is_file() and has_shards and not args.verify:
        before = Export.of(read_json(kept), args.variant)
        if before.entries != export.entries:
            raise UserError(
                f"the repository's manifest describes {export.dataset} otherwise than {kept} from "
                f"the earlier download: shards of two exports must not mix. Give the earlier "
                f"--revision, replace with --verify whatever differs, or move {kept} and "
                f"datasets/{export.dataset} away"
            )
    place(fresh, kept)
    return export


def missing_files(files: dict[Path, RemoteFile], verify: bool) -> dict[Path, RemoteFile]:
    """Those of `files` that are not here whole, judged by their size alone unless `verify`."""
    if not verify:
        return {
            path: file
            for path, file in files.items()
            if not path.is_file() or path.stat().st_size != file.size_bytes
        }
    missing, hashed_bytes = {}, 0
    with Progress("verify", sum(file.size_bytes for file in files.values())) as progress:
        for path, file in files.items():
            if not path.is_file() or file.fault(path):
                missing[path] = file
            hashed_bytes += file.size_bytes
            progress.update(hashed_bytes)
    return missing


def check_content(path: Path) -> None:
    """Raises UserError if a shard's header is none, or disagrees with its size."""
    if path.suffix == ".bin":
        open_data_shard(path)


def check_disk(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed_bytes and free < needed_bytes + FREE_BYTES_KEPT:
        raise UserError(
            f"{folder}: {needed_bytes / 1e9:.1f} GB to download, {free / 1e9:.1f} GB free: make "
            "room, or choose fewer --train-shards or another --data-dir"
        )


def download(hub: Hub, files: dict[Path, RemoteFile], cache: Path, parallel: int) -> None:
    """Fetches `files` by their local paths, several at once; the first failure ends it."""
    total_bytes = sum(file.size_bytes for file in files.values())
    pool = ThreadPoolExecutor(parallel)
    try:
        with Progress(f"download {len(files)} files", total_bytes) as progress:
            progress.resume(min(bytes_in_flight(cache), total_bytes))
            jobs = {
                pool.submit(hub.fetch, file, path, cache, check_content): file
                for path, file in files.items()
            }
            waiting: set[Future[None]] = set(jobs)
            while waiting:
                done, waiting = wait(waiting, timeout=0.5, return_when=FIRST_EXCEPTION)
                for job in done:
                    job.result()
                got = sum(file.size_bytes for job, file in jobs.items() if job.done())
                progress.update(min(got + bytes_in_flight(cache), total_bytes))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def summary(folder: Path, export: Export, train_shards: int) -> str:
    """Opens all shards, which checks their headers, and counts their tokens."""
    lines, tokens = [], {}
    names = export.shard_names(train_shards)
    for split in ("train", "val"):
        paths = [folder / name for name in names if name.startswith(f"fineweb_{split}_")]
        tokens[split] = sum(len(open_data_shard(path)) for path in paths)
        lines.append(
            f"{split}: {len(paths)} shards, {tokens[split]:,} tokens, fingerprint "
            f"{data_fingerprint(paths)}"
        )
    if export.val_tokens not in (None, tokens["val"]):
        lines.append(f"warning: the manifest counts {export.val_tokens:,} validation tokens")
    if train_shards < RUN_SHARDS:
        lines.append(
            f"note: a 600 s run on 8 H100s reads about 5 billion tokens, {RUN_SHARDS} shards; with "
            f"{train_shards} it repeats its text"
        )
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    cache = args.data_dir / "cache" / "fineweb"
    cache.mkdir(parents=True, exist_ok=True)
    hub = Hub(args.repo_id, args.revision, args.endpoint)
    export = fetch_manifest(hub, args, cache)
    folder = args.data_dir / "datasets" / export.dataset
    relative = [f"datasets/{export.dataset}/{n}" for n in export.shard_names(args.train_shards)]
    relative += export.tokenizer_files
    described = hub.describe([f"{args.remote_root}/{path}".lstrip("/") for path in relative])
    files = {args.data_dir / path: file for path, file in zip(relative, described, strict=True)}
    missing = missing_files(files, args.verify)
    print(
        f"{export.dataset} at {hub.commit}: {len(files)} files, {len(files) - len(missing)} are "
        f"here, {sum(f.size_bytes for f in missing.values()) / 1e9:.2f} GB to download"
    )
    check_disk(args.data_dir, sum(f.size_bytes for f in missing.values()) - bytes_in_flight(cache))
    if missing:
        download(hub, missing, cache, args.parallel)
    print(summary(folder, export, args.train_shards))
    shutil.rmtree(cache, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"error: {error}: what is complete stays", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print(
            "interrupted: run again to go on, what is complete stays", file=sys.stderr, flush=True
        )
    else:
        return 0
    return 1


if __name__ == "__main__":
    status = main()
    if status:
        # After a failure transfers may still run in threads, which a normal exit would wait for.
        sys.stdout.flush()
        os._exit(status)
