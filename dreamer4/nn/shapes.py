"""A state of many arrays in a few words."""

import dataclasses
from typing import Any


def shapes_repr(self: Any) -> str:
    """The ``__repr__`` of a dataclass of arrays: their types and shapes, not their numbers."""

    def word(x: Any) -> str:
        return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") and hasattr(x, "shape") else repr(x)

    fields = (f"{field.name}={word(getattr(self, field.name))}" for field in dataclasses.fields(self))
    return f"{type(self).__name__}({', '.join(fields)})"
