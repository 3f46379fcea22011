"""Downloads FineWeb as the field uses it: token shards, validation split and tokenizer.

    python data/download_fineweb.py                      80 training shards, 16.2 GB
    python data/download_fineweb.py --train-shards 1     enough to try everything, 0.4 GB
    python data/download_fineweb.py --verify             hash again what is there

Run it again after an interruption, or with more shards: what is complete stays. The transfer is
huggingface_hub's, which resumes where a connection broke off. What is added here is that a file
appears in its place only when its size, its hash and its header are right.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback from the imports

try:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
    from huggingface_hub.hf_api import RepoFile

    from data.command import progress, read_json, run_command
    from train_gpt import UserError, data_fingerprint, open_data_shard, require
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error.name} is not installed: pip install -r requirements.txt huggingface_hub"
    )

DATA_DIR = Path(__file__).resolve().parent
REPO_ID, REMOTE_ROOT = "willdepueoai/parameter-golf", "datasets"
FREE_BYTES_KEPT = 256 << 20


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub into a UserError."""
    try:
        yield
    except (EntryNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        cause = error.__cause__ or error  # where a file cannot be located, the hub's answer
        reason = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise UserError(
            f"{what}: {reason}: check the network, the disk, --repo-id, --revision and "
            "--remote-root (a private repository needs HF_TOKEN), then run again; what is complete "
            "stays"
        ) from None


class Hub:
    """One revision of a dataset repository. Methods raise UserError."""

    def __init__(self, repo_id: str, revision: str, endpoint: str | None) -> None:
        api, self.repo_id = HfApi(endpoint=endpoint), repo_id
        with hub_errors(f"repository {repo_id} at {api.endpoint}"):
            self.commit = api.dataset_info(repo_id, revision=revision, timeout=30).sha
        self.at = {"repo_type": "dataset", "revision": self.commit}
        self.list, self.download = api.list_repo_tree, api.hf_hub_download

    def files(self, folder: str) -> dict[str, RepoFile]:
        """The files below `folder`, by their paths from there."""
        with hub_errors(f"folder {folder!r} of repository {self.repo_id}"):
            tree = list(self.list(self.repo_id, folder or None, recursive=True, **self.at))
        files = [item for item in tree if isinstance(item, RepoFile)]
        return {file.path.removeprefix(folder).lstrip("/"): file for file in files}

    def fetch(self, file: RepoFile, target: Path) -> None:
        """Downloads `file` into a folder beside `target`, checks it, then puts it in its place."""
        folder = target.parent / ".download"
        for _ in range(2):  # what arrives broken gets a second try
            with hub_errors(file.path):
                folder.mkdir(parents=True, exist_ok=True)
                got = Path(self.download(self.repo_id, file.path, local_dir=folder, **self.at))
            fault = difference(file, got)
            if fault is None:
                if target.suffix == ".bin":
                    open_data_shard(got)
                got.replace(target)
                return
            got.unlink(missing_ok=True)
        raise UserError(f"{file.path} arrived broken, it {fault}: run again")


def difference(file: RepoFile, local: Path) -> str | None:
    """What is wrong with the copy `local` of a file of the hub; None if nothing."""
    if not local.is_file():
        return "is not there"
    size = local.stat().st_size
    if size != file.size:
        return f"has {size:,} bytes instead of {file.size:,}"
    with local.open("rb") as content:
        if file.lfs:
            expected, start = file.lfs.sha256, hashlib.sha256()
        else:
            expected, start = file.blob_id, hashlib.sha1(b"blob %d\0" % size)  # as git names it
        actual = hashlib.file_digest(content, start.copy).hexdigest()
    return None if actual == expected else f"has hash {actual} instead of {expected}"


def tokenizer_files(manifest: Any, dataset: str) -> list[str]:
    """The files of a dataset's tokenizer. Raises UserError if the manifest has another form."""
    try:
        [name] = [d["tokenizer_name"] for d in manifest["datasets"] if d["name"] == dataset]
        [tokenizer] = [entry for entry in manifest["tokenizers"] if entry["name"] == name]
        keys = ("model_path", "vocab_path", "path")
        files = [str(tokenizer[key]) for key in keys if tokenizer.get(key)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the repository's manifest.json says nothing of {dataset} in the known form "
            f"({error!r}): check --variant, --repo-id and --remote-root"
        ) from None
    for file in files:  # the manifest must not name a place elsewhere
        inside = re.fullmatch(r"tokenizers/\w[\w.-]*", file)
        require(inside is not None, f"the manifest names {file!r}, outside tokenizers/")
    return files


def shard_files(remote: Iterable[str], dataset: str, train_shards: int) -> list[str]:
    """All validation shards and the first training shards that the repository has."""
    found = {
        split: sorted(n for n in remote if n.startswith(f"datasets/{dataset}/fineweb_{split}_"))
        for split in ("val", "train")
    }
    there = len(found["train"])
    in_range = 1 <= train_shards <= there
    require(in_range, f"--train-shards {train_shards}: the repository has {there} of {dataset}")
    return found["val"] + found["train"][:train_shards]


def fetch_manifest(hub: Hub, file: RepoFile, args: argparse.Namespace, has_shards: bool) -> Any:
    """What the repository says of its files; kept as data/manifest.json. Raises UserError."""
    kept, fresh = args.data_dir / "manifest.json", args.data_dir / "cache" / "manifest.json"
    hub.fetch(file, fresh)
    manifest = read_json(fresh)
    changed = kept.is_file() and kept.read_bytes() != fresh.read_bytes()
    require(
        args.verify or not (changed and has_shards),
        f"the repository's manifest is another than {kept} of the earlier download, and shards of "
        "two exports must not mix: replace what differs with --verify, or give the earlier "
        "--revision",
    )
    fresh.replace(kept)
    return manifest


def missing_files(files: dict[Path, RepoFile], verify: bool) -> dict[Path, RepoFile]:
    """Those of `files` that are not here whole, judged by their size alone unless `verify`."""
    missing = {}
    with progress("verify", len(files), "file") as bar:
        for path, file in files.items():
            whole = path.is_file() and path.stat().st_size == file.size
            if not whole or (verify and difference(file, path)):
                missing[path] = file
            bar.update()
    return missing


def download(hub: Hub, files: dict[Path, RepoFile], parallel: int) -> None:
    """Fetches `files` by their local paths, several at once; the first failure ends it."""
    pool = ThreadPoolExecutor(parallel)
    try:
        jobs = {pool.submit(hub.fetch, file, path): file for path, file in files.items()}
        with progress("download", sum(file.size for file in files.values())) as bar:
            for job in as_completed(jobs):
                job.result()
                bar.update(jobs[job].size)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run(args: argparse.Namespace) -> None:
    hub = Hub(args.repo_id, args.revision, args.endpoint)
    remote = hub.files(args.remote_root.strip("/"))
    require("manifest.json" in remote, f"--remote-root {args.remote_root} holds no manifest.json")
    dataset = f"fineweb10B_{args.variant}"
    names = shard_files(remote, dataset, args.train_shards)
    has_shards = any((args.data_dir / "datasets" / dataset).glob("fineweb_*.bin"))
    manifest = fetch_manifest(hub, remote["manifest.json"], args, has_shards)
    names += tokenizer_files(manifest, dataset)
    lacking = [name for name in names if name not in remote]
    require(not lacking, f"repository {args.repo_id} lacks {len(lacking)} files: {lacking[:1]}")
    files = {args.data_dir / name: remote[name] for name in names}
    missing = missing_files(files, args.verify)
    needed_bytes = sum(file.size for file in missing.values())
    print(
        f"{dataset} at {hub.commit}: {len(missing)} of {len(files)} files, "
        f"{needed_bytes / 1e9:.2f} GB, to download"
    )
    free = shutil.disk_usage(args.data_dir).free
    require(
        free >= needed_bytes + FREE_BYTES_KEPT,
        f"{args.data_dir} has {free / 1e9:.1f} GB free: make room, or choose fewer --train-shards "
        "or another --data-dir",
    )
    download(hub, missing, args.parallel)
    for split in ("train", "val"):
        paths = [path for path in files if path.name.startswith(f"fineweb_{split}_")]
        tokens = sum(len(open_data_shard(path)) for path in paths)
        fingerprint = data_fingerprint(paths)
        print(f"{split}: {len(paths)} shards, {tokens:,} tokens, fingerprint {fingerprint}")
    for folder in (args.data_dir / "cache", *{path.parent / ".download" for path in files}):
        shutil.rmtree(folder, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
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
    add("--parallel", type=int, choices=range(1, 65), metavar="N", default=4, help="files at once")
    add("--verify", action="store_true", help="hash files that are there, replace wrong ones")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args), kept="what is complete stays; run again to go on")


if __name__ == "__main__":
    status = main()
    if status:
        # After a failure transfers may still run in threads, which a normal exit would wait for.
        sys.stdout.flush()
        os._exit(status)
