import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.maskgit import MaskGIT, MaskGITConfig, init_maskgit, maskgit_flops
from dreamer4.models.patches import sinusoids
from dreamer4.nn.quantizers import FSQConfig, fsq_codes
from dreamer4.nn.transformer import TransformerConfig

ACTIONS = (
    ActionComponent("button", "categorical", 5),
    ActionComponent("stick", "continuous", 2),
    ActionComponent("code", "categorical", 4, inferred=True),
)
FSQ = FSQConfig((3, 2), rounding="symmetric")
SMALL = TransformerConfig(
    d_model=16, depth=4, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=2, context=3, condition="film"
)
MODEL = MaskGIT(MaskGITConfig(transformer=SMALL), FSQ, (2, 2), ACTIONS)
BATCH, TIME, TOKENS = 2, 5, 4  # two time layers of three frames reach back over all of it


def with_transformer(model=MODEL, **fields):
    config = dataclasses.replace(model.config, transformer=dataclasses.replace(model.config.transformer, **fields))
    return dataclasses.replace(model, config=config)


ZERO = with_transformer(condition="adaln_zero")
FACTORISED = dataclasses.replace(MODEL, config=dataclasses.replace(MODEL.config, factorised=True))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(batch=BATCH):
    """What the model is called with, by name; half of the tokens are hidden."""
    rng = np.random.default_rng(0)
    return {
        "codes": fsq_codes(FSQ, jnp.asarray(rng.integers(0, FSQ.codes, (batch, TIME, TOKENS)))),
        "masked": jnp.asarray(rng.permuted(np.broadcast_to([True, True, False, False], (batch, TIME, 4)), axis=-1)),
        "action": fake_batch(BatchSpec(batch, TIME, 1, 1, actions=ACTIONS), seed=2).action,
        "labelled": jnp.ones((batch, TIME), bool),
    }


def at(given, t):
    """Frame ``t`` of the inputs alone."""
    return jax.tree.map(lambda x: x[:, t : t + 1], given)


