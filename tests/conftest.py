from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent


def pytest_collection_modifyitems(items):
    """The tests of whole commands first: they are few and long, and a process that got one last would end last."""
    items.sort(key=lambda item: item.path.parent != ROOT)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs of one file are of no use to the next, and a gigabyte after a while."""
    yield
    jax.clear_caches()
