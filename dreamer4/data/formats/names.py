"""Names of files from outside: their order, and how they are told."""

import os
import re
from collections.abc import Iterator, Mapping


def natural_order(name: str) -> tuple[list[int | str], str]:
    """The key by which names sort as people count: ``ep10`` after ``ep9``."""
    parts = re.split("([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def is_hidden(name: str) -> bool:
    """Whether a name starts with a dot, as those of the files do that macOS puts beside others (``._a.png``)."""
    return name.startswith(".")


def describe_ignored(ignored: Mapping[str, tuple[str, ...]], expected: str) -> Iterator[str]:
    """Sentences on the arrays that are not read, by the name of the file that they are in; files with the same ones
    share a sentence."""
    files: dict[tuple[str, ...], list[str]] = {}
    for file, names in ignored.items():
        files.setdefault(names, []).append(file)
    for names, of in files.items():
        if names:
            more = f" and {len(of) - 1} more" if len(of) > 1 else ""
            yield f"{of[0]}{more}: ignored {', '.join(map(repr, names))}; what is read is {expected}"


def printable(name: str) -> str:
    """The name with bytes that are no UTF-8, which a file system allows, as ``\\\\xNN``."""
    return os.fsencode(name).decode(errors="backslashreplace")
