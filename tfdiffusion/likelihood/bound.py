"""The variational bound, term by term, for any process and any reverse variance.

A chain of latents x_{t_1} … x_{t_N}, little noise to much, bounds the likelihood of the data
(DDPM, arXiv:2006.11239, eq. 5):

    −ln p(x_0) ≤ KL(q(x_{t_N} | x_0) ‖ p(x_{t_N}))                                   prior term
               + Σ_k E KL(q(x_{t_{k−1}} | x_{t_k}, x_0) ‖ p(x_{t_{k−1}} | x_{t_k}))  one a step
               + E[−ln p(x_0 | x_{t_1})]                                             decoder

All are Gaussians. Both means of a step are c_0 · + c_t x_t, with x_0 or x̂_0 in the place of the
dot, so its term is, with q's variance β̃ and p's variance v,

    KL = ½ (β̃/v − 1 − ln(β̃/v) + c_0² ‖x_0 − x̂_0‖² / v)    a dimension.

In the limit of many steps the sum is an integral over the log-SNR λ = ln(α²/σ²), whatever the
schedule (VDM, arXiv:2107.00630, eq. 17): ½ ∫ E‖ε − ε̂‖² dλ.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from keras import ops

from tfdiffusion import _backend, _checks, _names, random
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser, check_labels
from tfdiffusion.likelihood import levels
from tfdiffusion.likelihood.pixels import Pixels, as_float, check_pixels
from tfdiffusion.processes import Process
from tfdiffusion.times import check_steps, grid

VARIANCES = ("posterior", "beta", "learned")
# Streams of an image's key: which steps, their noise, the decoder's noise.
_CHOICE, _NOISE, _DECODER = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Bound:
    """The bound of N images in bits a dimension; of points, in bits of their density.

    Attributes:
        prior: KL of the noisiest latent to the prior, (N,).
        steps: contribution of each evaluated step, least noise first, (N, K). All K together
            estimate the sum over all steps.
        decoder: −log2 of the probability (or density) of the image given the first latent, (N,).
        times: of the evaluated steps, (N, K).
        log_snr: λ there, (N, K).
        squared_error: ‖x̂_0 − x_0‖² a dimension there, and last in the first latent, which the
            decoder reads, (N, K + 1); NaN where no network was asked.
        dimension: D, numbers in an image.
        complete: whether the K steps are all there are.
    """

    prior: np.ndarray
    steps: np.ndarray
    decoder: np.ndarray
    times: np.ndarray
    log_snr: np.ndarray
    squared_error: np.ndarray
    dimension: int
    complete: bool = True

    @property
    def total(self) -> np.ndarray:
        """The bound of each image, (N,), bits a dimension."""
        return self.prior + self.steps.sum(axis=1) + self.decoder

    @property
    def nats(self) -> np.ndarray:
        """The bound of each image, (N,), in nats: at least −ln p(x_0) on average."""
        return self.total * self.dimension * math.log(2.0)

    def by_time(self, bins: int = 50) -> tuple[np.ndarray, np.ndarray]:
        """Where the bits of the steps are: (edges of equal parts of t, bits a dimension in each).

        Returns:
            edges (bins + 1,), bits (bins,), which sum to the mean of the steps.

        Raises:
            ValueError: If the number of bins is no integer >= 1.
        """
        _checks.integer("bins", bins)
        weights = self.steps / len(self.steps)
        bits, edges = np.histogram(self.times, bins, range=(0.0, 1.0 + 1e-9), weights=weights)
        return edges, bits

    @property
    def mean(self) -> float:
        """Bits a dimension, averaged over the images."""
        return float(self.total.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over images and the noise that each of them drew."""
        return standard_error(self.total)


def standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; NaN of a single one."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def bound(
    model,
    x_0,
    label=None,
    *,
    variance: str | Callable | None = None,
    steps: int | None = None,
    evaluations: int | None = None,
    pixels: Pixels | None = Pixels(),  # noqa: B008 (frozen)
    seed: int = 0,
    batch_size: int = 128,
) -> Bound:
    """The variational bound of each image, at each noise level (DDPM, eq. 5 and 13).

    Example:

    >>> result = tfd.likelihood.bound(model, images, evaluations=100)
    >>> f"{result.mean:.3f} ± {result.standard_error:.3f} bits a dimension"

    Args:
        model: a `DiffusionModel` or any denoiser.
        x_0: float (N, ...).
        label: int (N,) or None; only for denoisers that take one.
        variance: of the reverse steps: "posterior" (β̃), "beta" (σ²_{t|s}), "learned" (the
            denoiser's own) or a function (x_t, t, s) -> variance, with s = None for the decoder.
            None takes the learned one if there is one, else "posterior".
        steps: N latents, evenly spaced; None for all T of a chain, 1000 of a continuous process.
        evaluations: evaluate only so many steps an image, spread evenly with a random offset each;
            the bound stays unbiased and gets noisier. None evaluates all.
        pixels: the scale of the data: the decoder is integrated over its bins, and x̂_0 is clipped
            to it. None for points: the decoder is a density.
        seed: of the noise; image n has its own, whatever the batch.
        batch_size: images at a time.

    Returns:
        A `Bound`.

    Raises:
        TypeError: If the data are not floats, or there is no learned variance.
        ValueError: If the data are out of range, or a name or number is.
    """
    denoiser = levels.of(model)
    variance = _check_variance(denoiser, variance)
    check_pixels(pixels)
    x_0 = as_float(x_0, "of points") if pixels is None else pixels.check(x_0)
    times = _latents(denoiser, steps)
    total = len(times) - 1
    count = (
        total if evaluations is None else min(_checks.integer("evaluations", evaluations), total)
    )
    floor = _floor(denoiser.process, times)

    def step(x_0, keys, t, s, *label):
        noise = random.normal(random.fold_in(keys, _NOISE), x_0.shape[1:])
        nats, error = step_term(denoiser, x_0, noise, t, s, variance, floor, pixels, *label)
        return _mean(nats), _mean(error)

    def last(x_0, keys, t, *label):
        noise = random.normal(random.fold_in(keys, _DECODER), x_0.shape[1:])
        nats, error = decoder_term(denoiser, x_0, noise, t, variance, floor, pixels, *label)
        return _mean(prior_term(denoiser, x_0)), _mean(nats), _mean(error)

    step, last = (_backend.compiled(f, denoiser.variables) for f in (step, last))
    chosen = _choose(total, count, len(x_0), seed)  # (N, K), which step an image evaluates
    parts = []
    for rows_, x, keys, label_ in _batches(denoiser, x_0, label, seed, batch_size):
        terms = []
        for k in range(count):
            index = chosen[rows_, k]
            t, s = _tensor(times[index + 1]), _tensor(times[index])
            terms.append(step(x, random.fold_in(keys, 3 + index), t, s, *label_))
        ends = last(x, keys, _tensor(np.full(len(rows_), times[0])), *label_)
        parts.append(
            [
                _stack([nats for nats, _ in terms], len(rows_)),
                _stack([error for _, error in terms] + [ends[2]], len(rows_)),
                *(np.asarray(ops.convert_to_numpy(end), "float64") for end in ends[:2]),
            ]
        )
    nats, error, prior, decoder = (np.concatenate(p)[: len(x_0)] for p in zip(*parts))
    visited = times[chosen + 1]
    bits = 1.0 / math.log(2.0)
    return Bound(
        prior=prior * bits,
        steps=nats * bits * (total / max(count, 1)),
        decoder=decoder * bits,
        times=visited,
        log_snr=_numpy(denoiser.process.log_snr(_tensor(visited))),
        squared_error=error,
        dimension=int(np.prod(x_0.shape[1:])),
        complete=count == total,
    )


