"""World models that anyone can train, trust and play, in pure functional JAX."""

import importlib
import importlib.metadata
import os
from typing import TYPE_CHECKING, Any

# On CPU, XLA reports an error for every program that it loads from its own compilation cache, a screenful each, because
# it compares tuning hints as if they were instructions. It reads this variable once, when jax is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Before 0.12, jax on CPU hands some sums to a library that gets them wrong (docs/decisions/0003); this leaves it
# the matrix products alone. XLA reads it when it first computes.
if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 12):
    flags = os.environ.get("XLA_FLAGS", ""), "--xla_cpu_experimental_ynn_fusion_type=individual_dot"
    os.environ["XLA_FLAGS"] = " ".join(flags).strip()

from dreamer4.batch import Batch

if TYPE_CHECKING:
    from dreamer4.world import load

__version__ = importlib.metadata.version("dreamer4-jax")
__all__ = ["Batch", "__version__", "load"]


def __getattr__(name: str) -> Any:
    # At its first use: who wants a batch should not wait for the models and checkpoints that `load` imports.
    if name == "load":
        return importlib.import_module("dreamer4.world").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
