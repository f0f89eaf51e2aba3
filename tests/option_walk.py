"""Whether each value of a configuration is read: a walk that changes one at a time and compares what training is given.

``trained_with`` runs a training command up to ``fit`` and keeps what it would hand over. Two such hand-overs are
compared without compiling: by the data that they draw, and by the programs of their start, their loss, their optimizer,
their step and their evaluation, traced, with all removed that no result depends on.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.interpreters import partial_eval  # (tests alone look behind the public face)
from jax.extend import core as jax_core

from dreamer4.config import refuse_unread
from dreamer4.data.toy import ToyConfig
from dreamer4.errors import UserError
from dreamer4.models.discriminator import DiscriminatorConfig
from dreamer4.models.dynamics import DynamicsConfig
from dreamer4.models.latent_action import PairConfig
from dreamer4.models.next_frame import NextFrameConfig
from dreamer4.models.sequence_latent_action import SequenceConfig
from dreamer4.models.tokenizer import TokenizerConfig
from dreamer4.models.video_tokenizer import VideoTokenizerConfig
from dreamer4.nn import perceptual
from dreamer4.nn.quantizers import VQConfig
from dreamer4.nn.transformer import TransformerConfig
from dreamer4.objectives.maskgit import Sampling
from dreamer4.rollout.evaluation import Horizon
from dreamer4.train.fit import TrainConfig, make_program
from dreamer4.train.optimizer import make_optimizer


@dataclasses.dataclass(eq=False)
class HandOver:
    """What ``fit`` is given, and what follows from it."""

    objective: Any
    source: Any
    train: TrainConfig
    optimizer: Any
    frozen: Any

    @functools.cached_property
    def program(self) -> Any:
        return make_program(self.objective, self.source, self.train, self.optimizer)

    @functools.cached_property
    def start(self) -> tuple[str, Any]:
        """The program of the first parameters, and their shapes with those of the carry."""
        traced, shapes = jax.make_jaxpr(self.objective.init, return_shape=True)(jax.random.key(0))
        return signature(traced), shapes

    @functools.cached_property
    def sent(self) -> list[Any]:
        """What the host sends for the first steps."""
        batches = self.source.batches(0)
        found = list(itertools.islice(batches, 2 * len(self.source.shapes)))
        if hasattr(batches, "close"):
            batches.close()
        return found

    @functools.cached_property
    def clips(self) -> Any:
        return self.source.clips("validation", self.train.eval_clips, self.train.eval_length)

    @functools.cached_property
    def data(self) -> str:
        shape = self.source.shapes[0]
        made = trace(
            lambda sent, key: jax.tree.leaves(self.source.make(sent, key, shape)), self.sent[0], jax.random.key(0)
        )
        return made + digest((self.sent, self.clips)) + repr(self.source.shapes)

    @functools.cached_property
    def loss(self) -> str:
        (params, carry), shape, key = self.start[1], self.source.shapes[0], jax.random.key(0)

        def loss(params: Any, carry: Any, frozen: Any, sent: Any, key: Any, step: Any) -> Any:
            return self.objective.loss(params, carry, frozen, self.source.make(sent, key, shape), key, step)

        return trace(loss, params, carry, self.frozen, self.sent[0], key, jax.ShapeDtypeStruct((), jnp.int32))

    @functools.cached_property
    def update(self) -> str:
        """The program of one update, of the optimizer alone."""
        params = self.start[1][0]
        optimizer = make_optimizer(self.optimizer, self.train.steps, len(self.source.shapes))
        state = jax.eval_shape(optimizer.init, params)
        given = {"obj_fn": lambda p: sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(p))}
        return trace(
            lambda grads, state, params: optimizer.update(grads, state, params, **given)[0], params, state, params
        )

    @functools.cached_property
    def step(self) -> str:
        """The program of a step, and the key that the run starts from."""
        key = jax.random.key(0)
        made = trace(
            functools.partial(self.program.step, shape=self.source.shapes[0]),
            self.program.shapes,
            self.frozen,
            self.sent[0],
            key,
        )
        return made + digest(jax.random.key_data(self.program.init.args[0]))

    @property
    def some_clips(self) -> Any:
        return jax.tree.map(lambda x: x[:2], self.clips)

    @functools.cached_property
    def pictures(self) -> str:
        return trace(self.objective.pictures, self.start[1][0], self.frozen, self.some_clips, jax.random.key(0))

    @functools.cached_property
    def evaluate(self) -> str:
        return trace(self.objective.evaluate, self.start[1][0], self.frozen, self.some_clips, jax.random.key(0))

    def differs(self, other: "HandOver") -> bool:
        """Whether training from here and from there differ, the cheapest question first."""
        names = ["start", "loss", "pictures", "evaluate"] if self.objective != other.objective else []
        if self.source != other.source or self.train != other.train:
            names.insert(0, "data")
        if (self.optimizer, self.train.steps) != (other.optimizer, other.train.steps):
            names.append("update")
        if self.train != other.train:
            names.append("step")
        return any(self.part(name) != other.part(name) for name in names) or digest(self.frozen) != digest(other.frozen)

    def part(self, name: str) -> str:
        found = getattr(self, name)
        return found[0] + str(found[1]) if name == "start" else found


def trace(function: Callable, *arguments: Any) -> str:
    return signature(jax.make_jaxpr(function)(*arguments))


def signature(traced: Any) -> str:
    """The program without what no result depends on, its constants included."""
    jaxpr = partial_eval.convert_constvars_jaxpr(traced.jaxpr)
    needed, used = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    constants = [x for x, kept in zip(traced.consts, used, strict=False) if kept]
    return re.sub(r"0x[0-9a-f]+", "", str(needed)) + digest([constants, list(_constants(needed))])


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Those of programs inside a program, and arrays that stand in it."""
    for equation in jaxpr.eqns:
        yield from (x.val for x in equation.invars if isinstance(x, jax_core.Literal) and np.ndim(x.val))
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(value, "consts"):
                yield from value.consts
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _constants(inner)


