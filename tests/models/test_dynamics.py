import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.batch import ActionComponent, BatchSpec, fake_batch
from dreamer4.errors import UserError
from dreamer4.models.dynamics import Dynamics, DynamicsConfig, dynamics_flops, init_dynamics
from dreamer4.models.patches import sinusoids
from dreamer4.nn.transformer import TransformerConfig

ACTIONS = (
    ActionComponent("button", "categorical", 5),
    ActionComponent("stick", "continuous", 2),
    ActionComponent("keys", "binary", 3),
)
CONFIG = DynamicsConfig(
    spatial=3,
    registers=1,
    agents=2,
    k_max=8,
    transformer=TransformerConfig(d_model=16, depth=4, heads=2, kv_heads=1, mlp_ratio=2.0, time_every=2, context=3),
)
MODEL = Dynamics(CONFIG, ACTIONS, latents=2, bottleneck=6)
ALONE = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, agents=0))  # no agent tokens
TIME = 5  # two time layers of three frames reach back over all of it


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def inputs(batch=2, time=TIME, model=MODEL):
    """What the model is called with, by name."""
    rng, c = np.random.default_rng(0), model.config
    return {
        "noised": normal(1, batch, time, c.spatial, model.channels),
        "signal": jnp.asarray(rng.integers(0, c.k_max, (batch, time)), jnp.int32),
        "step": jnp.asarray(rng.integers(0, c.step_sizes, (batch, time)), jnp.int32),
        "action": fake_batch(BatchSpec(batch, time, 1, 1, actions=model.actions), seed=2).action,
        "labelled": jnp.ones((batch, time), bool),
        "agent": normal(3, batch, time, c.agents, c.transformer.d_model) if c.agents else None,
    }


def at(given, t):
    """Frame ``t`` of the inputs alone."""
    return jax.tree.map(lambda x: x[:, t : t + 1], given)