def draw(model):
    """Parameters, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key in ("kernel", "weight"):
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray((1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise).astype(leaf.dtype))

    shapes = jax.eval_shape(functools.partial(init_maskgit, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


def apply(model, params, given, cache=None):
    return model.apply({"params": params}, **given, cache=cache)


run = jax.jit(apply, static_argnums=0)
PARAMS = {model: draw(model) for model in (MODEL, ZERO)}
age = np.subtract.outer(np.arange(TIME), np.arange(TIME))


def test_logits_are_causal_in_codes_and_actions():
    given, weights = inputs(1), normal(8, TOKENS, FSQ.codes)

    def outputs(felt):
        action = given["action"] | {"stick": felt["stick"]}
        logits = apply(MODEL, PARAMS[MODEL], given | {"codes": felt["codes"], "action": action})[0]
        return (logits[0] * weights).sum((1, 2))

    felt = {"codes": given["codes"], "stick": given["action"]["stick"]}
    jacobian = jax.jit(jax.jacrev(outputs))(felt)
    moved = jax.tree.map(lambda x: np.abs(x[:, 0]).reshape(TIME, TIME, -1).sum(-1), jacobian)
    for name, far in moved.items():
        # The action of a frame is what led to it: frame t feels action t, and no later one.
        assert not far[age < 0].any(), name
        assert far[age >= 0].all(), name
    # What is hidden is not felt by any token, what is not hidden is.
    far = np.abs(jacobian["codes"][:, 0]).sum((0, 3))
    np.testing.assert_array_equal(far > 0, ~np.asarray(given["masked"][0]))


def test_drafts_are_told_as_in_a_dream():
    given, model = inputs(), ZERO
    drafts = jax.jit(lambda params: model.apply({"params": params}, **given, drafts=True)[0])(PARAMS[model])
    cache, parts = model.cache(BATCH), []
    for t in range(TIME):  # the ring of 3 wraps
        now = at(given, t)
        parts.append(run(model, PARAMS[model], now, cache)[0])
        cache = run(model, PARAMS[model], now | {"masked": jnp.zeros_like(now["masked"])}, cache)[1]
    np.testing.assert_allclose(np.concatenate(parts, 1), drafts, atol=1e-5)


def test_frame_by_frame_equals_the_whole_clip():
    given, model = inputs(), ZERO
    whole = run(model, PARAMS[model], given)[0]
    cache, parts = model.cache(BATCH), []
    for t in range(TIME):  # the ring of 3 wraps
        logits, cache, _ = run(model, PARAMS[model], at(given, t), cache)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5)
    assert np.abs(whole[:, 1:] - whole[:, :-1]).max() > 0.1


def test_unlabelled_frames_feel_what_was_inferred_alone():
    given = inputs()
    hidden = given | {"labelled": jnp.zeros((BATCH, TIME), bool)}
    for name, value in given["action"].items():
        other = {"action": given["action"] | {name: jnp.where(value == 0, 1, 0).astype(value.dtype)}}
        moved = [
            np.abs(run(MODEL, PARAMS[MODEL], x | other)[0] - run(MODEL, PARAMS[MODEL], x)[0]).max((2, 3)) > 1e-4
            for x in (hidden, given)
        ]
        assert [x.all() for x in moved] == [name == "code", True], name
        assert moved[0].any() == (name == "code")


def test_every_parameter_has_a_gradient():
    given, model = inputs(), ZERO
    weights = normal(5, BATCH, TIME, TOKENS, FSQ.codes)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(weights * apply(model, p, given)[0])))(PARAMS[model])
    leaves = {jax.tree_util.keystr(p, simple=True): x for p, x in jax.tree_util.tree_leaves_with_path(gradient)}
    assert [name for name, leaf in leaves.items() if not leaf.any()] == []


def test_probabilities_of_all_codes_sum_to_one():
    ids = jnp.arange(FSQ.codes)
    for model, heads in ((MODEL, (6,)), (FACTORISED, (3, 2))):
        assert model.heads == heads
        shapes = jax.eval_shape(functools.partial(init_maskgit, model), jax.random.key(0))
        assert shapes["to_logits"]["bias"].shape == (sum(heads),)
        logits = normal(6, BATCH, TIME, TOKENS, sum(heads))
        every = jax.vmap(model.log_prob, (None, 0))(logits, jnp.broadcast_to(ids[:, None, None, None], (6, 2, 5, 4)))
        np.testing.assert_allclose(np.exp(every).sum(0), 1, rtol=1e-5)
        np.testing.assert_array_equal(model.pick(logits, jax.random.key(0), 0.0), every.argmax(0))


def test_a_factorised_head_says_one_number_of_the_code():
    logits = normal(3, 5)  # of three and of two levels
    first, second = (x - np.log(np.exp(x).sum()) for x in (logits[:3], logits[3:]))
    ids = jnp.arange(FSQ.codes)
    levels = np.asarray((fsq_codes(FSQ, ids) + 1) / np.asarray([1, 2])).round().astype(int)
    expected = first[levels[:, 0]] + second[levels[:, 1]]
    found = FACTORISED.log_prob(jnp.broadcast_to(logits, (6, 5)), ids)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("model", [MODEL, FACTORISED], ids=["joint", "factorised"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_codes_are_drawn_as_often_as_they_are_likely(model, temperature):
    logits, draws = normal(4, sum(model.heads)), 20000
    ids = model.pick(jnp.broadcast_to(logits, (draws, *logits.shape)), jax.random.key(1), temperature)
    every = model.log_prob(jnp.broadcast_to(logits / temperature, (6, *logits.shape)), jnp.arange(6))
    np.testing.assert_allclose(np.bincount(ids, minlength=6) / draws, np.exp(every), atol=0.015)


def test_structured_start():
    config = dataclasses.replace(MODEL.config, start="structured")
    model = with_transformer(dataclasses.replace(MODEL, config=config), kv_heads=2)
    params = jax.jit(functools.partial(init_maskgit, model))(jax.random.key(0))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(params["to_logits"]))  # all codes are equally likely
    np.testing.assert_allclose(params["places"], sinusoids((2, 2), 16), atol=1e-6)
    space, time = (params["transformer"]["blocks"][name]["attention"] for name in ("space_0", "time"))
    np.testing.assert_array_equal(space["query"]["kernel"], space["key"]["kernel"])
    assert (time["query"]["kernel"] != time["key"]["kernel"]).any()


def test_actions_need_a_way_in():
    with pytest.raises(UserError, match=r"transformer\.condition: none found, film or adaln_zero expected"):
        MaskGITConfig(transformer=TransformerConfig())


def multiplied(jaxpr):
    """Floating point operations of the matrix products in a program."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[i] for i in contracted]))
        for inner in equation.params.values():
            total += times * multiplied(inner.jaxpr) if hasattr(inner, "jaxpr") else 0
    return total


@pytest.mark.parametrize("drafts", [False, True])
def test_flops_are_those_of_the_program(drafts):
    model = dataclasses.replace(MODEL, actions=ACTIONS[:1])
    params = jax.eval_shape(functools.partial(init_maskgit, model), jax.random.key(0))
    program = jax.make_jaxpr(lambda p, x: apply(model, p, x | {"drafts": drafts}))(params, inputs())
    assert maskgit_flops(model, TIME, drafts) * BATCH * TIME == multiplied(program.jaxpr)
