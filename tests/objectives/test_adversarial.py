import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dreamer4.batch import ActionComponent
from dreamer4.errors import UserError
from dreamer4.models.discriminator import Discriminator, DiscriminatorConfig, init_discriminator
from dreamer4.objectives.adversarial import AdversaryConfig, discriminator_loss, generator_loss, judge

# These programs take much longer to compile than to run.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

KEY = jax.random.key(3)
PLAIN = AdversaryConfig(weight=0.5, flip=0.0)
MODEL = Discriminator(
    DiscriminatorConfig(channels=(4, 6), conditional=True), (ActionComponent("pad", "categorical", 3),), 8, 8, 1
)
TRUTH, CURRENT = jax.random.uniform(jax.random.key(5), (2, 4, 8, 8, 1))
GIVEN = {"truth": TRUTH, "action": {"pad": jnp.arange(4) % 3}, "key": KEY, "progress": 1.0}


@pytest.fixture(scope="module")
def params():
    """Of a generator that moves and scales the frame, and of the discriminator."""
    return {
        "generator": {"shift": jnp.float32(0.1), "scale": jnp.float32(0.5)},
        "discriminator": jit(functools.partial(init_discriminator, MODEL))(jax.random.key(0)),
    }


def judged(params, config=PLAIN, current=CURRENT, **given):
    generator = params["generator"]
    predicted = generator["scale"] * CURRENT + generator["shift"]
    said = judge(MODEL, config, params["discriminator"], predicted=predicted, current=current, **(GIVEN | given))
    return predicted, *said


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def logits(seed, batch=5):
    return jax.random.normal(jax.random.key(seed), (batch, 2, 3)) * 3


def test_the_discriminator_is_told_soft_labels():
    config = AdversaryConfig(real_label=0.8, fake_label=0.3, flip=0.0)
    real, fake = (np.asarray(logits(n), np.float64) for n in (1, 2))
    terms = [-y * np.log(sigmoid(x)) - (1 - y) * np.log(1 - sigmoid(x)) for x, y in ((real, 0.8), (fake, 0.3))]
    assert discriminator_loss(config, logits(1), logits(2), KEY) == pytest.approx(np.mean(terms), rel=1e-5)


def test_it_is_least_where_the_labels_are_said():
    said = [jnp.full((1, 1, 1), np.log(y / (1 - y))) for y in (PLAIN.real_label, PLAIN.fake_label)]
    gradients = jax.grad(lambda logits: discriminator_loss(PLAIN, *logits, KEY))(said)
    np.testing.assert_allclose(gradients, np.zeros((2, 1, 1, 1)), atol=1e-7)


def test_labels_change_places_for_a_share_of_the_pictures():
    config, count = AdversaryConfig(real_label=0.9, fake_label=0.2, flip=0.25), 4000
    zeros = jnp.zeros((2, count, 1, 2))

    def told(key):
        """The labels, which the gradient tells: it is (1/2 - label) / (all places) at a logit of 0."""
        gradient = jax.grad(lambda logits: discriminator_loss(config, *logits, key))(zeros)
        return 0.5 - np.asarray(gradient) * zeros.size

    labels = told(KEY)
    np.testing.assert_array_equal(labels[..., 0], labels[..., 1])  # a picture has one label
    for kind, own, other in ((0, 0.9, 0.2), (1, 0.2, 0.9)):
        flipped = np.isclose(labels[kind, :, 0, 0], other, atol=1e-3)
        assert np.allclose(labels[kind, :, 0, 0][~flipped], own, atol=1e-3)
        assert flipped.mean() == pytest.approx(0.25, abs=0.03)
    assert not np.array_equal(labels[0] > 0.5, labels[1] < 0.5)  # each kind is drawn for itself
    assert not np.array_equal(labels, told(jax.random.key(4)))


