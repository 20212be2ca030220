"""Score matching: objectives whose minimum is the score ∇ log p of the data.

Each takes a function `score(x)`, (B, ...) → (B, ...), that treats rows separately, and returns a
loss for each example, (B,), in nats: differentiable on both backends, so that a mean of them can
be minimized. With D the number of elements of an example and s the learned score,

| function                   | loss                                      | source                  |
|----------------------------|-------------------------------------------|-------------------------|
| `explicit`                 | ½‖s − ∇log p‖²                            | Hyvärinen 2005, eq. 2   |
| `implicit`                 | ½‖s‖² + tr ∇s                             | Hyvärinen 2005, eq. 4   |
| `sliced`                   | ½(vᵀs)² + vᵀ∇s v, or ½‖s‖² + vᵀ∇s v       | arXiv:1905.07088        |
| `finite_difference_sliced` | the same, with ∇s from s(x ± εv)          | arXiv:2007.03317        |
| `denoising`                | ½‖s(x + σz) + z/σ‖²                       | Vincent 2011            |
| `multi_level_denoising`    | that times λ(σ) = σ²: ½‖σ s(x + σz) + z‖² | arXiv:1907.05600, eq. 6 |

`implicit` equals `explicit` up to a constant in expectation over the data, and so do the sliced
ones for projections with E vvᵀ = I. `denoising` differs from the explicit loss *of the smoothed
density* q_σ by a constant: its minimum is ∇ log q_σ, not ∇ log p, and its loss there is not zero.
The explicit, implicit and sliced losses can be negative.

Projections v are "rademacher" (±1), "gaussian", or "sphere": uniform on the sphere of radius √D.
On the unit sphere, E vvᵀ = I/D, and the trace would count 1/D of what the norm does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import keras
from keras import ops

from tfdiffusion import _backend, _checks, _names, random
from tfdiffusion._backend import rows

# Streams of a key.
_NOISE, _FIRST_PROJECTION = 0, 1


def _sum(x):
    """Sum over all axes but the first: (B, ...) → (B,)."""
    return ops.sum(x, axis=tuple(range(1, len(x.shape))))


def _scored(score: Callable, x):
    """s(x), after a look at its shape: (B,) against (B, 1) would broadcast in silence."""
    value = score(x)
    if tuple(value.shape) != tuple(x.shape):
        raise ValueError(
            f"A score has the shape of its argument, {tuple(x.shape)}. The function returned "
            f"{tuple(value.shape)}."
        )
    return value


def _data(x):
    expected = "floats of shape (B, ...), one row an example"
    if not ops.is_tensor(x):
        x = ops.convert_to_tensor(_checks.array("x", x, expected, kinds="f"))
    if len(x.shape) < 2 or 0 in x.shape or not keras.backend.is_float_dtype(_checks.dtype(x)):
        raise ValueError(f"x must be {expected}. Received shape {tuple(x.shape)}, dtype {x.dtype}.")
    return x


def explicit(score: Callable, x, true_score):
    """½‖s(x) − ∇ log p(x)‖²: for teaching and tests, where the true score is known.

    Args:
        score: (B, ...) → (B, ...).
        x: float (B, ...), data.
        true_score: ∇ log p(x), (B, ...).

    Returns:
        (B,), not negative.

    Raises:
        ValueError: If a shape is wrong.
    """
    x = _data(x)
    if not ops.is_tensor(true_score):
        true_score = _checks.array("true_score", true_score, "numbers of the shape of x")
    true_score = ops.cast(true_score, x.dtype)
    if tuple(true_score.shape) != tuple(x.shape):
        raise ValueError(
            f"true_score must have the shape of x, {tuple(x.shape)}. Received "
            f"{tuple(true_score.shape)}."
        )
    return 0.5 * _sum(ops.square(_scored(score, x) - true_score))


def implicit(score: Callable, x):
    """½‖s(x)‖² + tr ∇s(x), with the exact trace: D products with the Jacobian.

    Args:
        score: (B, ...) → (B, ...), with a second derivative that does not vanish.
        x: float (B, ...), data.

    Returns:
        (B,); −½E‖∇ log p‖² on average at the optimum.

    Raises:
        ValueError: If a shape is wrong.
    """
    x = _data(x)
    flat = ops.reshape(x, (x.shape[0] or -1, _size(x)))

    def flat_score(flat):
        shaped = ops.reshape(flat, (-1, *x.shape[1:]))
        return ops.reshape(_scored(score, shaped), ops.shape(flat))

    value, trace = _backend.jacobian_trace(flat_score, flat)
    return 0.5 * _sum(ops.square(value)) + trace


def _size(x) -> int:
    size = 1
    for side in x.shape[1:]:
        size *= side
    return size


def _rademacher(keys, shape):
    return ops.where(random.uniform(keys, shape) < 0.5, -1.0, 1.0)


def _sphere(keys, shape):
    v = random.normal(keys, shape)
    size = 1
    for side in shape:
        size *= side
    return v * rows(ops.sqrt(size / _sum(ops.square(v))), v)


_PROJECTIONS = {"rademacher": _rademacher, "gaussian": random.normal, "sphere": _sphere}


def project(keys, shape, projection: str = "rademacher"):
    """Random directions v with E vvᵀ = I.

    Args:
        keys: uint32 (B, 2).
        shape: of one example.
        projection: "rademacher", "gaussian" or "sphere" (of radius √D).

    Returns:
        float32 (B, *shape).

    Raises:
        ValueError: If the name is unknown.
    """
    return _names.look_up("projection", projection, _PROJECTIONS)(keys, _checks.shape(shape))


def _projections(x, keys, projection: str, num: int):
    _checks.integer("num_projections", num)
    _check_rows(x, keys)
    for i in range(num):
        v = project(random.fold_in(keys, _FIRST_PROJECTION + i), x.shape[1:], projection)
        yield ops.cast(v, x.dtype)


def sliced(
    score: Callable,
    x,
    keys,
    *,
    projection: str = "rademacher",
    num_projections: int = 1,
    variance_reduced: bool = True,
):
    """Sliced score matching: one product with the Jacobian a projection, whatever D.

    Args:
        score: (B, ...) → (B, ...), with a second derivative that does not vanish.
        x: float (B, ...), data.
        keys: uint32 (B, 2), of the projections.
        projection: see `project`. Of the trace's estimate v^T J v, for a symmetric J, the variance
            is 2‖J‖² for "gaussian" and without J's diagonal for "rademacher".
        num_projections: averaged over so many.
        variance_reduced: ½‖s‖² instead of its own estimate ½(vᵀs)² (SSM-VR, eq. 8).

    Returns:
        (B,).

    Raises:
        ValueError: If a shape is wrong, a name unknown or a number out of range.
    """
    x = _data(x)
    total = 0.0
    for v in _projections(x, keys, projection, num_projections):
        value, jacobian = _backend.vjp(lambda x: _scored(score, x), x, v)
        norm = _sum(ops.square(value)) if variance_reduced else _sum(v * value) ** 2
        total = total + 0.5 * norm + _sum(jacobian * v)
    return total / num_projections


def finite_difference_sliced(
    score: Callable,
    x,
    keys,
    *,
    step: float = 0.01,
    projection: str = "rademacher",
    num_projections: int = 1,
):
    """Sliced score matching from two values of the score: no derivative of a derivative.

    ½(vᵀ s̄)² + vᵀ(s₊ − s₋)/(2ε), with s± = s(x ± εv) and s̄ their mean (FD-SSM); it differs from
    `sliced` by O(ε²).

    Args:
        score: (B, ...) → (B, ...), with a second derivative that does not vanish.
        x: float (B, ...), data.
        keys: uint32 (B, 2), of the projections.
        step: ε, positive, in units of the data.
        projection: see `project`.
        num_projections: averaged over so many.

    Returns:
        (B,).

    Raises:
        ValueError: If a shape is wrong, a name unknown or a number out of range.
    """
    _checks.number("step", step, "(0, inf)")
    x = _data(x)
    total = 0.0
    for v in _projections(x, keys, projection, num_projections):
        ahead, behind = _scored(score, x + step * v), _scored(score, x - step * v)
        slope = _sum(v * (ahead - behind)) / (2.0 * step)
        total = total + 0.5 * _sum(v * (0.5 * (ahead + behind))) ** 2 + slope
    return total / num_projections


def denoising(score: Callable, x, keys, sigma):
    """½‖s(x + σz) + z/σ‖²: learns the score of the data smoothed with N(0, σ² I).

    Args:
        score: (B, ...) → (B, ...).
        x: float (B, ...), clean data.
        keys: uint32 (B, 2), of the noise z.
        sigma: positive, a number or (B,), in units of the data.

    Returns:
        (B,), not negative. The loss of the best score is
        ½(E‖z/σ‖² − E‖∇ log q_σ‖²), above zero.

    Raises:
        ValueError: If a shape is wrong or a plain σ not positive.
    """
    x, sigma = _data(x), _sigma(sigma)
    _checks.one_a_row(x, sigma=sigma)
    z = noise_for(x, keys)
    sigma = rows(sigma, x)
    return 0.5 * _sum(ops.square(_scored(score, x + sigma * z) + z / sigma))


def multi_level_denoising(score: Callable, x, keys, sigma):
    """σ² times `denoising`: ½‖σ s(x + σz) + z‖², of the same size at every noise level.

    Args:
        score: (B, ...) → (B, ...), at each row's own level.
        x: float (B, ...), clean data.
        keys: uint32 (B, 2), of the noise z.
        sigma: σ of each row's level, (B,), or one number.

    Returns:
        (B,); at most D/2 on average for the best score.

    Raises:
        ValueError: If a shape is wrong or a plain σ not positive.
    """
    x, sigma = _data(x), _sigma(sigma)
    _checks.one_a_row(x, sigma=sigma)
    z = noise_for(x, keys)
    sigma = rows(sigma, x)
    return 0.5 * _sum(ops.square(sigma * _scored(score, x + sigma * z) + z))


def _check_rows(x, keys) -> None:
    """Raises a ValueError unless there is one key a row, as far as can be told."""
    random.check_keys(keys)
    rows_x, rows_keys = x.shape[0], keys.shape[0]
    if None not in (rows_x, rows_keys) and rows_keys not in (1, rows_x):
        raise ValueError(f"There must be one key a row of x, {rows_x}. Received {rows_keys}.")


def noise_for(x, keys):
    """The z that `denoising` adds for these keys: standard normal, of the shape of x."""
    _check_rows(x, keys)
    return ops.cast(random.normal(random.fold_in(keys, _NOISE), tuple(x.shape[1:])), x.dtype)


def _sigma(sigma):
    if not ops.is_tensor(sigma):
        values = _checks.array("sigma", sigma, "positive, a number or (B,)")
        if (values <= 0).any():
            raise ValueError(f"sigma must be positive. Received {_checks.shown(sigma)}.")
    return ops.convert_to_tensor(sigma)


def from_energy(energy: Callable) -> Callable:
    """The score −∇E of an energy: without curl by construction.

    >>> score = from_energy(lambda x: 0.5 * keras.ops.sum(x**2, axis=-1))  # of N(0, I): −x

    Args:
        energy: (B, ...) → (B,), row by row.

    Returns:
        A function (B, ...) → (B, ...) that the objectives take.
    """

    def score(x):
        return -_backend.vjp(energy, x)[1]

    return score


# Second derivatives that vanish almost everywhere: ∇s is then piecewise constant.
_PIECEWISE_LINEAR = {"relu", "relu6", "leaky_relu", "hard_tanh", "hard_sigmoid", "hard_shrink"}
_PIECEWISE_LINEAR_LAYERS = (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.PReLU)


def warn_if_vacuous(network) -> None:
    """Warns of activations with which implicit and sliced score matching learn next to nothing.

    These objectives train through ∇s. Behind a ReLU it is piecewise constant: it has no gradient
    with respect to biases and inputs, and the trace pulls at the weights without regard to where
    the data are.

    Args:
        network: a Keras layer or model.
    """
    for layer in [network, *getattr(network, "_flatten_layers", list)()]:
        name = getattr(getattr(layer, "activation", None), "__name__", None)
        if name in _PIECEWISE_LINEAR or isinstance(layer, _PIECEWISE_LINEAR_LAYERS):
            warnings.warn(
                f"The layer {layer.name!r} has the activation {name or type(layer).__name__}, "
                "whose second derivative is zero almost everywhere: implicit and sliced score "
                "matching learn next to nothing with it. Use elu, silu, softplus or tanh.",
                stacklevel=3,
            )
            return