def continuous_bound(
    model,
    x_0,
    label=None,
    *,
    evaluations: int = 32,
    pixels: Pixels | None = Pixels(),  # noqa: B008 (frozen)
    seed: int = 0,
    batch_size: int = 128,
) -> Bound:
    """The bound of infinitely many steps (VDM, arXiv:2107.00630, eq. 17).

    The noise levels are drawn evenly over λ, spread over the range with a random offset an image,
    so that each contributes ½ Λ ‖ε − ε̂‖² with Λ the length of the range: of all schedules this
    one asks nothing of the process. A chain is taken between its steps too.

    The decoder reads the first latent without a network, p(x_0 | x_{t_1}) ∝ q(x_{t_1} | x_0):
    VDM, sec. 3.3.

    Args:
        model: a `DiffusionModel` or any denoiser.
        x_0: float (N, ...).
        label: int (N,) or None.
        evaluations: K, noise levels an image.
        pixels: see `bound`; x̂_0 is not clipped here.
        seed: see `bound`.
        batch_size: see `bound`.

    Returns:
        A `Bound`, unbiased for every image.

    Raises:
        TypeError: As in `bound`.
        ValueError: As in `bound`.
    """
    denoiser = levels.continuous(levels.of(model))
    process = denoiser.process
    check_pixels(pixels)
    x_0 = as_float(x_0, "of points") if pixels is None else pixels.check(x_0)
    count = _checks.integer("evaluations", evaluations)
    high, low = levels.log_snr_ends(denoiser)

    def step(x_0, keys, log_snr, *label):
        noise = random.normal(random.fold_in(keys, _NOISE), x_0.shape[1:])
        t = process.inverse_log_snr(log_snr)
        error = ops.square(x_0 - _clean(denoiser, _noisy(process, x_0, noise, t), t, *label))
        return _mean(0.5 * (high - low) * rows(ops.exp(log_snr), x_0) * error), _mean(error), t

    def ends(x_0, keys):
        noise = random.normal(random.fold_in(keys, _DECODER), x_0.shape[1:])
        deviation = math.exp(-0.5 * high)  # σ/α
        nats = negative_log(x_0, x_0 + deviation * noise, -high, pixels)
        return _mean(prior_at(x_0, low)), _mean(nats)

    step, ends = (_backend.compiled(f, denoiser.variables) for f in (step, ends))
    offsets = _uniform(len(x_0), seed)
    log_snr = high - (high - low) * (np.arange(count) + offsets[:, None]) / count  # (N, K)
    parts = []
    for rows_, x, keys, label_ in _batches(denoiser, x_0, label, seed, batch_size):
        terms = [
            step(x, random.fold_in(keys, 3 + k), _tensor(log_snr[rows_, k]), *label_)
            for k in range(count)
        ]
        stacked = [_stack(part, len(rows_)) for part in zip(*terms)]
        parts.append([*stacked, *(_numpy(end) for end in ends(x, keys))])
    nats, error, times, prior, decoder = (np.concatenate(p)[: len(x_0)] for p in zip(*parts))
    bits = 1.0 / math.log(2.0)
    return Bound(
        prior=prior * bits,
        steps=nats * bits / count,
        decoder=decoder * bits,
        times=times,
        log_snr=log_snr,
        squared_error=np.pad(error, ((0, 0), (0, 1)), constant_values=np.nan),
        dimension=int(np.prod(x_0.shape[1:])),
        complete=False,
    )


def estimate(
    model,
    x_0,
    label=None,
    *,
    evaluations: int = 50,
    pixels: Pixels | None = Pixels(),  # noqa: B008 (frozen)
    seed: int = 0,
    batch_size: int = 128,
) -> Bound:
    """The bound that suits a model: of its T steps, or of infinitely many in continuous time.

    Args:
        model: see `bound`; so are the other arguments.
        x_0: float (N, ...).
        label: int (N,) or None.
        evaluations: K noise levels an image.
        pixels: the scale of the data, or None for points.
        seed: of the noise.
        batch_size: images at a time.

    Returns:
        A `Bound`, unbiased.

    Raises:
        TypeError: See `bound`.
        ValueError: See `bound`.
    """
    denoiser = levels.of(model)
    function = continuous_bound if denoiser.process.num_timesteps is None else bound
    options = {"evaluations": evaluations, "pixels": pixels, "seed": seed, "batch_size": batch_size}
    return function(denoiser, x_0, label, **options)


# The terms, traceable: nats and squared errors, elementwise.


