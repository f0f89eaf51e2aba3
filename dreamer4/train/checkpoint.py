"""Checkpoints that are whole or are not there: written in the background, checked before they are believed.

A folder of them looks like this; a step's folder appears by one rename, after its manifest::

    checkpoints/
      1200/  manifest.json  state/   the manifest holds the size and SHA-256 of every file under state/
      1500/  ...
      best                           the number of the best step by a metric, which the retention never deletes
      900.damaged/                   what a restore has found damaged and set aside
      tmp.1800/                      being written, or left by a crash: the next start removes it

Runs of before have a link in place of the file ``best``; copies of them, where links became folders, are read too.

Orbax writes ``state/`` as a flat mapping from names such as ``params/encoder/kernel`` to arrays. The structure around
the leaves (dataclasses, named tuples, None, empty containers) is the target's, which therefore always fits.
"""

import collections
import concurrent.futures
import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, SupportsFloat

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from dreamer4.errors import UserError
from dreamer4.files import array_folder, sync, write_atomically
from dreamer4.train.manifest import MANIFEST, DamageError, digest, read_manifest, seal, verify

FOLDER = "checkpoints"
Which = int | Literal["latest", "best"]

_CONFIG = "config.json"
_STATE = "state"
_BEST = "best"
_TEMPORARY = "tmp."
_DAMAGED = ".damaged"
_ZARR = ".zarray"
_UNWRITABLE = re.compile(r"[*?[]|gs:/")
"""Where orbax, which looks for its own files with a pattern and knows buckets by their names, would lose them."""
_log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, kept in ``folder``: the newest ``keep`` and the best.

    One process at a time may own a folder (``run_folder.RunFolder`` sees to that). With several hosts every one of
    them makes the same calls, on a file system that they share; the first writes the manifest and renames.
    """

    def __init__(self, folder: Path, keep: int = 3):
        if keep < 1:
            raise UserError(f"checkpoints to keep: {keep} asked, at least 1 is needed")
        check_folder(folder)
        _go_on_without_locks()
        self._folder, self._keep = folder, keep
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False))
        # One thread: its queue is the order of the saves, and Python waits for it before it exits.
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None
        logging.getLogger("absl").addFilter(_not_a_traceback_of_orbax)
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(_TEMPORARY + "*"):
                _remove(leftover)
            _renew_best(folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: PyTree,
        metrics: Mapping[str, SupportsFloat],
        config: dict[str, Any],
        best: str | None = None,
    ) -> None:
        """Copies ``state`` to the host, so that the next step may donate it, and writes it in the background.

        ``best`` names the metric by which ``checkpoints/best`` is chosen, higher being better; with a leading ``-``,
        lower. A checkpoint of the same step is replaced. Raises UserError where this save cannot start or the one
        before it failed; what was saved earlier stays as it was.
        """
        self.wait()
        arrays = named_leaves(state)
        manifest = {
            "step": step,
            "metrics": {name: float(v) if math.isfinite(float(v)) else None for name, v in metrics.items()},
            "config": config,
            "leaves": {name: _describe(leaf) for name, leaf in arrays.items()},
        }
        temporary = self._folder / f"{_TEMPORARY}{step}"
        try:
            if jax.process_index() == 0:
                temporary.mkdir(parents=True)
            self._checkpointer.save(array_folder(temporary / _STATE), args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = self._writer.submit(self._finish, step, manifest, best)

    def wait(self) -> None:
        """Returns when the last save is on the disk under its name; raises UserError if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits as ``wait`` does, and ends the threads; no save may follow."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            self._checkpointer.close()

    def latest(self) -> int | None:
        """The newest step, or None in a folder that never held a checkpoint.

        Raises UserError where there are damaged checkpoints alone: starting afresh there is for the user to decide.
        """
        self.wait()
        if steps := _steps(self._folder):
            return steps[0]
        if damaged := sorted(path.name for path in self._folder.glob("*" + _DAMAGED + "*")):
            raise UserError(
                f"{self._folder}: every checkpoint is damaged ({', '.join(damaged)}); "
                "put one back, or start afresh in another run folder"
            )
        return None

    def restore(self, target: PyTree, step: Which = "latest") -> tuple[PyTree, dict[str, Any]]:
        """The state saved at ``step``, with its manifest (``step``, ``metrics``, ``config``, ...).

        ``target`` has the structure of the state, of ``jax.ShapeDtypeStruct`` or arrays; each leaf is placed by the
        target's ``sharding``, or on the default device where it has none. "best" is the newest where no best was
        chosen. Every file is checked first. A damaged checkpoint is named in a warning, renamed to ``STEP.damaged``,
        and the one before it is used, unless ``step`` is a number. Raises UserError where no checkpoint is sound or
        its leaves are not the target's.
        """
        self.wait()
        chosen = _first_sound(self._folder, step, set_aside=True) if jax.process_index() == 0 else 0
        if jax.process_count() > 1:
            chosen = multihost_utils.broadcast_one_to_all(np.int32(chosen))
        folder = self._folder / str(chosen)
        manifest = read_manifest(folder)
        wanted = named_leaves(target)
        _check_leaves(folder, manifest["leaves"], {name: _describe(leaf) for name, leaf in wanted.items()})
        arrays = _read(folder, {name: _restore_args(leaf) for name, leaf in wanted.items()})
        return jax.tree.unflatten(jax.tree.structure(target), [arrays[name] for name in wanted]), manifest

    def _finish(self, step: int, manifest: dict[str, Any], best: str | None) -> None:
        temporary = self._folder / f"{_TEMPORARY}{step}"
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                _check_whole(temporary / _STATE, manifest["leaves"])
                seal(temporary, manifest)
                final = self._folder / str(step)
                if final.exists():
                    _remove(_rename(final, self._folder / f"{_TEMPORARY}{step}.replaced"))
                _rename(temporary, final)
                if best is not None:
                    _choose_best(self._folder, best)
                self._retain()
        except Exception as error:
            raise self._failure(step, error) from error

    def _retain(self) -> None:
        best = _best_step(self._folder)
        for step in _steps(self._folder)[self._keep :]:
            if step != best:
                # Renamed first: a half deleted checkpoint must not look like a damaged one.
                _remove(_rename(self._folder / str(step), self._folder / f"{_TEMPORARY}{step}.old"))

    def _failure(self, step: int, error: Exception) -> UserError:
        if jax.process_index() == 0:
            _remove(self._folder / f"{_TEMPORARY}{step}")
        steps = _steps(self._folder)
        left = f"the last good one is {steps[0]}" if steps else "there is none before it"
        # Tensorstore tells the whole way to a failed write; its last words are the reason.
        reason = re.split(r" \[\w+=", "".join(str(error).rpartition("Failed ")[1:]))[0]
        return UserError(f"{self._folder}: the checkpoint of step {step} could not be written ({reason}); {left}")


