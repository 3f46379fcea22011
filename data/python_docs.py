"""A corpus that needs no download: the prose that every Python installation carries.

The docstrings of the standard library, one document per module, and the language reference that
`help()` shows (pydoc's topics), one document per topic: about 1.6 MB of English. The source files
are parsed, never imported, so nothing of them runs.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

try:
    from pydoc_data.topics import topics
except ImportError:  # some distributions leave it out
    topics = {}

# Left out: what Linux distributions ship as separate packages, so that the corpus depends on the
# version of Python and not on who built it.
SEPARATE_PACKAGES = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtle.py"),
    *("turtledemo", "lib2to3", "distutils", "ensurepip", "venv", "pydoc_data"),
}
MIN_DOCUMENT_CHARS = 200  # shorter ones are generated one-liners (the codec tables)
HAS_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def library_modules(library: Path) -> list[Path]:
    """The source files of the standard library, sorted, without `SEPARATE_PACKAGES`."""
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    return sorted(path for path in files if SEPARATE_PACKAGES.isdisjoint(path.parts))


def docstrings(source: bytes) -> str:
    """The docstrings of a module, its classes and functions, blank lines between them."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, HAS_DOCSTRING)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return "\n\n".join(text for node in nodes if (text := ast.get_docstring(node)))


def drop_seen_paragraphs(text: str, seen: set[str]) -> str:
    """`text` without the paragraphs in `seen`, to which it adds its own.

    Inherited methods repeat their docstrings, and broad topics contain narrow ones whole: without
    this, much of a held-out document would stand in the training text too.
    """
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def library_texts(library: Path) -> Iterator[str]:
    """The help topics, then each module's docstrings, in an order that never changes."""
    yield from topics.values()
    for module in library_modules(library):
        yield docstrings((library / module).read_bytes())


class PythonDocs:
    """The documents; which and in what order depends on the version of Python alone."""

    def __iter__(self) -> Iterator[str]:
        seen: set[str] = set()
        for text in library_texts(Path(sysconfig.get_path("stdlib"))):
            document = drop_seen_paragraphs(text, seen)
            if len(document) >= MIN_DOCUMENT_CHARS:
                yield document

    def identity(self) -> list[str]:
        return ["python-docs", sys.version]