def draw(model):
    """Parameters, none of them at a constant under which a mistake might not show."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape)
        if path[-1].key == "kernel":
            noise *= leaf.shape[-2] ** -0.5
        return jnp.asarray(1 + 0.2 * noise if path[-1].key in ("scale", "gain") else noise, leaf.dtype)

    shapes = jax.eval_shape(functools.partial(init_dynamics, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="module")
def params():
    return draw(MODEL)


def apply(model, params, given, cache=None, starts=None):
    return model.apply({"params": params}, **given, cache=cache, starts=starts)


run = jax.jit(apply, static_argnums=0)


@pytest.fixture(scope="module")
def moved(params):
    """How much frame u of each input moves frame t of each output: (T, T) gradient sizes at [t, u], by both names."""
    given = inputs(1)
    world, agent = normal(8, 3, 4), normal(9, 2, 16)

    def outputs(felt):
        action = given["action"] | {"stick": felt["stick"]}
        z1_hat, agents, _ = apply(MODEL, params, given | {k: felt[k] for k in ("noised", "agent")} | {"action": action})
        return {"world": (z1_hat[0] * world).sum((1, 2)), "agent": (agents[0] * agent).sum((1, 2))}

    felt = {"noised": given["noised"], "agent": given["agent"], "stick": given["action"]["stick"]}
    jacobian = jax.jit(jax.jacrev(outputs))(felt)
    return jax.tree.map(lambda x: np.abs(x[:, 0]).reshape(TIME, TIME, -1).sum(-1), jacobian)


age = np.subtract.outer(np.arange(TIME), np.arange(TIME))


@pytest.mark.parametrize("name", ["noised", "stick"])
def test_the_world_is_causal(moved, name):
    # The action of a frame is what led to it: frame t feels action t, and no later one.
    assert not moved["world"][name][age < 0].any()
    assert moved["world"][name][age >= 0].all()


def test_nothing_reads_an_agent_token(moved):
    assert not moved["world"]["agent"].any()


@pytest.mark.parametrize("name", ["noised", "stick", "agent"])
def test_agents_read_the_world_and_their_own_past(moved, name):
    assert not moved["agent"][name][age < 0].any()
    assert moved["agent"][name][age >= 0].all()


def test_the_world_is_the_same_whatever_agents_hold(params):
    given = inputs()
    other = given | {"agent": 100 * normal(11, *given["agent"].shape)}
    one, two = (run(MODEL, params, x) for x in (given, other))
    np.testing.assert_array_equal(one[0], two[0])
    assert np.abs(one[1] - two[1]).min((2, 3)).all()
    caches = [MODEL.cache(2)] * 2
    for t in range(TIME):
        pairs = zip((given, other), caches, strict=True)
        worlds, agents, caches = zip(*(run(MODEL, params, at(x, t), c) for x, c in pairs), strict=True)
        np.testing.assert_array_equal(*worlds)
        assert (agents[0] != agents[1]).any()


def test_frame_by_frame_equals_the_whole_clip(params):
    given = inputs()
    whole = run(MODEL, params, given)[:2]
    cache, parts = MODEL.cache(2), []
    for t in range(TIME):  # the ring of 3 wraps
        *part, cache = run(MODEL, params, at(given, t), cache)
        parts.append(part)
    for part, expected in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_allclose(np.concatenate(part, 1), expected, atol=1e-5)


CHANGES = {
    "signal": lambda x: x | {"signal": (x["signal"] + 1) % 9},
    "step": lambda x: x | {"step": (x["step"] + 1) % 4},
    "button": lambda x: x | {"action": x["action"] | {"button": (x["action"]["button"] + 1) % 5}},
    "stick": lambda x: x | {"action": x["action"] | {"stick": x["action"]["stick"] + 0.5}},
    "keys": lambda x: x | {"action": x["action"] | {"keys": 1 - x["action"]["keys"]}},
    "labelled": lambda x: x | {"labelled": ~x["labelled"]},
}


@pytest.fixture(scope="module")
def changed(params):
    """How far each of ``CHANGES`` of frame u moves frame t of the prediction, (T, T) at [t, u]; the same where
    no frame is labelled, under ``unlabelled``."""
    variants = []
    for known in (True, False):
        base = inputs(1) | {"labelled": jnp.full((1, TIME), known)}
        variants.append(base)
        for change in CHANGES.values():
            other = change(base)
            for u in range(TIME):
                variants.append(jax.tree.map(lambda a, b, u=u: a.at[:, u].set(b[:, u]), base, other))
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *variants)
    z1_hat = np.asarray(run(MODEL, params, batch)[0]).reshape(2, -1, TIME, 12)
    far = np.abs(z1_hat[:, 1:] - z1_hat[:, :1]).max(-1).reshape(2, len(CHANGES), TIME, TIME)
    far = np.where(far < 1e-6, 0, far).swapaxes(2, 3)
    labelled, unlabelled = (dict(zip(CHANGES, x, strict=True)) for x in far)
    return labelled | {"unlabelled": unlabelled}


@pytest.mark.parametrize("name", list(CHANGES))
def test_every_label_and_action_is_felt_from_its_frame_on(changed, name):
    assert not changed[name][age < 0].any()
    assert (changed[name][age >= 0] > 1e-5).all()


def test_an_unlabelled_frame_does_not_feel_its_action(changed):
    for name in ("button", "stick", "keys"):
        assert not changed["unlabelled"][name].any()
    for name in ("signal", "step", "labelled"):
        assert changed["unlabelled"][name].any()


def test_labelled_and_unlabelled_mix_per_clip(params):
    given = inputs()
    labelled = given["labelled"].at[1].set(False)
    mixed = run(MODEL, params, given | {"labelled": labelled})[0]
    full, none = (run(MODEL, params, given | {"labelled": jnp.full((2, TIME), x)})[0] for x in (True, False))
    np.testing.assert_array_equal(mixed, np.stack([full[0], none[1]]))
    assert (np.abs(full - none).max((2, 3)) > 1e-3).all()


def test_shifted_actions_predict_another_world(params):
    given = inputs()
    shifted = given | {"action": jax.tree.map(lambda a: jnp.roll(a, 1, axis=1), given["action"])}
    found = np.abs(run(MODEL, params, given)[0] - run(MODEL, params, shifted)[0])
    assert (found.max((2, 3)) > 1e-3).all()


def test_every_parameter_has_a_gradient_and_unknown_actions_may_be_nan():
    given = inputs(model=ALONE)
    stick = given["action"]["stick"].at[1].set(jnp.nan)
    given |= {"labelled": given["labelled"].at[1].set(False), "action": given["action"] | {"stick": stick}}
    weights = normal(5, *given["noised"].shape)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(weights * apply(ALONE, p, given)[0])))(draw(ALONE))
    leaves = {jax.tree_util.keystr(p, simple=True): x for p, x in jax.tree_util.tree_leaves_with_path(gradient)}
    assert [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()] == []
    assert [name for name, leaf in leaves.items() if not leaf.any()] == []


def test_the_action_reaches_the_spatial_tokens_too_where_asked(params):
    both = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, actions_to_spatial=True))
    # Nobody reads the action's own token: what is left of the action comes by the spatial tokens.
    quiet = jax.tree.map(lambda x: x, params)
    quiet["transformer"]["blocks"] = jax.tree.map(jnp.zeros_like, params["transformer"]["blocks"])
    given = inputs()
    other = CHANGES["button"](given)
    for model, feels in ((MODEL, False), (both, True)):
        one, two = (run(model, quiet, x)[0] for x in (given, other))
        assert (np.abs(one - two).max((2, 3)) > 1e-3).all() if feels else (one == two).all()


def test_where_a_clip_starts_anew_frames_are_alone(params):
    given = inputs()
    starts = jnp.ones((2, TIME), bool)
    together = run(MODEL, params, given, starts=starts)[0]
    apart = [run(MODEL, params, at(given, t), MODEL.cache(2))[0] for t in range(TIME)]
    np.testing.assert_allclose(together, np.concatenate(apart, 1), atol=1e-5)


def test_layout_says_who_reads_whom():
    mask = MODEL.layout.mask()
    assert mask.shape == (8, 8)  # action, signal and step, three spatial, register, two agents
    assert mask[:, :6].all()
    assert mask[6:].all()
    assert not mask[:6, 6:].any()
    assert MODEL.layout.temporal == 8
    assert ALONE.layout.mask().all()


def test_latents_are_packed_in_order_and_on_the_model_s_scale():
    model = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, latent_mean=0.25, latent_scale=4.0))
    latents = jnp.tanh(normal(0, 2, 3, 2, 6))
    z1 = model.pack(latents)
    assert z1.shape == (2, 3, 3, 4)
    np.testing.assert_allclose(z1.reshape(2, 3, 12), (latents.reshape(2, 3, 12) - 0.25) * 4, atol=1e-6)
    np.testing.assert_allclose(model.unpack(z1), latents, atol=1e-6)
    assert np.abs(model.unpack(100 * z1)).max() == 1  # the tokenizer's bounds


def test_a_known_deviation_brings_input_and_output_to_unit_size(params):
    """Where z1 has deviation s, the network sees each level over its own deviation, and answers in units of s."""
    model = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, latent_deviation=0.25))
    given = inputs()
    tau = np.asarray(given["signal"] / CONFIG.k_max)[..., None, None]
    size = np.sqrt((1 - tau) ** 2 + (0.25 * tau) ** 2)
    z1_hat, agents, _ = run(model, params, given)
    expected, unchanged, _ = run(MODEL, params, given | {"noised": given["noised"] / size})
    np.testing.assert_allclose(z1_hat, 0.25 * expected, atol=1e-5)
    np.testing.assert_allclose(agents, unchanged, atol=1e-5)


def test_latents_that_cannot_be_shared_evenly_are_refused():
    model = dataclasses.replace(MODEL, config=dataclasses.replace(CONFIG, spatial=5))
    with pytest.raises(UserError, match="spatial: 5 tokens cannot share the tokenizer's 2 x 6 = 12 numbers"):
        init_dynamics(model, jax.random.key(0))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_max": 12}, "k_max: 12 found, a power of two expected"),
        ({"k_max": 0}, "k_max: 0 found"),
        ({"spatial": 0}, "spatial: 0 found"),
        ({"context_noise": -0.1}, r"context_noise: -0\.1 found"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(CONFIG, **fields)


@pytest.mark.parametrize(("k_max", "steps", "context"), [(1, 1, 1), (8, 4, 7), (64, 7, 58)])
def test_labels_have_a_row_for_every_level_and_every_step_size(k_max, steps, context):
    config = dataclasses.replace(CONFIG, k_max=k_max)
    model = dataclasses.replace(MODEL, config=config)
    shapes = jax.eval_shape(functools.partial(init_dynamics, model), jax.random.key(0))
    assert config.step_sizes == steps
    assert shapes["signal"].shape == (k_max + 1, 8)
    assert shapes["step"].shape == (steps, 8)
    assert config.context_signal == context  # one tenth of noise, as near as the levels allow


def structured(**fields):
    config = dataclasses.replace(CONFIG, spatial=6, start="structured")
    return dataclasses.replace(
        MODEL, config=dataclasses.replace(config, transformer=dataclasses.replace(CONFIG.transformer, **fields))
    )


def test_structured_start():
    params = jax.jit(functools.partial(init_dynamics, structured(kv_heads=2)))(jax.random.key(0))
    assert not jnp.any(params["to_latents"]["kernel"])  # the first prediction is the mean
    np.testing.assert_allclose(params["places"][2:8], sinusoids((2, 3), 16), atol=1e-6)
    space, time = (params["transformer"]["blocks"][name]["attention"] for name in ("space_0", "time"))
    np.testing.assert_array_equal(space["query"]["kernel"], space["key"]["kernel"])
    assert (time["query"]["kernel"] != time["key"]["kernel"]).any()


def test_every_start_has_the_shapes_of_the_model():
    model = structured()
    given = inputs(model=model)
    for start in ("random", "structured"):
        config = dataclasses.replace(model.config, start=start)
        params = jax.eval_shape(
            functools.partial(init_dynamics, dataclasses.replace(model, config=config)), jax.random.key(0)
        )
        assert jax.eval_shape(functools.partial(apply, model), params, given)[0].shape == given["noised"].shape


INFERRED = dataclasses.replace(
    MODEL, actions=(dataclasses.replace(ACTIONS[0], name="latent_0", inferred=True), *ACTIONS)
)


@pytest.fixture(scope="module")
def embedded():
    """What actions become, to be changed by name, and the no-action embedding."""
    params, given = draw(INFERRED), inputs(model=INFERRED)

    def embed(**changes):
        call = {name: given[name] for name in ("action", "labelled")} | changes
        return np.asarray(INFERRED.apply({"params": params}, **call, method=Dynamics.embed_action))

    return SimpleNamespace(embed=embed, given=given, no_action=np.asarray(params["no_action"]))


def test_what_is_inferred_acts_where_nothing_is_labelled_and_what_is_real_does_not(embedded):
    action, known = embedded.given["action"], embedded.given["labelled"]
    for name, value in action.items():
        other = action | {name: jnp.where(value == 0, 1, 0).astype(value.dtype)}
        moved = [
            (embedded.embed(labelled=x) != embedded.embed(labelled=x, action=other)).all() for x in (~known, known)
        ]
        assert moved == [name == "latent_0", True], name


def test_nothing_is_inferred_from_a_frame_that_is_not_seen(embedded):
    hidden = ~embedded.given["labelled"]
    alone, all_ = embedded.embed(labelled=hidden, starts=hidden.at[:, 2].set(True)), embedded.embed(labelled=hidden)
    assert (alone[:, 2] == embedded.no_action).all()
    assert (all_ != embedded.no_action).all()
    np.testing.assert_array_equal(np.delete(alone, 2, 1), np.delete(all_, 2, 1))


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


def test_flops_are_those_of_the_program():
    model = dataclasses.replace(MODEL, actions=ACTIONS[:1])
    params = jax.eval_shape(functools.partial(init_dynamics, model), jax.random.key(0))
    program = jax.make_jaxpr(functools.partial(apply, model))(params, inputs(model=model))
    assert dynamics_flops(model, TIME) * 2 * TIME == multiplied(program.jaxpr)