def check_folder(folder: Path) -> None:
    """Raises UserError where checkpoints could be written in ``folder`` and not be read back, by what it is called."""
    if found := _UNWRITABLE.search(array_folder(folder)):
        raise UserError(
            f"{folder}: checkpoints cannot be kept in a folder with {found[0]!r} in its path; choose another"
        )


def restore_params(
    run: Path, which: Which = "best", parts: Sequence[str] = ("params",)
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters of another run, as nested dicts of numpy arrays, and that run's configuration.

    ``run`` is the run's folder, which is only read. ``parts`` are names of the state's fields; the first that the
    checkpoint holds is taken, so ``("ema", "params")`` prefers the averages. The choice of the checkpoint is that of
    ``Checkpoints.restore``, except that a damaged one is passed over where it lies. Raises UserError where there is no
    sound checkpoint or it holds none of the parts.
    """
    folder = run / FOLDER / str(_first_sound(run / FOLDER, which, set_aside=False))
    manifest = read_manifest(folder)
    for part in parts:
        names = [name for name in manifest["leaves"] if name.startswith(part + "/")]
        if names:
            arrays = _read(folder, {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names})
            return nest({name.removeprefix(part + "/"): array for name, array in arrays.items()}), manifest["config"]
    held = sorted({name.partition("/")[0] for name in manifest["leaves"]})
    raise UserError(f"{folder}: holds {', '.join(held)}, but no {' or '.join(parts)}")


# ----- adoption -----


@dataclasses.dataclass(frozen=True)
class Identity:
    """Which checkpoint it is: its step, and the SHA-256 of its manifest in hex."""

    step: int
    digest: str

    def __str__(self) -> str:
        return f"step {self.step} ({self.digest[:12]})"


def adopt(run: Path, into: Path, which: Which = "best") -> Identity:
    """Copies a checkpoint of ``run``, and its ``config.json``, to ``into``, which ``restore_params`` then reads.

    A run that builds on another's parameters so stays whole when the other one goes on, moves or is deleted. The choice
    is that of ``restore_params``. The copy is verified and appears by one rename; the first host makes it. Where it is
    there already nothing is written; a damaged copy is renamed to ``STEP.damaged`` and made again.

    Raises UserError where ``run`` is not there or has no sound checkpoint, where ``into`` holds a sound copy of another
    one, and where the copy cannot be written.
    """
    step = _adopt(run, into, which) if jax.process_index() == 0 else 0
    if jax.process_count() > 1:
        step = multihost_utils.broadcast_one_to_all(np.int32(step))
    return _identify(into / FOLDER / str(step))


def find(run: Path, which: Which = "latest") -> Identity | None:
    """The sound checkpoint that ``restore_params`` would read, be it the run's own or an adopted one; None where there
    is none."""
    step, _ = _find_sound(run / FOLDER, which, set_aside=False)
    return None if step is None else _identify(run / FOLDER / str(step))


def _adopt(run: Path, into: Path, which: Which) -> int:
    if not run.is_dir():
        raise UserError(f"{run}: there is no such run")
    step = _first_sound(run / FOLDER, which, set_aside=False)
    try:
        held, _ = _find_sound(into / FOLDER, "latest", set_aside=True)
        if held is None:
            _copy(run, step, into)
            return step
    except OSError as error:
        raise UserError(f"{into}: checkpoint {step} of {run} cannot be copied there ({error.strerror})") from error
    copy, offered = _identify(into / FOLDER / str(held)), _identify(run / FOLDER / str(step))
    if copy != offered:
        raise UserError(
            f"{into}: holds a copy of {copy}, but {run} has {offered} to copy; use another run folder or --no-resume"
        )
    return held


def _copy(run: Path, step: int, into: Path) -> None:
    source, folder = run / FOLDER / str(step), into / FOLDER
    temporary = folder / f"{_TEMPORARY}{step}"
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(_TEMPORARY + "*"):
        _remove(leftover)
    try:
        for name in (MANIFEST, *read_manifest(source)["files"]):
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, temporary / name)
        verify(temporary)
        has_config = (run / _CONFIG).exists()
        if has_config:
            shutil.copyfile(run / _CONFIG, temporary / _CONFIG)
        sync(temporary, *temporary.rglob("*"))
        if has_config:
            (temporary / _CONFIG).replace(into / _CONFIG)
            sync(into)
        _rename(temporary, folder / str(step))
    finally:
        _remove(temporary)


def _identify(folder: Path) -> Identity:
    manifest = read_manifest(folder)
    return Identity(manifest["step"], digest(manifest))


# ----- leaves and their names -----


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as ``params/encoder/kernel``."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of which ``named_leaves`` makes these."""
    nested: dict[str, Any] = {}
    for name, array in arrays.items():
        *parents, last = name.split("/")
        branch = nested
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = array
    return nested


def _describe(leaf: Any) -> str:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
    return f"{dtype}[{','.join(map(str, np.shape(leaf)))}]"


def _check_leaves(folder: Path, found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    if not names:
        return
    shown = [f"{name}: {found.get(name, 'nothing')} there, {wanted.get(name, 'nothing')} expected" for name in names]
    more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
    raise UserError(f"{folder} does not hold the state expected here ({'; '.join(shown[:5])}{more})")


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    sharding = getattr(leaf, "sharding", None)
    return ocp.ArrayRestoreArgs(sharding=sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))


def _read(folder: Path, restore_args: dict[str, ocp.RestoreArgs]) -> dict[str, Any]:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        wanted = ocp.args.PyTreeRestore(dict.fromkeys(restore_args, 0), restore_args, partial_restore=True)
        return checkpointer.restore(array_folder(folder / _STATE), args=wanted)


def _check_whole(state: Path, leaves: Iterable[str]) -> None:
    """Raises ValueError unless every array can be found in what orbax wrote, with all of its parts: orbax itself takes
    an index that was never made for a success."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{array_folder(state)}/"}}
    store = ts.KvStore.open(spec).result()
    held = collections.Counter(key.decode().rpartition("/")[0] for key in store.list().result())
    for name in leaves:
        described = store.read(f"{name}/{_ZARR}").result()
        if described.state != "value":
            raise ValueError(f"Failed to find the array {name} among those that were written")
        zarr = json.loads(described.value)
        parts = math.prod(-(-size // part) for size, part in zip(zarr["shape"], zarr["chunks"], strict=True))
        if held[name] - 1 != parts:
            raise ValueError(f"Failed to find all of the array {name}: {held[name] - 1} of its {parts} parts are there")


def _go_on_without_locks() -> None:
    """Has orbax neither lock its files nor wait for each to be on the disk, as some network file systems cannot: one
    process owns the folder, and ``seal`` waits for all of them. Orbax has no option for it; a version without what is
    set here writes checkpoints all the same, where the file system can do both."""
    context = {"file_io_locking": {"mode": "none"}, "file_io_sync": jax.process_count() > 1}
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT.update(context)
    except (ImportError, AttributeError) as error:
        _log.warning("orbax locks and syncs its files, which not all network file systems can (%s)", error)


# ----- the folder -----


def _steps(folder: Path) -> list[int]:
    """The steps that have a folder, newest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdecimal()), reverse=True)


