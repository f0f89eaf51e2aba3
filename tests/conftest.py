import os
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

ROOT = Path(__file__).parent

# The programs of tests, and of the commands that tests start, take much longer to compile than to run. XLA reads this
# when it first computes. `XLA_FLAGS= uv run pytest` compiles as users do. jax 0.12 has no older way of making loops.
QUICK = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 12):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICK)


def pytest_collection_modifyitems(items):
    """The tests of whole commands first: they are few and long, and a process that got one last would end last."""
    items.sort(key=lambda item: item.path.parent != ROOT)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Programs of one file are of no use to the next, and a gigabyte after a while."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """A function from a kind of world to the folder of a run of it that all files share, whose parameters are noise."""
    from noise_worlds import noise_worlds  # not above: this file is read before jaxtyping's hook is there

    return noise_worlds(tmp_path_factory.mktemp("noise"))


@pytest.fixture(scope="module")
def kept_compilations(tmp_path_factory):
    """For a file whose runs compile the same few programs: each is compiled once."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}

    def use(values):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)

    use(options)
    yield
    use(before)
