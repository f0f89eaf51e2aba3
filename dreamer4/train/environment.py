"""The process a run lives in: how it is set up, and what it was made of."""

import contextlib
import ctypes
import errno
import functools
import importlib.metadata
import io
import json
import logging
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "dreamer4-jax")
_DAMAGED_ENTRY = re.compile(r"Error reading persistent compilation cache entry for '(.+?)':")
_log = logging.getLogger(__name__)


def prepare_process(compilation_cache: bool = True) -> None:
    """Sets up memory and, unless told otherwise, jax's persistent compilation cache in the user's cache folder.

    To be called before jax first computes: its threads keep the memory arenas that they started with.
    ``JAX_COMPILATION_CACHE_DIR`` and ``XDG_CACHE_HOME`` are respected; a folder that cannot be written is passed over
    with a warning, and damaged entries are removed.
    """
    _keep_freed_memory()
    if compilation_cache:
        _cache_compilations()
    else:
        jax.config.update("jax_enable_compilation_cache", False)


def explain(error: Exception) -> str | None:
    """The sentence for an error that follows from how jax was set up, by its environment variables; None for others."""
    if platforms := getattr(jax.config, "jax_platforms", None):
        try:
            jax.devices()
        except Exception as reason:  # of several classes, between versions
            found = f" ({reason})" if str(reason) else ""
            return f"JAX_PLATFORMS: {platforms!r} found, but no such device can be used{found}; unset it to use any"
    words = str(error)
    if "jax_numpy_rank_promotion" in words:
        return "JAX_NUMPY_RANK_PROMOTION: 'raise' found, 'allow' or 'warn' expected, since models add biases"
    if re.search(r"Disallowed \S+ transfer", words):
        return f"JAX_TRANSFER_GUARD: {words.partition(':')[2].strip()}; 'allow' or 'log' expected"
    return None


@contextlib.contextmanager
def output_that_may_go() -> Iterator[None]:
    """While it lasts, what is printed goes nowhere once its reader has gone, as in ``| head -1`` or after a terminal
    was closed: what is printed is not the work."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    for name, stream in before.items():
        if stream is not None and stream is getattr(sys, f"__{name}__"):  # not what a notebook or a test put there
            setattr(sys, name, _forgiving(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            if (current := getattr(sys, name)) is not None:
                with contextlib.suppress(OSError):
                    current.flush()
            setattr(sys, name, stream)


def _forgiving(stream: Any) -> io.TextIOWrapper:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Output(io.FileIO):
    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            return len(data)


def describe() -> dict[str, Any]:
    """What a run was made of: versions, commit, devices. It names no path and no host."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "backend": devices[0].platform,
        "devices": {kind: sum(d.device_kind == kind for d in devices) for kind in {d.device_kind for d in devices}},
        "processes": jax.process_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "git": _git_state(),
    }


def write_environment(folder: Path) -> None:
    """Leaves what ``describe`` says in ``folder``, from the first host alone."""
    if jax.process_index() == 0:
        (folder / "environment.json").write_text(json.dumps(describe(), indent=2) + "\n")


def _keep_freed_memory() -> None:
    # XLA on CPU frees the buffers of a step at its end, and glibc gives blocks of that size back to the system, so
    # that every step faults all of its pages in again: a third of the speed of a small model. One arena that neither
    # maps blocks on their own nor trims its top keeps them for the next step.
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_ARENA_MAX, 1)


def _cache_compilations() -> None:
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or f"{caches}/dreamer4/xla"
    try:
        if "://" not in folder:  # a bucket needs no folder
            folder = _writable(Path(folder))
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        _log.warning("compilations are not kept for the next start: %s", error)
        jax.config.update("jax_enable_compilation_cache", False)
        return
    if "://" not in folder:
        warnings.showwarning = functools.partial(_remove_damaged, Path(folder), warnings.showwarning)
    jax.config.update("jax_compilation_cache_dir", folder)
    # A run starts with dozens of small compilations; by default jax keeps only those of more than a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _remove_damaged(folder: Path, show: Callable[..., None], message: Any, *rest: Any, **named: Any) -> None:
    """Removes what jax warns of: it compiles such a program anew, but keeps it only where there is no entry. The
    warning names the program, of which there may be several entries."""
    if not (found := _DAMAGED_ENTRY.match(str(message))):
        show(message, *rest, **named)
        return
    for entry in folder.iterdir():
        if entry.name.startswith(f"{found[1]}-"):
            with contextlib.suppress(OSError):
                entry.unlink()
    _log.warning("%s: a damaged compilation of %s is removed and made anew", folder, found[1])


def _writable(folder: Path) -> str:
    folder = folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written")
    return str(folder)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """The commit of the checkout this package lies in, and whether it was changed since; None elsewhere."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        commit = _git(checkout, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