def prior_term(denoiser: Denoiser, x_0):
    """KL(q(x_1 | x_0) ‖ N(0, α² + σ²)), the prior that sampling starts from; nats, elementwise."""
    return prior_at(x_0, denoiser.process.log_snr(np.float64(denoiser.latest)))


def prior_at(x_0, log_snr):
    """The prior term at a log-SNR; nats, elementwise."""
    # Scaled to unit variance the prior is N(0, I), and x_1 has mean √sigmoid(λ) x_0 and variance
    # sigmoid(−λ).
    log_snr = ops.cast(log_snr, x_0.dtype)
    signal = ops.sigmoid(log_snr)
    return 0.5 * (signal * (ops.square(x_0) - 1.0) + ops.softplus(log_snr))


def step_term(
    denoiser: Denoiser, x_0, noise, t, s, variance="posterior", floor=0.0, pixels=None, label=None
):
    """KL(q(x_s | x_t, x_0) ‖ p(x_s | x_t)) at one x_t = α x_0 + σ ε.

    Args:
        denoiser: (x_t, t) → x̂_0.
        x_0: float (B, ...).
        noise: ε, as x_0.
        t: (B,) or scalar.
        s: (B,) or scalar, earlier than t.
        variance: see `bound`.
        floor: ln of the variance that stands for β̃ in the decoder.
        pixels: x̂_0 is clipped to their range.
        label: int (B,) or None.

    Returns:
        (nats, ‖x̂_0 − x_0‖²), elementwise as x_0.
    """
    x_t = _noisy(denoiser.process, x_0, noise, t)
    clean, log_p = _reverse(denoiser, x_t, t, s, variance, floor, pixels, label)
    error = ops.square(x_0 - clean)
    return step_kl(denoiser.process, error, log_p, t, s, floor), error


def step_kl(process: Process, error, log_p, t, s, floor=0.0):
    """KL of q(x_s | x_t, x_0) to N(c_0 x̂_0 + c_t x_t, exp log_p), given (x̂_0 − x_0)²; nats."""
    c_0, _, _ = process.posterior(t, s)
    _, log_q = log_variances(process, t, s, floor)
    excess = rows(log_q, error) - log_p
    mismatch = rows(c_0, error) ** 2 * error * ops.exp(-log_p)
    return 0.5 * (ops.expm1(excess) - excess + mismatch)


def decoder_term(
    denoiser: Denoiser, x_0, noise, t, variance="posterior", floor=0.0, pixels=None, label=None
):
    """−ln p(x_0 | x_t) of the first latent: N(x̂_0, v), integrated over bins where there are any.

    Args:
        denoiser: see `step_term`; so are the other arguments.
        x_0: float (B, ...).
        noise: ε, as x_0.
        t: the first time, (B,) or scalar.
        variance: see `bound`; "posterior" takes `floor`, because β̃ is 0 there (the clipping of
            improved DDPM, arXiv:2102.09672, sec. 3.1).
        floor: ln β̃ of the second step.
        pixels: None for a density.
        label: int (B,) or None.

    Returns:
        (nats, ‖x̂_0 − x_0‖²), elementwise as x_0.
    """
    x_t = _noisy(denoiser.process, x_0, noise, t)
    clean, log_p = _reverse(denoiser, x_t, t, None, variance, floor, pixels, label)
    return negative_log(x_0, clean, log_p, pixels), ops.square(x_0 - clean)


def negative_log(x_0, mean, log_variance, pixels):
    """−ln N(x_0; mean, exp log_variance), or of its mass in the bin; nats, elementwise."""
    if pixels is not None:
        return -pixels.log_probability(x_0, mean, log_variance)
    distance = ops.square(x_0 - mean) * ops.exp(-log_variance)
    return 0.5 * (distance + log_variance + math.log(2.0 * math.pi))


def log_variances(process: Process, t, s, floor):
    """(ln β, ln β̃) of the step from t to s; at s = 0 or None, (ln σ_t², `floor`)."""
    if s is None:
        log_noise = 2.0 * ops.log(process.sigma(t))
        return log_noise, ops.cast(floor, log_noise.dtype) + ops.zeros_like(log_noise)
    _, _, posterior = process.posterior(t, s)
    _, transition = process.transition(t, s)
    inner = posterior > 0.0
    log_posterior = ops.log(ops.where(inner, posterior, 1.0))
    return ops.log(transition), ops.where(inner, log_posterior, ops.cast(floor, posterior.dtype))