def _best_step(folder: Path) -> int | None:
    """The step that ``best`` names; None where nothing does, or with a warning where that step is not there."""
    step = _read_best(folder / _BEST)
    if step is not None and not (folder / str(step)).is_dir():
        _log.warning("%s: the best checkpoint, of step %s, is not there: the newest is used", folder, step)
        return None
    return step


def _read_best(best: Path) -> int | None:
    try:
        if best.is_symlink():
            return int(best.readlink().name)
        if best.is_dir():
            return read_manifest(best)["step"]
        return int(best.read_text()) if best.exists() else None
    except (OSError, ValueError, DamageError) as error:
        _log.warning("%s does not say which step is the best (%s): the newest is used", best, error)
        return None


def _renew_best(folder: Path) -> None:
    """Puts a file in the place of a link, or of the folder that a copy has made of one. A folder that does not say of
    which step it is may be the only copy of it, and is set aside."""
    best = folder / _BEST
    if not (best.is_symlink() or best.is_dir()):
        return
    step = _read_best(best)
    if not best.is_symlink():
        if step is None:
            _rename(best, _free_name(folder / f"{_BEST}{_DAMAGED}"))
            return
        if not (folder / str(step)).exists():
            _rename(best, folder / str(step))  # it alone was copied
        else:
            _remove(_rename(best, folder / f"{_TEMPORARY}{_BEST}"))
    if step is not None:
        write_atomically(best, f"{step}\n")  # which replaces a link itself


