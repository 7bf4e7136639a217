"""Python source as a text corpus that every machine has: the files of an installed package, or the standard library.

The docstrings make clean English; the whole source, with every character labelled docstring, comment or code, makes a
corpus on which one can see what kind of token gets selected.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from rho.errors import DataError
from rho.runs import hash_file, hash_json

Span = tuple[int, int, str]

MAX_FILE_BYTES = 200_000
# Tests and vendored copies would fill the corpus with near-duplicates; the rest is not the library's own text.
LEFT_OUT = re.compile(
    r"tests?|testing|_vendor|__pycache__|site-packages|dist-packages|idlelib|lib2to3|turtledemo|ensurepip|config-.*"
)
# The line ends of Python's parser: str.splitlines knows more of them, and the line numbers would differ.
LINE = re.compile(r"([^\r\n]*)(?:\r\n|\r|\n|\Z)")


def package_files(package: str) -> dict[str, Path]:
    """Relative path -> file, for the Python files of a package, which is found but not imported.

    The order is that of the SHA-256 of the relative path, so any prefix is a fair sample of the package.

    Args:
        package: a top-level package or module, or `stdlib` for the whole standard library.

    Raises:
        DataError: there is no such package, or it holds no Python source.
    """
    files = {name: path for place in _locate(package) for name, path in _python_files(place)}
    if not files:
        raise DataError(f"{package}: expected a package with Python source, found no .py file. Name another package.")
    return dict(sorted(files.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest()))


def package_digest(package: str) -> str:
    """The package's version and the SHA-256 over the sorted (relative path, content hash) list of its files."""
    content = hash_json(sorted((name, hash_file(path)) for name, path in package_files(package).items()))
    return f"{_version(package)} {content}"


def docstrings(text: str) -> str | None:
    """Every docstring of a Python file, dedented and joined by blank lines; None if the file does not parse."""
    tree = _parse(text)
    if tree is None:
        return None
    cleaned = (ast.get_docstring(owner) for owner, _ in _docstring_owners(tree))
    # A docstring may hold the escape of a lone surrogate, which is no character of any text.
    return "\n\n".join(doc for doc in cleaned if doc).encode("utf-8", "replace").decode()


def label_spans(text: str) -> list[Span] | None:
    """Label every character of a Python file: `[start, end)` ranges in order; None if the file does not parse.

    The labels are "docstring" (the literal with its quotes), "comment" (from the hash to the end of its line) and
    "code" (everything else).
    """
    tree = _parse(text)
    if tree is None:
        return None
    lines = [(match.start(), match[1]) for match in LINE.finditer(text)]
    try:
        found = sorted([*_docstring_spans(tree, lines), *_comment_spans(lines)])
    except (tokenize.TokenError, SyntaxError):
        return None
    spans: list[Span] = []
    covered = 0
    for start, end, label in found:
        if start < covered:  # a comment between the parts of a docstring in brackets
            continue
        if start > covered:
            spans.append((covered, start, "code"))
        spans.append((start, end, label))
        covered = end
    if covered < len(text):
        spans.append((covered, len(text), "code"))
    return spans


def _locate(package: str) -> list[Path]:
    """The folders, or the one file, that a package's source lies in."""
    if package == "stdlib":
        return [Path(sysconfig.get_path("stdlib"))]
    try:
        # A dotted name would import its parent.
        spec = importlib.util.find_spec(package) if "." not in package else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise DataError(
            f"{package}: expected an installed top-level package or 'stdlib', found none of this name. "
            "Install the package or correct the name."
        )
    return [Path(place) for place in spec.submodule_search_locations or [spec.origin or ""]]


def _python_files(place: Path) -> Iterator[tuple[str, Path]]:
    if place.is_file() and place.suffix == ".py":
        yield place.name, place
    for folder, inner, names in os.walk(place):
        inner[:] = [name for name in inner if not LEFT_OUT.fullmatch(name)]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            if path.is_file() and path.stat().st_size < MAX_FILE_BYTES:
                yield path.relative_to(place).as_posix(), path


def _version(package: str) -> str:
    if package == "stdlib":
        return platform.python_version()
    distributions = importlib.metadata.packages_distributions().get(package)
    return importlib.metadata.version(distributions[0]) if distributions else "unversioned"


def _parse(text: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
            return None


Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstring_owners(tree: ast.Module) -> list[tuple[Owner, ast.Constant]]:
    """Everything that has a docstring, with its literal, in the order of the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, Owner) and node.body and isinstance(node.body[0], ast.Expr):
            literal = node.body[0].value
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                found.append((node, literal))
    return sorted(found, key=lambda pair: (pair[1].lineno, pair[1].col_offset))


def _docstring_spans(tree: ast.Module, lines: list[tuple[int, str]]) -> Iterator[Span]:
    def offset(line: int, column: int) -> int:
        start, content = lines[line - 1]
        return start + len(content.encode()[:column].decode())  # ast counts UTF-8 bytes

    for _, literal in _docstring_owners(tree):
        assert literal.end_lineno is not None and literal.end_col_offset is not None
        yield (
            offset(literal.lineno, literal.col_offset),
            offset(literal.end_lineno, literal.end_col_offset),
            "docstring",
        )


def _comment_spans(lines: list[tuple[int, str]]) -> Iterator[Span]:
    contents = (content + "\n" for _, content in lines)
    for token in tokenize.generate_tokens(lambda: next(contents, "")):
        if token.type == tokenize.COMMENT:
            start = lines[token.start[0] - 1][0] + token.start[1]
            yield start, start + len(token.string), "comment"
