"""A dataset repository on the Hugging Face hub: sizes and hashes of its files, and the files.

The transfer is huggingface_hub's: it resumes a dropped connection where it broke off. What is
added here is the check of what arrived, and that a file appears only when it has passed.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from train_gpt import UserError

RETRY_SECONDS = (1.0, 5.0)  # pauses before a file is tried again
PATHS_PER_QUERY = 100


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository; `digest` is (sha256, hex) or, for files not in LFS, (git, hex)."""

    path: str
    size_bytes: int
    digest: tuple[str, str]

    def fault(self, local: Path) -> str | None:
        """What is wrong with the copy `local`; None if nothing."""
        size = local.stat().st_size
        if size != self.size_bytes:
            return f"has {size:,} bytes instead of {self.size_bytes:,}"
        kind, expected = self.digest
        with local.open("rb") as file:
            start = hashlib.sha256() if kind == "sha256" else hashlib.sha1(b"blob %d\0" % size)
            actual = hashlib.file_digest(file, start.copy).hexdigest()
        return None if actual == expected else f"has {kind} hash {actual} instead of {expected}"


def place(file: Path, target: Path) -> None:
    """Moves `file` to `target`, where it appears complete or not at all, also on another disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        file.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(file, partial)
        partial.replace(target)
        file.unlink()


def http_status(error: BaseException) -> int | None:
    """The status that the hub answered with; None if it did not answer.

    Where a file cannot be located the client says so with an error of its own, after the cause.
    """
    for candidate in (error, error.__cause__):
        if (response := getattr(candidate, "response", None)) is not None:
            return response.status_code
    return None


class Hub:
    """One revision of the dataset repository `repo_id`, reached at `endpoint`.

    None for `endpoint` is HF_ENDPOINT or the public hub; HF_TOKEN, if set, is sent along. All
    methods raise UserError.
    """

    def __init__(self, repo_id: str, revision: str, endpoint: str | None) -> None:
        try:
            from huggingface_hub import HfApi, errors, hf_hub_download
            from huggingface_hub.utils import disable_progress_bars
        except ImportError:
            raise UserError(
                "downloading needs a package more: pip install huggingface_hub"
            ) from None
        disable_progress_bars()  # one bar for all files replaces its many
        self.api, self.download, self.kinds = HfApi(endpoint=endpoint), hf_hub_download, errors
        self.repo_id = repo_id
        with self.errors(f"repository {repo_id}, revision {revision}"):
            self.commit = self.api.dataset_info(repo_id, revision=revision, timeout=30).sha

    @contextmanager
    def errors(self, what: str) -> Iterator[None]:
        """Says in words what a failure of the client means."""
        kinds = self.kinds
        where = f"{what} at {self.api.endpoint}"
        try:
            yield
        except kinds.GatedRepoError:
            raise UserError(
                f"{where}: access must be granted first: ask on its page, then set HF_TOKEN"
            ) from None
        except (kinds.EntryNotFoundError, kinds.HfHubHTTPError) as error:
            status = http_status(error)
            if status is None:
                raise UserError(f"{where}: no answer: check the network, then run again") from None
            remedy = {
                401: "private or not there: check the name, or set HF_TOKEN to a valid token",
                403: "forbidden: set HF_TOKEN to a token that may read it",
                404: "not there: check --repo-id, --revision and --remote-root",
                429: "too many requests: wait, or set HF_TOKEN",
            }.get(status, "the hub's trouble, most likely: run again later, what is done is kept")
            raise UserError(f"{where}: HTTP {status}: {remedy}") from None
        except (kinds.HTTPError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{what}: the disk is full: make room, then run again") from None
            raise UserError(
                f"{where}: {str(error) or type(error).__name__}: check the network and the "
                "endpoint, then run again; what is done is kept"
            ) from None

    def describe(self, paths: Sequence[str]) -> list[RemoteFile]:
        """Size and hash of each of `paths`, in their order."""
        found: dict[str, RemoteFile] = {}
        for first in range(0, len(paths), PATHS_PER_QUERY):
            query = list(paths[first : first + PATHS_PER_QUERY])
            with self.errors(f"files of repository {self.repo_id}"):
                answer = self.api.get_paths_info(
                    self.repo_id, query, repo_type="dataset", revision=self.commit
                )
            for item in answer:
                lfs = getattr(item, "lfs", None)
                digest = ("sha256", lfs.sha256) if lfs else ("git", getattr(item, "blob_id", ""))
                found[item.path] = RemoteFile(item.path, getattr(item, "size", -1), digest)
        if missing := [path for path in paths if path not in found]:
            raise UserError(
                f"repository {self.repo_id} lacks {len(missing)} of {len(paths)} files, the first "
                f"{missing[0]}: check --repo-id, --revision and --remote-root"
            )
        return [found[path] for path in paths]

    def fetch(
        self, file: RemoteFile, target: Path, cache: Path, check: Callable[[Path], object]
    ) -> None:
        """Downloads `file` by way of the folder `cache`, checks it, then puts it at `target`.

        `check` raises UserError if the content, though it is the hub's, is not what is wanted.
        """
        for pause in (*RETRY_SECONDS, None):
            try:
                with self.errors(file.path):
                    got = self.transfer(file.path, cache)
                    if fault := file.fault(got):
                        got.unlink()
                        raise UserError(f"{file.path} arrived broken, it {fault}: run again")
                    check(got)
                    place(got, target)
                return
            except UserError:
                if pause is None:
                    raise
                time.sleep(pause)

    def transfer(self, path: str, cache: Path) -> Path:
        local = self.download(
            self.repo_id,
            path,
            repo_type="dataset",
            revision=self.commit,
            endpoint=self.api.endpoint,
            local_dir=cache,
        )
        return Path(local)


def bytes_in_flight(cache: Path) -> int:
    """The size of what the client has received of files that are not complete."""
    total = 0
    for path in cache.rglob("*.incomplete"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # complete, and moved, since it was listed
            continue
    return total