def digest(tree: Any) -> str:
    found = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        found.update(f"{path}{np.shape(x)}".encode())
        if not isinstance(x, jax.ShapeDtypeStruct):
            x = jax.random.key_data(x) if jnp.issubdtype(getattr(x, "dtype", int), jax.dtypes.prng_key) else x
            found.update(np.asarray(x).tobytes())
    return found.hexdigest()


def trained_with(script: ModuleType, config: Any) -> HandOver:
    """What the command ``script`` gives to ``fit`` under ``config``."""
    given: list[HandOver] = []

    def keep(options, resolved, objective, source, train, optimizer, *, frozen=None, **_):
        given.append(HandOver(objective, source, train, optimizer, frozen))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "train_in", keep)
        script.train(config)
    return given[0]


def small(config: Any) -> Any:
    """A preset with all its switches, at a size that traces in a moment."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return config
    sizes = _SIZES.get(type(config), lambda c: {})(config)
    parts = {f.name: small(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **(parts | sizes))


def _transformer(c: TransformerConfig) -> dict[str, Any]:
    every = min(c.time_every, 2)
    kv_heads = None if c.kv_heads is None else 1
    return {
        "d_model": 16, "heads": 2, "kv_heads": kv_heads, "time_every": every, "depth": 2, "context": min(c.context, 4)
    }  # fmt: skip


def _train(c: TrainConfig) -> dict[str, Any]:
    time = min(c.clip_length, 3)
    return {
        "steps": 8, "batch_size": 4, "clip_length": time, "long_every": min(c.long_every, 2), "long_length": 2 * time,
        "eval_clips": 4, "eval_length": min(c.eval_length, 6),
    }  # fmt: skip


_SIZES: dict[type, Callable[[Any], dict[str, Any]]] = {
    TransformerConfig: _transformer,
    TrainConfig: _train,
    ToyConfig: lambda c: {"height": 32, "width": 32, "min_side": 4, "max_side": 8},
    TokenizerConfig: lambda c: {"patch": 8, "latents": 4, "bottleneck": 8},
    VideoTokenizerConfig: lambda c: {"patch": 8, "fsq": dataclasses.replace(c.fsq, levels=(4, 4))},
    DynamicsConfig: lambda c: {"spatial": 2, "registers": 1, "k_max": 4},
    PairConfig: lambda c: {"channels": (8,) * min(len(c.channels), 2), "code_width": 4},
    SequenceConfig: lambda c: {"patch": 8},
    VQConfig: lambda c: {"codes": 4},
    NextFrameConfig: lambda c: {
        "patch": 4, "tokenizer_channels": (8,), "decoder_channels": (8, 8), "tokenizer_blocks": 1, "decoder_blocks": 1,
        "registers": 1, "action_hidden": 8,
    },
    DiscriminatorConfig: lambda c: {"channels": (4, 4)},
    Horizon: lambda c: {"context": min(c.context, 2), "length": 3},
    Sampling: lambda c: {"steps": 2},
}  # fmt: skip


def values(path: str, value: Any, kind: Any, told: dict[str, Any]) -> list[Any]:
    """Other values of a field, of which one must make a difference. ``told`` has those of paths (or their ends) for
    which the type does not say enough, or a function that makes them. Raises KeyError where a field has no rule."""
    return [x for x in _values(path, value, kind, told) if x != value]


def _values(path: str, value: Any, kind: Any, told: dict[str, Any]) -> list[Any]:
    if choices := _choices(kind):
        return choices
    parts = path.split(".")
    for start in range(len(parts)):
        if (found := told.get(".".join(parts[start:]))) is not None:
            made: Any = found
            return made() if callable(made) else made
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, 2 * value, value // 2]
    if isinstance(value, float):
        return [value / 2, 2 * value] if value else [0.25]
    if isinstance(value, tuple) and value and all(isinstance(x, (int, float)) for x in value):
        return [tuple(2 * x for x in value), value[:-1], (*value, value[-1])]
    raise KeyError(f"{path}: no rule says what else than {value!r} it may be")


def _choices(kind: Any) -> list[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return list(typing.get_args(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        found = [x for a in typing.get_args(kind) for x in _choices(a)]
        return [*found, None] if found else []
    return []


def kinds(config: Any, where: str = "") -> dict[str, Any]:
    """The types of the fields of ``leaves``."""
    found: dict[str, Any] = {}
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        path, value = (f"{where}.{field.name}" if where else field.name), getattr(config, field.name)
        found |= kinds(value, path) if dataclasses.is_dataclass(value) else {path: hints[field.name]}
    return found


def changed(config: Any, path: str, value: Any) -> Any:
    """``config`` with one field changed."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