def _reverse(denoiser, x_t, t, s, variance, floor, pixels, label):
    """Mean of x_0 and ln variance of p(x_s | x_t)."""
    if variance == "learned":
        clean, log_variance = denoiser.reverse(x_t, t, s, label, floor)
    else:
        clean = _clean(denoiser, x_t, t, label)
        if callable(variance):
            log_variance = rows(ops.log(variance(x_t, t, s)), x_t)
        else:
            log_beta, log_posterior = log_variances(denoiser.process, t, s, floor)
            log_variance = rows(log_beta if variance == "beta" else log_posterior, x_t)
    if pixels is not None:
        clean = ops.clip(clean, pixels.low, pixels.high)
    return clean, log_variance


def _clean(denoiser, x_t, t, label=None):
    return denoiser(x_t, t) if label is None else denoiser(x_t, t, label)


def _noisy(process, x_0, noise, t):
    noise = ops.cast(noise, x_0.dtype)
    return rows(process.alpha(t), x_0) * x_0 + rows(process.sigma(t), x_0) * noise


# Progressive coding.


def rate_distortion(bound: Bound) -> tuple[np.ndarray, np.ndarray]:
    """What x̂_0 is worth after so many bits (progressive coding, DDPM, sec. 4.3).

    Returns:
        rate: bits a dimension sent until x_t is known, from most noise to least, (K + 1,).
        distortion: root mean square of x̂_0(x_t) − x_0 in units of the data, (K + 1,).

    Raises:
        TypeError: If it is no bound.
        ValueError: If not all steps were evaluated.
    """
    if not isinstance(bound, Bound):
        raise TypeError(
            f"Expected what likelihood.bound() returns. Received {_checks.shown(bound)}."
        )
    if not bound.complete:
        raise ValueError(
            "Progressive coding needs the bound of every step: leave out evaluations=..., and use "
            "bound(), with fewer steps=... if that takes too long."
        )
    sent = np.cumsum(bound.steps.mean(axis=0)[::-1])
    rate = bound.prior.mean() + np.concatenate([[0.0], sent])
    error = bound.squared_error.mean(axis=0)
    return rate, np.sqrt(np.concatenate([error[:-1][::-1], error[-1:]]))


def progressive_decoding(model, x_0, times: Sequence[float], label=None, *, seed: int = 0):
    """x̂_0 as the receiver sees it while the latents arrive, one x_t drawn from the one before.

    Args:
        model: a `DiffusionModel` or any denoiser.
        x_0: float (N, ...).
        times: falling, in (0, 1].
        label: int (N,) or None.
        seed: of the noise.

    Returns:
        float32 (len(times), N, ...).

    Raises:
        TypeError: If the data are not floats.
        ValueError: If the times do not fall.
    """
    denoiser = levels.of(model)
    process = denoiser.process
    x_0 = ops.convert_to_tensor(as_float(x_0, "as the model was trained on").astype("float32"))
    times = _checks.array("times", times, "a vector of falling numbers in (0, 1]", rank=1)
    if not len(times) or (np.diff(times) >= 0).any() or times[-1] <= 0 or times[0] > 1:
        raise ValueError(f"times must fall strictly within (0, 1]. Received {times.tolist()}.")
    label = _checked_label(denoiser, label, x_0.shape[0])
    _checks.seed(seed)
    keys = random.fold_in(random.keys(seed), np.arange(x_0.shape[0]))
    label_ = () if label is None else (ops.convert_to_tensor(label, "int32"),)
    clean = _backend.compiled(lambda x, t, *y: _clean(denoiser, x, t, *y), denoiser.variables)
    times = _numpy(process.snap(_tensor(np.asarray(times, "float64"))))
    x_t, strip = None, []
    for k, s in enumerate(times):
        noise = random.normal(random.fold_in(keys, k), x_0.shape[1:])
        if x_t is None:
            x_t = _noisy(process, x_0, noise, _tensor(s))
        else:
            c_0, c_t, variance = process.posterior(_tensor(times[k - 1]), _tensor(s))
            mean = rows(c_0, x_0) * x_0 + rows(c_t, x_0) * x_t
            x_t = mean + rows(ops.sqrt(variance), x_0) * noise
        strip.append(np.asarray(ops.convert_to_numpy(clean(x_t, _tensor(s), *label_))))
    return np.stack(strip)