def test_all_labels_flipped_are_the_other_ones():
    flipped = dataclasses.replace(PLAIN, flip=1.0)
    swapped = discriminator_loss(PLAIN, logits(2), logits(1), KEY)
    assert discriminator_loss(flipped, logits(1), logits(2), KEY) == pytest.approx(float(swapped))


def test_the_generator_is_pushed_hardest_where_the_discriminator_is_sure():
    fake = np.asarray(logits(1), np.float64)
    assert generator_loss(logits(1)) == pytest.approx(-np.log(sigmoid(fake)).mean(), rel=1e-5)
    slopes = jax.vmap(jax.grad(lambda x: generator_loss(x.reshape(1, 1, 1))))(jnp.array([-40.0, 0.0, 40.0]))
    np.testing.assert_allclose(slopes, [-1, -0.5, 0], atol=1e-6)


def test_each_learns_from_its_own_loss_alone(params):
    """Bit for bit."""

    def losses(given):
        params, current, truth = given
        predicted, fooled, told, _ = judged(params, current=current, truth=truth)
        generators = jnp.abs(predicted - truth).mean() + fooled
        return {"together": generators + told, "generators": generators, "fooled": fooled, "told": told}

    # In one program, since two may round unlike each other.
    names = ("together", "generators", "fooled", "told")
    given = (params, CURRENT, TRUTH)
    grads = jit(lambda x: {name: jax.grad(lambda x, name=name: losses(x)[name])(x) for name in names})(given)
    of = {name: grad[0] for name, grad in grads.items()}
    jax.tree.map(np.testing.assert_array_equal, of["together"]["discriminator"], of["told"]["discriminator"])
    jax.tree.map(np.testing.assert_array_equal, of["together"]["generator"], of["generators"]["generator"])
    assert all(jnp.any(x != 0) for x in jax.tree.leaves((of["told"]["discriminator"], of["fooled"]["generator"])))
    assert not any(jnp.any(x != 0) for x in jax.tree.leaves((of["told"]["generator"], of["fooled"]["discriminator"])))
    assert not any(jnp.any(x != 0) for x in (*grads["told"][1:], *grads["fooled"][1:]))  # current frames and the truth


def test_the_generators_term_is_weighed_from_its_start_on(params):
    late = dataclasses.replace(PLAIN, start=0.5)
    run, terms = jit(lambda progress: judged(params, late, progress=progress)), []
    for progress in (0.0, 0.49, 0.5, 1.0):
        _, fooled, told, metrics = run(jnp.float32(progress))
        terms.append(float(fooled / metrics["adversarial"]))
        assert told == metrics["discriminator"] > 0
    assert terms == pytest.approx([0, 0, 0.5, 0.5])


def test_a_discriminator_learns_to_tell_and_says_so(params):
    optimizer = optax.adam(0.01)

    def step(carry, _):
        judge_params, state = carry

        def loss(p):
            _, _, told, metrics = judged(params | {"discriminator": p})
            return told, metrics

        grads, metrics = jax.grad(loss, has_aux=True)(judge_params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(judge_params, updates), state), metrics

    start = (params["discriminator"], optimizer.init(params["discriminator"]))
    metrics = jit(lambda start: jax.lax.scan(step, start, length=100)[1])(start)
    least = -0.9 * np.log(0.9) - 0.1 * np.log(0.1)  # of labels of 0.9 and 0.1
    assert metrics["discriminator"][0] > 0.6
    assert least < metrics["discriminator"][-1] < least + 0.1
    assert (metrics["real_accuracy"][-1], metrics["fake_accuracy"][-1]) == (1, 1)
    assert metrics["adversarial"][-1] > metrics["adversarial"][0]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"weight": -1.0}, "weight: -1.0 found"),
        ({"flip": 1.5}, "adversary.flip: 1.5 found, a share of 0 to 1"),
        ({"start": -0.1}, "adversary.start: -0.1 found"),
        ({"real_label": 0.1}, "fake_label: 0.1 found, less than the real_label of 0.1"),
    ],
)
def test_values_that_cannot_be_are_named(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        AdversaryConfig(**fields)