def unheard(base: Any, path: str, others: list[Any], heard: Callable[[Any], bool]) -> bool:
    """Whether no other value of a field of ``base`` is heard, nor all are refused."""
    refused = 0
    for value in others:
        try:
            config = changed(base, path, value)
            refuse_unread(config, base)
            if heard(config):
                return False
        except UserError:
            refused += 1
    return refused < len(others)


def noise_perceptual(script: ModuleType, patch: pytest.MonkeyPatch) -> None:
    """Gives ``script`` LPIPS without its extra: weights of noise, others for each net and file."""

    def weights(net: perceptual.Net, file: Path | None = None) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(len(str(file)))
        return {name: rng.uniform(0, 0.1, shape).astype(np.float32) for name, shape in perceptual._shapes(net).items()}

    patch.setattr(script, "available", lambda net: True)
    patch.setattr(script, "load_weights", weights)


def figures(given: HandOver) -> list[Any]:
    """What all steps of a run log, and its evaluation."""
    state, found = given.program.init(), []
    shapes = given.source.shapes
    batches = given.source.batches(0)
    for step in range(given.train.steps):
        shape = shapes[step % len(shapes)]
        state, metrics = given.program.step(state, given.frozen, next(batches), jax.random.key(given.train.seed), shape)
        found.append(digest(jax.device_get(metrics)))
    if hasattr(batches, "close"):
        batches.close()
    clips = given.source.clips("validation", given.train.eval_clips, given.train.eval_length)
    values = jax.jit(given.objective.evaluate)(state.best_params, given.frozen, clips, jax.random.key(given.train.seed))
    return [*found, digest(jax.device_get(values))]