# Plumbing.


def _check_variance(denoiser: Denoiser, variance):
    learned = denoiser.learns_variance
    if variance is None:
        return "learned" if learned else "posterior"
    if callable(variance):
        return variance
    _names.one_of("variance", variance, VARIANCES)
    if variance == "learned" and not learned:
        Denoiser.reverse(denoiser, None, None, None)  # says so
    return variance


def _latents(denoiser: Denoiser, steps: int | None) -> np.ndarray:
    """Times of the latents, rising, float64; the first is the decoder's."""
    process = denoiser.process
    steps = process.resolution if steps is None else steps
    check_steps(steps, process)
    visited = grid("uniform", steps, process, denoiser.latest, _backend.TIME_DTYPE)
    times = _numpy(visited)[::-1]
    if process.num_timesteps is None and levels.first_time(process) == 0.0:
        times = np.concatenate([[0.0], times])  # the process has a latent of its own there
    return times


def _floor(process: Process, times: np.ndarray) -> float:
    """ln β̃ of the second step, which stands for that of the first, ln 0."""
    if len(times) == 1 or times[0] == 0.0:
        return float(_numpy(2.0 * ops.log(process.sigma(times[0]))))
    return float(_numpy(log_variances(process, times[1], times[0], 0.0)[1]))


def _choose(total: int, count: int, num: int, seed: int) -> np.ndarray:
    """(N, K) steps: all of them, or one in each of K equal strata, the offset random."""
    if count == total:
        return np.broadcast_to(np.arange(total), (num, total))
    offsets = _uniform(num, seed)
    return ((np.arange(count) + offsets[:, None]) * (total / count)).astype(int)


def _uniform(num: int, seed: int) -> np.ndarray:
    keys = random.fold_in(random.keys(_checks.seed(seed)), np.arange(num))
    return _numpy(random.uniform(random.fold_in(keys, _CHOICE)))


def _checked_label(denoiser: Denoiser, label, num: int) -> np.ndarray | None:
    """Labels that the denoiser knows, one an image, or None."""
    if label is None:
        return None
    wanted = f"{num} integers, one an image"
    labels = _checks.array("label", label, wanted, kinds="iu")
    if labels.shape != (num,):
        raise ValueError(f"label must be {wanted}. Received shape {labels.shape}.")
    takes_labels = "label" in inspect.signature(denoiser.__call__).parameters
    known = hasattr(denoiser, "num_classes") or not takes_labels
    if known:
        check_labels(labels, getattr(denoiser, "num_classes", None))
    return labels


def _batches(denoiser: Denoiser, x_0: np.ndarray, label, seed: int, batch_size: int):
    """(rows, images, keys, (labels,) or ()): the last batch filled up, so that shapes are few."""
    labels = _checked_label(denoiser, label, len(x_0))
    _checks.seed(seed)
    size = min(_checks.integer("batch_size", batch_size), len(x_0))
    for first in range(0, len(x_0), size):
        rows_ = np.minimum(np.arange(first, first + size), len(x_0) - 1)
        keys = random.fold_in(random.keys(seed), rows_)
        label_ = () if labels is None else (ops.convert_to_tensor(labels[rows_], "int32"),)
        yield rows_, ops.convert_to_tensor(x_0[rows_]), keys, label_


def _tensor(times: np.ndarray):
    return ops.convert_to_tensor(times, dtype=_backend.TIME_DTYPE)


def _numpy(tensor) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor), "float64")


def _stack(columns: list, num: int) -> np.ndarray:
    return np.stack([_numpy(c) for c in columns], axis=1) if columns else np.zeros((num, 0))


def _mean(values):
    """Mean over all axes but the first."""
    return ops.mean(values, axis=tuple(range(1, len(values.shape))))
