"""Folders of numbered pictures: ``EPISODE/NUMBER.png``, with an optional ``actions.json`` in each."""

import dataclasses
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePath

import numpy as np

from dreamer4.batch import ActionComponent
from dreamer4.data.formats.images import BadImageError, read_image
from dreamer4.data.formats.labels import Labels, find_common_component, read_labels
from dreamer4.data.formats.names import is_hidden, natural_order, printable
from dreamer4.data.ingest import Event, Footage, Frame, Gap, Lost, Recording
from dreamer4.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
ACTIONS = "actions.json"
NUMBERED = re.compile("(.*?)([0-9]+)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class _Episode:
    """A folder with its pictures' file names by their numbers, in order; ``prefix`` is before a name that is told."""

    id: str
    folder: Path
    prefix: str
    pictures: dict[int, str]
    labels: Labels | None

    @property
    def is_labelled(self) -> bool:
        return self.labels is not None and self.labels.action is not None


def open_png(source: Path) -> Footage:
    """Opens a folder of episodes, or one that is an episode itself.

    An episode is a folder of pictures whose names end in a number, ``7.png``, ``0007.png`` or ``frame_7.jpg``, in the
    order of these numbers; where one is missing there is a gap. Hidden files, and such as are no numbered pictures, are
    ignored. ``actions.json`` says what led to each frame, as ``dreamer4.data.formats.labels`` has it, with an entry for
    each number from the episode's first to its last, whether or not its picture is there: a missing picture moves no
    action. Where some episodes have actions, the others are not ``labelled``.

    Raises UserError where there is no numbered picture, where an episode has a number twice or names that differ in
    more than the number, and for an ``actions.json`` that is not as above.
    """
    episodes = _find_episodes(source)
    component = find_common_component({str(e.folder / ACTIONS): e.labels for e in episodes if e.labels})
    recordings = [Recording(e.id, partial(_events, e, component), len(e.pictures), e.is_labelled) for e in episodes]
    return Footage(recordings, (component,) if component else (), notes=tuple(n for e in episodes for n in _notes(e)))


def _notes(episode: _Episode) -> Iterator[str]:
    """That numbers are no count of frames, so that each picture would be an episode of its own."""
    numbers = np.array(list(episode.pictures), dtype=object)  # of any size
    steps = sorted(np.diff(numbers).tolist())
    if steps and (usual := steps[(len(steps) - 1) // 2]) > 1:
        first, second, *_ = episode.pictures.values()
        yield (
            f"{episode.id}: most numbers are {usual} or more apart ({printable(first)},"
            f" {printable(second)}, ...), and where one is missing there is a cut; count the pictures one by one where"
            " they follow each other"
        )


def _find_episodes(source: Path) -> list[_Episode]:
    folders, files = _list_folder(source)
    inside = {name: _list_folder(source / name)[1] for name in sorted(folders, key=natural_order)}
    found = {name: pictures for name in inside if (pictures := _find_pictures(source / name, inside[name]))}
    own = _find_pictures(source, files)
    if own and found:
        raise UserError(
            f"{source}: pictures found both in it ({next(iter(own.values()))}) and in its folders"
            f" ({next(iter(found))}), expected one or the other"
        )
    if own:
        return [_episode(source, source.resolve().name, "", own, files)]
    if not found:
        names = ", ".join([*files, *folders][:3])
        raise UserError(
            f"{source}: no numbered picture found, expected EPISODE/NUMBER{SUFFIXES[0]}; there are {len(files)} files"
            f" and {len(folders)} folders" + (f": {names}" if names else "")
        )
    if ACTIONS in files:
        raise UserError(f"{source / ACTIONS}: found beside the episodes, expected one in the folder of each")
    return [_episode(source / name, name, f"{name}/", pictures, inside[name]) for name, pictures in found.items()]


def _list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """The names of its folders and of all else in it, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            shown = [(entry.name, entry.is_dir()) for entry in entries if not is_hidden(entry.name)]
    except OSError as e:
        raise UserError(f"{folder}: {e.strerror}, expected a folder of pictures or of episodes") from None
    shown.sort()
    return [name for name, is_dir in shown if is_dir], [name for name, is_dir in shown if not is_dir]


def _find_pictures(folder: Path, files: list[str]) -> dict[int, str]:
    """The files that are numbered pictures, by their numbers in order."""
    found: dict[int, str] = {}
    series: dict[str, str] = {}  # the first file by what is before its number
    for name in files:
        match = NUMBERED.fullmatch(PurePath(name).stem)
        if PurePath(name).suffix.lower() not in SUFFIXES or not match:
            continue
        number = int(match[2])
        if number in found:
            raise UserError(f"{folder}: {found[number]} and {name} found, expected one picture of number {number}")
        found[number] = name
        series.setdefault(match[1], name)
    if len(series) > 1:
        names = " and ".join(list(series.values())[:2])
        raise UserError(f"{folder}: {names} found, expected names that differ in their numbers alone")
    return dict(sorted(found.items()))


def _episode(folder: Path, name: str, prefix: str, pictures: dict[int, str], files: list[str]) -> _Episode:
    labels = None
    if ACTIONS in files:
        first, last = min(pictures), max(pictures)
        labels = read_labels(folder / ACTIONS, last - first + 1, f"each number from {first} to {last}")
    return _Episode(printable(name), folder, prefix, pictures, labels)


def _events(episode: _Episode, component: ActionComponent | None) -> Iterator[Event]:
    first = last = min(episode.pictures)
    for number, file in episode.pictures.items():
        name = printable(episode.prefix + file)
        if number > last + 1:
            yield Gap(name, "missing numbers")
        last = number
        try:
            image = read_image(episode.folder / file)
        except BadImageError as e:
            yield Lost(name, str(e))
            continue
        yield Frame(name, image, **episode.labels.of(number - first, component) if episode.labels else {})