def _first_sound(folder: Path, which: Which, set_aside: bool) -> int:
    step, damages = _find_sound(folder, which, set_aside)
    if step is not None:
        return step
    if damages:
        raise UserError(f"{folder}: no sound checkpoint ({'; '.join(damages)})")
    raise UserError(f"{folder}: no checkpoint{f' of step {which}' if isinstance(which, int) else ''}")


def _find_sound(folder: Path, which: Which, set_aside: bool) -> tuple[int | None, list[str]]:
    """The step that is wanted and sound, or None, and what is wrong with those that were tried before it."""
    damages = []
    for step in _candidates(folder, which):
        path = folder / str(step)
        try:
            verify(path)
            return step, damages
        except DamageError as damage:
            damages.append(f"{step}: {damage.what}")
            _log.warning("%s; it is not used", damage)
            if set_aside:
                _rename(path, _free_name(folder / f"{step}{_DAMAGED}"))
    return None, damages


def _candidates(folder: Path, which: Which) -> Iterable[int]:
    steps = _steps(folder)
    if isinstance(which, int):
        return [step for step in steps if step == which]
    best = _best_step(folder) if which == "best" else None
    return sorted(steps, key=lambda step: step != best)


def _choose_best(folder: Path, metric: str) -> None:
    """Has ``best`` name the checkpoint with the best ``metric``, the earliest of equals.

    All of them are asked, not the newest alone: a process killed between a rename and this loses nothing.
    """
    name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
    scores = {}
    for step in _steps(folder):
        try:
            value = read_manifest(folder / str(step))["metrics"].get(name)
        except DamageError:
            continue
        if value is not None:
            scores[step] = sign * value
    if scores:
        step = max(scores, key=lambda step: (scores[step], -step))
        write_atomically(folder / _BEST, f"{step}\n")
        sync(folder)


def _free_name(path: Path) -> Path:
    free, n = path, 1
    while free.exists():
        n += 1
        free = path.with_name(f"{path.name}-{n}")
    return free


def _rename(path: Path, to: Path) -> Path:
    path.rename(to)
    sync(to.parent)
    return to


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _not_a_traceback_of_orbax(record: logging.LogRecord) -> bool:
    # Orbax logs a failed write with a traceback per thread before it raises the error, which here becomes a sentence.
    return not (record.exc_info and "/orbax/checkpoint/" in Path(record.pathname).as_posix())
