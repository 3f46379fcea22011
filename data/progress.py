"""How far a long job is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

BAR_WIDTH = 30
TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0  # between two updates


class Progress:
    """Shows bytes done of `total_bytes` (None: unknown), the rate and the time left, on stderr.

    Use it as a context manager; `update` may be called as often as is convenient.
    """

    def __init__(self, what: str, total_bytes: int | None) -> None:
        self.what, self.total_bytes = what, total_bytes
        self.done_bytes, self.first_bytes = 0, 0
        self.terminal = sys.stderr.isatty()
        self.started = self.shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        clear = "\r\033[K" if self.terminal else ""
        rate = f"{self.done_bytes / 1e6:,.1f} MB, {self.bytes_per_second / 1e6:.1f} MB/s"
        end = f"{self.what}: {rate} in {self.seconds:.1f} s\n" if kind is None else ""
        print(clear + end, end="", file=sys.stderr, flush=True)

    def resume(self, done_bytes: int) -> None:
        """Counts from `done_bytes`, which earlier runs did and the rate leaves out."""
        self.done_bytes = self.first_bytes = done_bytes

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def bytes_per_second(self) -> float:
        return (self.done_bytes - self.first_bytes) / max(self.seconds, 1e-9)

    def update(self, done_bytes: int) -> None:
        self.done_bytes = done_bytes
        now = time.monotonic()
        if now - self.shown < (TERMINAL_SECONDS if self.terminal else LOG_SECONDS):
            return
        self.shown = now
        if self.terminal:
            print(f"\r{self.text()}\033[K", end="", file=sys.stderr, flush=True)
        else:
            print(self.text(), file=sys.stderr, flush=True)

    def text(self) -> str:
        rate = self.bytes_per_second
        speed = f"{self.done_bytes / 1e6:,.1f} MB, {rate / 1e6:.1f} MB/s"
        if not self.total_bytes:
            return f"{self.what}: {speed}"
        fraction = min(1.0, self.done_bytes / self.total_bytes)
        left = max(0, self.total_bytes - self.done_bytes) / rate if rate else float("inf")
        clock = f"{left // 60:.0f}:{left % 60:02.0f} left" if left < 360_000 else "stalled"
        filled = round(BAR_WIDTH * fraction)
        bar = f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] " if self.terminal else ""
        return f"{self.what}: {bar}{fraction:4.0%}, {speed}, {clock}"
