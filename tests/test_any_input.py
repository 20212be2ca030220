"""Whatever comes, at every public entry: a sound result, or one clear sentence from the library.

Each entry is called with arguments that are right but for one or two, for which odd values are
drawn. What comes back is finite; or a ValueError, a TypeError or, for files, an OSError is raised
by a `raise` of the library's own, and its message says what came. Nothing else gets through: no
traceback from the depths of TensorFlow, Keras, NumPy or Pillow, and no NaN.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import re
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import numpy

import tfdiffusion as tfd
from tfdiffusion import callbacks, models, score_matching
from tfdiffusion import score_matching as sm
from tfdiffusion.denoiser import Clipped, Conditioned, DynamicallyThresholded, Threshold

PACKAGE = Path(tfd.__file__).parent
EXAMPLES = 16

# Odd values.

NAN, INF = float("nan"), float("inf")
THINGS = [None, 3, "abc", b"abc", [], {}, (1, 2), 2.5, object(), np.zeros(3), print]
NAMES = ["nonesuch", "LINEAR", "", None, 3, [], {}, ("linear",), b"linear", True, np.zeros(3)]
SIZES = [0, -1, True, 2.5, None, "3", 2**40, [], NAN, 1j, np.int64(2), np.float32(2), np.arange(2)]
NUMBERS = [NAN, INF, -INF, -1.0, 0, True, None, "3", [], 1j, 10**400, np.float32(0.5), np.zeros(2)]
SEEDS = [-1, 2**63, 2**64, -(2**70), 0.5, NAN, True, None, "3", [1, 2], np.int64(3), np.zeros((2, 2))]
SHAPES = [(), 3, None, "ab", (0,), (-1, 2), (2.5,), (True,), (2**40,), (2**20, 2**20), ((1,), 2)]
PATHS = [None, 3, 2.5, [], {}, b"x", object(), True]
TIMES = [NAN, INF, -1.0, 2.0, True, None, "0.5", 1j, np.zeros(3), np.ones((2, 2)), [0.5, None], []]
DTYPES = "uint8 int32 int64 float16 float32 float64 bool complex64 object str".split()


def array(shape, dtype, value) -> np.ndarray:
    """An array full of a value, as far as the dtype can hold it."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.full(shape, value).astype(dtype)


arrays = st.builds(
    array,
    st.lists(st.integers(0, 5), max_size=5).map(tuple),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 0.5, 1.0, -1.0, 3.0, 300.0, 1e30, NAN, INF]),
)
ragged = [[[1.0], [1.0, 2.0]], [], "abc", None, 3, [None], {"a": 1}, np.float32(1.0)]
ARRAYS = st.one_of(arrays, arrays, st.sampled_from(ragged))


def like(right) -> st.SearchStrategy:
    """Arrays of the right shape but another dtype or with other values, and all kinds of others."""
    same = st.builds(
        array,
        st.just(np.shape(right)),
        st.sampled_from(DTYPES),
        st.sampled_from([0.0, 0.5, -1.0, 3.0, 300.0, 1e30, NAN, INF]),
    )
    return st.one_of(same, ARRAYS)


# What makes a call: the entry, its arguments, and for each of them where odd values come from.


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public entry.

    Attributes:
        name: of the test.
        call: the entry.
        right: arguments that work.
        odd: name of an argument → odd values, a list or a strategy.
        shape: of the result, for the right arguments; None if it has none.
    """

    name: str
    call: Callable
    right: Mapping
    odd: Mapping
    shape: tuple | None = None


ENTRIES: list[Entry] = []


def entry(name: str, call: Callable, shape: tuple | None = None, /, **arguments) -> None:
    """Adds an entry: argument=(right value, odd values)."""
    right = {key: value for key, (value, _) in arguments.items() if value is not ...}
    odd = {key: values for key, (_, values) in arguments.items() if values is not None}
    odd = {key: like(right[key]) if v is ARRAYS and key in right else v for key, v in odd.items()}
    ENTRIES.append(Entry(name, call, right, odd, shape))


def lazily(make: Callable, method: str | None = None) -> Callable:
    """A call of something, or of its method, that is made when it is first needed."""
    return lambda **arguments: (
        make()(**arguments) if method is None else getattr(make(), method)(**arguments)
    )


X = np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2)
KEYS = numpy(tfd.random.keys([0, 1, 2]))
CHAIN = tfd.processes.LinearBeta(40)
VP = tfd.processes.VariancePreserving()
GAUSS = tfd.exact.GaussianMixture([[-1.0, 0.0], [1.0, 0.0]], 0.1)
IMAGES = np.linspace(-1, 1, 64, dtype="float32").reshape(4, 4, 4, 1)
QUICK = tfd.samplers.Sampling("ddim", "uniform", 2)
SIGMAS = (1.0, 0.5, 0.25)


def network(**arguments):
    return tfd.networks.MLP(width=8, depth=1, **arguments)


@functools.cache
def model(num_classes=3):
    made = tfd.DiffusionModel(
        network(num_classes=num_classes), "vp", "v", sampling=QUICK, bounded=True
    )
    made.build((None, 2))
    made.compile("adam")
    return made


@functools.cache
def score_model():
    made = sm.ScoreModel(sm.ScoreMLP(SIGMAS, width=8, depth=1), SIGMAS)
    made.build((None, 2))
    return made


@functools.cache
def judge():
    return tfd.evaluation.build_judge((4, 4, 1), 2)


@functools.cache
def examples():
    return tfd.data.read((IMAGES, np.array([0, 1, 0, 1])))


# Processes, times, predictions, weights, noise.

P, T, S = tfd.processes, tfd.times, tfd.samplers
entry("processes.get", P.get, process=("linear", NAMES))
entry("zero_terminal_snr", P.zero_terminal_snr, process=(CHAIN, THINGS))
for cls, names in (
    (P.VariancePreserving, ("beta_min", "beta_max")),
    (P.SubVariancePreserving, ("beta_min", "beta_max")),
    (P.VarianceExploding, ("sigma_min", "sigma_max")),
    (P.EDM, ("sigma_min", "sigma_max", "rho")),
    (P.ContinuousCosine, ("log_snr_min", "log_snr_max")),
    (P.Cosine, ("offset", "max_beta")),
    (P.LinearBeta, ("beta_start", "beta_end")),
    (P.ScaledLinearBeta, ("beta_start", "beta_end")),
    (P.SigmoidBeta, ("beta_start", "beta_end")),
):
    steps = {"num_timesteps": (40, SIZES)} if issubclass(cls, P.Tabulated) else {}
    entry(cls.__name__, cls, **steps, **{name: (..., NUMBERS) for name in names})
entry(
    "Tabulated",
    P.Tabulated,
    alphas=([0.9, 0.5], ARRAYS),
    sigmas=([0.1, 0.5], ARRAYS),
)
entry("from_betas", P.Tabulated.from_betas, betas=([0.1, 0.99], ARRAYS))
entry("from_sigmas", P.Tabulated.from_sigmas, sigmas=([0.1, 0.9], ARRAYS))
entry("Interpolated", P.Interpolated, chain=(CHAIN, THINGS), along=("level", NAMES))
for process in (VP, CHAIN):
    kind = type(process).__name__
    entry(f"{kind}.marginal", process.marginal, x_0=(X, ARRAYS), t=(0.5, TIMES))
    entry(f"{kind}.transition", process.transition, t=(0.5, TIMES), s=(0.25, TIMES))
    entry(f"{kind}.posterior", process.posterior, t=(0.5, TIMES), s=(0.25, TIMES))
entry("predictions.get", tfd.predictions.get, prediction=("v", NAMES))
rows_of = {"alpha": (0.6, TIMES), "sigma": (0.8, ["3", None, 1j, True, {}]), "sigma_data": (1.0, ["3", None])}
V = tfd.predictions.get("v")
rows_of["alpha"] = (0.6, rows_of["sigma"][1])
entry("target", V.target, X.shape, x_0=(X, ARRAYS), noise=(X, ARRAYS), **rows_of)
entry("clean", V.clean, X.shape, y=(X, ARRAYS), x_t=(X, ARRAYS), **rows_of)
entry("weights.get", tfd.weights.get, weight=("snr", NAMES))
entry("MinSNR", tfd.weights.MinSNR, gamma=(5.0, NUMBERS))
entry("P2", tfd.weights.P2, gamma=(1.0, NUMBERS), k=(1.0, NUMBERS))
entry("Sigmoid", tfd.weights.Sigmoid, bias=(0.0, NUMBERS))
entry("random.keys", tfd.random.keys, seeds=([1, 2], SEEDS))
for draw in (tfd.random.uniform, tfd.random.normal):
    entry(f"random.{draw.__name__}", draw, (3, 2), keys=(KEYS, ARRAYS), shape=((2,), SHAPES))

entry("times.get", T.get, distribution=("uniform", NAMES))
entry("DiscreteUniform", T.DiscreteUniform, num_timesteps=(5, SIZES))
entry("LogitNormal", T.LogitNormal, mean=(0.0, NUMBERS), std=(1.0, NUMBERS))
entry("LogNormalSigma", T.LogNormalSigma, mean=(0.0, NUMBERS), std=(1.0, NUMBERS))
entry(
    "TimeDistribution.sample",
    T.get("logit_normal").sample,
    (3,),
    keys=(KEYS, ARRAYS),
    process=(VP, THINGS),
    latest=(1.0, NUMBERS),
)
entry(
    "times.grid",
    T.grid,
    (4,),
    name=("karras", NAMES),
    num_steps=(4, SIZES),
    process=(CHAIN, THINGS),
    latest=(1.0, NUMBERS),
    dtype=("float32", NAMES),
)
entry("check_steps", T.check_steps, num_steps=(4, SIZES), process=(CHAIN, None))
entry(
    "Timesteps",
    T.Timesteps,
    spacing=("leading", NAMES),
    offset=(0, SIZES),
    levels=(None, NAMES),
    count=(None, SIZES),
)
entry("Shifted", T.Shifted, last=(0.1, NUMBERS), shift=(1.0, NUMBERS))

# Samplers, denoisers, guidance.

request = {"sampler": ("ddim", NAMES), "steps": (2, SIZES)}
grids = [*NAMES, [1.0, 0.5], [0.5, 1.0], [NAN], [], ["a"], [[1.0], [0.5]], [2.0, 1.0], 0.5]
request["grid"] = ("uniform", grids)
entry(
    "sample",
    tfd.sample,
    (2, 2),
    denoiser=(GAUSS, [*THINGS, model]),
    seeds=([0, 1], SEEDS),
    shape=((2,), SHAPES),
    x=(None, ARRAYS),
    **request,
)
entry("encode", S.encode, (3, 2), denoiser=(GAUSS, THINGS), x_0=(X, ARRAYS), **request)
entry("decode", S.decode, (3, 2), denoiser=(GAUSS, THINGS), x_t=(X, ARRAYS), **request)
entry("reconstruct", S.reconstruct, (3, 2), denoiser=(GAUSS, THINGS), x_0=(X, ARRAYS), **request)
entry("slerp", S.slerp, (3, 2), first=(X, ARRAYS), second=(X[::-1], ARRAYS), share=(0.5, ARRAYS))
entry(
    "interpolate",
    S.interpolate,
    (1, 3, 2),
    denoiser=(GAUSS, THINGS),
    first=(X, ARRAYS),
    second=(X[::-1], ARRAYS),
    shares=([0.5], ARRAYS),
    **request,
)
entry(
    "noising_path",
    S.noising_path,
    (2, 3, 2),
    process=("vp", NAMES),
    x_0=(X, ARRAYS),
    times=([0.5, 1.0], ARRAYS),
    seed=(0, SEEDS),
)
entry("prior", S.prior, (3, 2), denoiser=(GAUSS, THINGS), keys=(KEYS, ARRAYS), shape=((2,), SHAPES))
entry("samplers.get", S.get, sampler=("ddim", NAMES))
entry("DDPM", S.DDPM, variance=("beta", NAMES))
entry("DDIM", S.DDIM, eta=(0.5, NUMBERS), clip=(None, NUMBERS))
entry(
    "PredictorCorrector",
    S.PredictorCorrector,
    predictor=("ddpm", NAMES),
    snr=(0.1, NUMBERS),
    corrections=(1, SIZES),
)
entry(
    "Heun", S.Heun, **{name: (1.0, NUMBERS) for name in ("churn", "churn_from", "churn_to", "noise")}
)
for cls in (S.DPMSolver, S.DEIS, S.LMS, S.PLMS, S.UniPC):
    entry(cls.__name__, cls, order=(2, SIZES))
entry("PLMS start", S.PLMS, start_up=("trapezoid", NAMES))
entry(
    "DPMSolverPP", S.DPMSolverPP, order=(2, SIZES), curvature=(0.5, NUMBERS), settles=(15, SIZES)
)
entry("SDEDPMSolverPP", S.SDEDPMSolverPP, order=(2, SIZES), settles=(15, SIZES))
entry("RK45", S.RK45, rtol=(0.1, NUMBERS), atol=(0.1, NUMBERS), max_evaluations=(50, SIZES))
entry(
    "Sampling",
    S.Sampling,
    sampler=("ddim", NAMES),
    grid=("uniform", NAMES),
    steps=(4, SIZES),
    threshold=("clip", NAMES),
)
entry("Threshold", Threshold, limit=(1.0, NUMBERS), quantile=(0.5, NUMBERS))
entry("Clipped", Clipped, denoiser=(GAUSS, THINGS), limit=(1.0, NUMBERS))
entry(
    "DynamicallyThresholded",
    DynamicallyThresholded,
    denoiser=(GAUSS, THINGS),
    quantile=(0.5, NUMBERS),
    most=(2.0, NUMBERS),
)
entry(
    "NetworkDenoiser",
    lambda network=None, **others: tfd.denoiser.NetworkDenoiser(network, **others),
    network=(print, THINGS),
    process=("vp", NAMES),
    prediction=("v", NAMES),
    time_input=("timestep", NAMES),
    sigma_data=(1.0, NUMBERS),
)
label_values = st.one_of(ARRAYS, st.sampled_from([-1, 7, 2**40, 1.5, "1", True, [0, 1, 9], [0, 1]]))
entry(
    "Conditioned",
    lambda label, denoiser=None: Conditioned(denoiser or model().denoiser(), label),
    label=(1, label_values),
    denoiser=(None, [3, "abc", GAUSS]),
)
entry(
    "ClassifierFreeGuidance",
    lambda label, scale, denoiser=None: tfd.guidance.ClassifierFreeGuidance(
        denoiser or model().denoiser(), label, scale
    )(X, 0.5),
    (3, 2),
    label=(1, label_values),
    scale=(2.0, NUMBERS),
    denoiser=(None, [3, "abc", GAUSS]),
)
entry(
    "GaussianMixture",
    tfd.exact.GaussianMixture,
    means=([[0.0, 1.0]], ARRAYS),
    variances=([1.0], ARRAYS),
    weights=([1.0], ARRAYS),
    process=("vp", NAMES),
)
entry("GaussianMixture.draw", lambda **a: GAUSS.draw(**a)[0], (3, 2), num=(3, SIZES), seed=(0, SEEDS))
for method, shape in (("__call__", (3, 2)), ("score", (3, 2)), ("log_density", (3,))):
    bound = getattr(GAUSS, method)
    entry(f"GaussianMixture.{method}", bound, shape, x_t=(X, ARRAYS), t=(0.5, [None, "1", 1j, [], np.ones(2)]))

# Models.

entry(
    "DiffusionModel",
    tfd.DiffusionModel,
    network=(network(), THINGS),
    process=("vp", NAMES),
    prediction=("v", NAMES),
    weight=("snr", NAMES),
    times=("uniform", NAMES),
    label_dropout=(0.1, NUMBERS),
    ema_decay=(0.9, NUMBERS),
    time_input=("timestep", NAMES),
    sigma_data=(1.0, NUMBERS),
    bounded=(None, ["yes", 1, [], NAN]),
    sampling=(QUICK, THINGS),
    seed=(0, SEEDS),
)
entry(
    "DiffusionModel.sample",
    lazily(model, "sample"),
    (2, 2),
    num=(2, SIZES),
    label=(1, label_values),
    guidance=(1.0, NUMBERS),
    threshold=("auto", NAMES),
    seed=(0, SEEDS),
    seeds=(None, SEEDS),
    batch_size=(256, SIZES),
    **request,
)
entry(
    "DiffusionModel.sample, unconditional",
    lazily(lambda: model(None), "sample"),
    (2, 2),
    num=(2, SIZES),
    label=(None, label_values),
    guidance=(1.0, NUMBERS),
)
entry(
    "DiffusionModel.__call__",
    lambda x_t, t, label: model()(x_t, t, label),
    (3, 2),
    x_t=(X, arrays),
    t=(0.5, TIMES),
    label=(np.array([0, 1, 2]), label_values),
)
entry(
    "DiffusionModel.denoiser",
    lambda x_t, t, label: model().denoiser()(x_t, t, label),
    (3, 2),
    x_t=(X, ARRAYS),
    t=(0.5, [None, "1", 1j, [], np.ones(2)]),
    label=(np.array([0, 1, 2]), label_values),
)
entry("DiffusionModel.guided", lazily(model, "guided"), label=(1, label_values), guidance=(2.0, NUMBERS), threshold=("auto", NAMES))
entry(
    "DiffusionModel.evaluate",
    lambda x, y: model().evaluate(x, y, verbose=0),
    (5,),
    x=(X, ARRAYS),
    y=(np.array([0, 1, 2]), ARRAYS),
)
entry(
    "ScoreModel",
    sm.ScoreModel,
    network=(sm.ScoreMLP(SIGMAS, width=8, depth=1), THINGS),
    sigmas=(SIGMAS, ARRAYS),
    objective=("denoising", NAMES),
    ema_decay=(0.9, NUMBERS),
    bounded=(None, ["yes", 1, [], NAN]),
    seed=(0, SEEDS),
)
langevin_request = {
    "steps_per_level": (1, SIZES),
    "step_size": (0.01, NUMBERS),
    "convention": ("ncsnv2", NAMES),
}
entry(
    "ScoreModel.sample",
    lazily(score_model, "sample"),
    (2, 2),
    num=(2, SIZES),
    seed=(0, SEEDS),
    seeds=(None, SEEDS),
    batch_size=(256, SIZES),
    **langevin_request,
)
entry(
    "ScoreModel.inpaint",
    lazily(score_model, "inpaint"),
    (3, 2),
    known=(X, ARRAYS),
    mask=([1, 0], ARRAYS),
    seed=(0, SEEDS),
    seeds=(None, SEEDS),
    batch_size=(256, SIZES),
    **langevin_request,
)
entry(
    "ScoreModel.interpolate",
    lazily(score_model, "interpolate"),
    (2, 2),
    seed_a=(0, SEEDS),
    seed_b=(1, SEEDS),
    num=(2, SIZES),
    batch_size=(256, SIZES),
    **langevin_request,
)
entry("ScoreModel.score", lazily(score_model, "score"), (3, 2), x=(X, ARRAYS), level=(1, label_values))
entry(
    "LearnedVarianceModel",
    lambda **arguments: tfd.variational.LearnedVarianceModel(network(out_features=4), **arguments),
    process=(CHAIN, NAMES),
    objective=("vlb", NAMES),
    vlb_weight=(0.1, NUMBERS),
    levels=(4, SIZES),
)
entry(
    "VariationalDiffusionModel",
    lambda **arguments: tfd.variational.VariationalDiffusionModel(network(), **arguments),
    prediction=("v", NAMES),
    gamma_min=(-9.0, NUMBERS),
    gamma_max=(5.0, NUMBERS),
    levels=(4, SIZES),
    times=("uniform", NAMES),
)
entry(
    "WithFourierFeatures",
    tfd.variational.WithFourierFeatures,
    network=(network(), THINGS),
    frequencies=((1, 2), [*SHAPES, [1.5], ["1"], [60]]),
)

# Networks.

entry(
    "MLP",
    tfd.networks.MLP,
    width=(8, SIZES),
    depth=(1, SIZES),
    out_features=(None, SIZES),
    time_embedding=("fourier", NAMES),
    fourier_scale=(1.0, NUMBERS),
    num_classes=(2, SIZES),
)
entry(
    "UNet",
    tfd.networks.UNet,
    out_channels=(1, SIZES),
    widths=((8, 8), SHAPES),
    blocks_per_level=(1, SIZES),
    attention_levels=((1,), SHAPES),
    num_heads=(None, SIZES),
    head_dim=(None, SIZES),
    groups=(4, SIZES),
    norm_epsilon=(1e-5, NUMBERS),
    downsample=("conv", NAMES),
    upsample=("conv", NAMES),
    downsample_padding=(0, SIZES),
    patch_size=(1, SIZES),
    dropout=(0.0, NUMBERS),
    output_scale=(1.0, NUMBERS),
    time_embedding=("sinusoidal", NAMES),
    time_width=(None, SIZES),
    freq_shift=(1, SIZES),
    fourier_scale=(1.0, NUMBERS),
    num_classes=(2, SIZES),
)
LEVEL = {"width": 4, "blocks": 1, "groups": 2}
entry(
    "UNet2D",
    tfd.networks.UNet2D,
    out_channels=(1, SIZES),
    encoder=([LEVEL], THINGS),
    middle=(None, THINGS),
    decoder=([{**LEVEL, "blocks": 2}], THINGS),
    norm_epsilon=(1e-5, NUMBERS),
    out_groups=(2, SIZES),
    activation=("silu", NAMES),
    downsample_padding=(0, SIZES),
    dropout=(0.0, NUMBERS),
    time_embedding=("sinusoidal", NAMES),
    time_width=(8, SIZES),
    time_scale=(1.0, NUMBERS),
    time_shift=(0.0, NUMBERS),
    freq_shift=(0, NUMBERS),
    num_times=(None, SIZES),
    label=(None, NAMES),
    num_classes=(None, SIZES),
)
entry(
    "Level",
    tfd.networks.Level,
    width=(4, SIZES),
    blocks=(1, SIZES),
    attention=("each", NAMES),
    resample=("conv", NAMES),
    pyramid=("skip", NAMES),
    groups=(2, SIZES),
    attention_groups=(2, SIZES),
    head_dim=(2, SIZES),
    output_scale=(1.0, NUMBERS),
)
N = tfd.networks
entry("ResidualDense", N.ResidualDense, width=(4, SIZES))
entry("GroupNormalization", N.GroupNormalization, groups=(2, SIZES), epsilon=(1e-5, NUMBERS), activation=("silu", NAMES))
entry("TimeEmbedding", N.TimeEmbedding, width=(8, SIZES), features=(8, SIZES), kind=("fourier", NAMES), freq_shift=(0, SIZES), fourier_scale=(1.0, NUMBERS))
entry("SelfAttention", N.SelfAttention, num_heads=(2, SIZES), groups=(2, SIZES), norm_epsilon=(1e-5, NUMBERS), output_scale=(1.0, NUMBERS), width=(4, SIZES))
entry("Downsample", N.Downsample, kind=("conv", NAMES), padding=(0, SIZES), width=(4, SIZES))
entry("Upsample", N.Upsample, kind=("conv", NAMES))
entry("ResidualBlock", N.ResidualBlock, width=(4, SIZES), groups=(2, SIZES), groups_out=(2, SIZES), norm_epsilon=(1e-5, NUMBERS), resample=("down", NAMES), dropout=(0.1, NUMBERS), output_scale=(1.0, NUMBERS), activation=("relu", NAMES))
entry("NCSN", sm.NCSN, num_levels=(3, SIZES), width=(4, SIZES), patch_size=(1, SIZES))
entry("NCSNv2", sm.NCSNv2, sigmas=(SIGMAS, ARRAYS), width=(4, SIZES), patch_size=(1, SIZES))
entry("ScoreMLP", sm.ScoreMLP, sigmas=(SIGMAS, ARRAYS), width=(4, SIZES), depth=(1, SIZES))
entry("InstanceNormPlus", sm.InstanceNormPlus, num_levels=(3, SIZES))


@functools.cache
def built(kind: str):
    if kind == "MLP":
        made, shape = network(num_classes=3), (None, 2)
    else:
        made = N.UNet(out_channels=1, widths=(4, 4), blocks_per_level=1, groups=2, num_classes=3, mid_attention=False)
        shape = (None, 4, 4, 1)
    made.build({"x": shape, "time": (None,), "label": (None,)})
    return made


for kind, x in (("MLP", X), ("UNet", IMAGES[:3])):
    entry(
        f"{kind}.__call__",
        lambda kind=kind, **inputs: built(kind)(inputs),
        x.shape,
        x=(x, arrays),
        time=(np.ones(3, "float32"), arrays),
        label=(np.array([0, 1, 3]), arrays),
    )
entry("models.unet", models.unet, shape=((4, 4, 1), SHAPES), num_classes=(2, SIZES), size=("small", NAMES), dtype=("float32", NAMES))
entry("models.refinenet", models.refinenet, shape=((4, 4, 1), SHAPES), sigmas=(SIGMAS, ARRAYS), method=("ncsn", NAMES), size=("small", NAMES), dtype=("float32", NAMES))
entry("models.path", models.path, model=("mnist", [*NAMES, *PATHS]))
entry("models.load", models.load, model=("nonesuch", [*NAMES, *PATHS]))

# Data.

sources = st.one_of(ARRAYS, st.tuples(ARRAYS, ARRAYS), st.sampled_from(["nonesuch/", "/nonesuch", ".", 3, None, {}, object()]))
entry(
    "data.read",
    tfd.data.read,
    source=((IMAGES, np.array([0, 1, 0, 1])), sources),
    split=("train", NAMES),
    image_size=(4, SIZES),
    channels=(1, SIZES),
    data_dir=(None, PATHS),
)
entry(
    "Examples.batches",
    lambda **arguments: next(iter(examples().batches(**arguments))),
    batch_size=(2, SIZES),
    seed=(0, SEEDS),
    from_step=(0, SIZES),
)
entry("Examples.split", lazily(examples, "split"), num=(2, SIZES), seed=(0, SEEDS))
entry("Examples.arrays", lazily(examples, "arrays"), num=(2, SIZES))
entry("data.load", tfd.data.load, source=((IMAGES, np.array([0, 1, 0, 1])), sources), batch_size=(2, SIZES), seed=(0, SEEDS), image_size=(4, SIZES))
entry("data.toy", tfd.data.toy, (5, 2), name=("moons", NAMES), num=(5, SIZES), seed=(0, SEEDS))
entry("has_splits", tfd.data.has_splits, source=("digits", [*NAMES, *THINGS]))
entry("to_float", tfd.data.to_float, (2, 2), images=(np.zeros((2, 2), "uint8"), ARRAYS))
entry("to_uint8", tfd.data.to_uint8, (3, 2), images=(X, ARRAYS))

# Likelihood.

L = tfd.likelihood
PIXELS = L.Pixels(3)
CODED = np.array([[-1.0, 0.0], [1.0, 0.0]], "float32")
pixel_values = ["8 bits", 256, [], object()]
entry("Pixels", L.Pixels, levels=(4, SIZES), low=(0.0, NUMBERS), high=(1.0, NUMBERS))
entry("Pixels.check", PIXELS.check, (2, 2), x=(CODED, ARRAYS))
bits = {"x_0": (CODED, ARRAYS), "pixels": (PIXELS, pixel_values), "seed": (0, SEEDS), "batch_size": (4, SIZES)}
entry("bound", L.bound, model=(GAUSS, THINGS), label=(None, label_values), variance=("beta", NAMES), steps=(2, SIZES), evaluations=(1, SIZES), **bits)
entry("continuous_bound", L.continuous_bound, model=(GAUSS, THINGS), label=(None, label_values), evaluations=(1, SIZES), **bits)
entry("estimate", L.estimate, model=(GAUSS, THINGS), label=(None, label_values), evaluations=(1, SIZES), **bits)
entry(
    "bound, labels",
    lambda **arguments: L.bound(model(), steps=1, pixels=PIXELS, **arguments),
    x_0=(CODED, ARRAYS),
    label=(np.array([0, 1]), label_values),
)
entry(
    "log_likelihood",
    L.log_likelihood,
    model=(GAUSS, THINGS),
    label=(None, label_values),
    divergence=("gaussian", NAMES),
    draws=(1, SIZES),
    tolerance=(0.1, NUMBERS),
    dequantization=("uniform", NAMES),
    max_steps=(50, SIZES),
    prior_tolerance=(1.0, NUMBERS),
    **bits,
)
entry("progressive_decoding", L.progressive_decoding, model=(GAUSS, THINGS), x_0=(X, ARRAYS), times=([1.0, 0.5], ARRAYS), label=(None, label_values), seed=(0, SEEDS))
entry("rate_distortion", L.rate_distortion, bound=(..., THINGS))

# Evaluation.

E = tfd.evaluation
F = np.random.default_rng(0).normal(size=(4, 2))
entry("frechet_distance", E.frechet_distance, features_a=(F, ARRAYS), features_b=(F, ARRAYS))
entry("frechet_distance_from_moments", E.frechet_distance_from_moments, mean_a=(F[0], ARRAYS), covariance_a=(np.eye(2), ARRAYS), mean_b=(F[1], ARRAYS), covariance_b=(np.eye(2), ARRAYS))
entry("nearest_neighbours", E.nearest_neighbours, samples=(X, ARRAYS), references=(X, ARRAYS), k=(1, SIZES))
entry("build_judge", E.build_judge, shape=((4, 4, 1), SHAPES), num_classes=(2, SIZES))
entry("features", lambda judge_=None, **a: E.features(judge() if judge_ is None else judge_, **a), (4, 128), judge_=(None, THINGS[1:]), images=(IMAGES, ARRAYS), batch_size=(4, SIZES))
entry("judge_samples", lambda judge_=None, **a: E.judge_samples(judge() if judge_ is None else judge_, **a), judge_=(None, THINGS[1:]), samples=(IMAGES, ARRAYS), labels=(np.array([0, 1, 0, 1]), ARRAYS), references=(IMAGES, ARRAYS))
entry("train_judge", E.train_judge, images=(np.zeros((0, 4, 4, 1)), ARRAYS), labels=(np.array([0, 1, 0, 1]), ARRAYS), epochs=(1, SIZES), batch_size=(4, SIZES), seed=(0, SEEDS))

# Score matching.

ladder = {"sigma_max": (1.0, NUMBERS), "sigma_min": (0.1, NUMBERS)}
entry("geometric", sm.geometric, (3,), num_levels=(3, SIZES), **ladder)
entry("for_dimension", sm.for_dimension, dimension=(100, NUMBERS), overlap=(0.5, NUMBERS), **ladder)
entry("from_data", sm.from_data, x=(np.linspace(0, 1, 24).reshape(3, 8), ARRAYS), sigma_min=(0.1, NUMBERS), overlap=(0.5, NUMBERS), num_examples=(2, SIZES), seed=(0, SEEDS))
entry("variance_ratio", sm.variance_ratio, step_size=(0.1, NUMBERS), steps=(3, SIZES), sigma=(1.0, NUMBERS), ratio=(1.1, NUMBERS))
entry("best_step_size", sm.best_step_size, sigmas=(SIGMAS, ARRAYS), steps=(3, SIZES))


def downhill(x):
    return -x


def half_square(x):
    return 0.5 * keras.ops.sum(x**2, axis=-1)


O = sm.objectives
losses = {"score": (downhill, None), "x": (X, ARRAYS)}
keyed = {**losses, "keys": (KEYS, ARRAYS)}
projected = {"projection": ("gaussian", NAMES), "num_projections": (1, SIZES)}
entry("explicit", O.explicit, (3,), true_score=(X, ARRAYS), **losses)
entry("implicit", O.implicit, (3,), **losses)
entry("sliced", O.sliced, (3,), **keyed, **projected)
entry("finite_difference_sliced", O.finite_difference_sliced, (3,), step=(0.1, NUMBERS), **keyed, **projected)
for objective in (O.denoising, O.multi_level_denoising):
    entry(objective.__name__, objective, (3,), sigma=(0.5, ARRAYS), **keyed)
chain = {"x": (X, ARRAYS), "keys": (KEYS, ARRAYS), "step_size": (0.01, NUMBERS), "steps": (2, SIZES), "convention": ("ncsn", NAMES)}
entry("langevin", sm.langevin.langevin, (3, 2), score=(downhill, None), temperature=(1.0, NUMBERS), smallest_sigma=(1.0, NUMBERS), **chain)
entry("metropolis_langevin", sm.langevin.metropolis_langevin, energy=(half_square, None), **chain)
entry(
    "annealed",
    lambda **a: sm.langevin.annealed(lambda x, level: -x, noise=sm.langevin.noise_of(KEYS, (2,)), **a),
    (3, 2),
    sigmas=(SIGMAS, ARRAYS),
    step_size=(0.01, NUMBERS),
    steps_per_level=(1, SIZES),
    convention=("ncsn", NAMES),
)
entry("exact_score", sm.laboratory.exact_score, data=(X, ARRAYS), sigmas=(SIGMAS, ARRAYS))
entry(
    "field_error",
    lambda **a: sm.laboratory.field_error(score_model(), sm.laboratory.exact_score(X, SIGMAS), **a),
    level=(1, SIZES),
    x=(X, ARRAYS),
)
entry("unequal_modes", sm.laboratory.unequal_modes, num=(0, SIZES[:-3]), weights=((1, 4), ARRAYS), seed=(0, SEEDS[:-2]))

# Pictures, callbacks, exports, conversions.

G = tfd.plotting
PICTURES = np.zeros((3, 2, 2, 1), "float32")
layout = {"columns": (2, SIZES), "padding": (1, SIZES), "scale": (1, SIZES)}
entry("image_grid", G.image_grid, images=(PICTURES, ARRAYS), background=(0, SIZES), **layout)
entry("show_grid", G.show_grid, images=(PICTURES, ARRAYS), columns=(2, SIZES), row_labels=(None, THINGS))
entry("save_grid", G.save_grid, images=(PICTURES, ARRAYS), path=(3, PATHS), **layout)
entry("save_path_gif", G.save_path_gif, path_states=(PICTURES[None], ARRAYS), path=("x.gif", PATHS), seconds=(1.0, NUMBERS), hold=(1.0, NUMBERS), frames=(2, SIZES))
entry("loss_curve", G.loss_curve, history=({"loss": [1.0, 0.5]}, [*THINGS, {"loss": "abc"}, {"loss": [NAN]}, {"loss": 3}, {"loss": [[1], [1, 2]]}, {3: [1.0]}]), path=(None, PATHS))
entry("schedule_curves", G.schedule_curves, processes=(VP, THINGS), path=(None, PATHS))
edges = np.linspace(0, 1, 4)
entry("bits_by_time", G.bits_by_time, curves=({"a": (edges, np.ones(3))}, [*THINGS, {"a": 3}, {"a": (edges, edges)}, {"a": ("x", "y")}, {"a": (edges, [NAN] * 3)}]), path=(None, PATHS))
entry("plotting.rate_distortion", G.rate_distortion, curves=({"a": (edges, edges)}, [*THINGS, {"a": 3}, {"a": (edges, edges[1:])}, {"a": ("x", "y")}]), path=(None, PATHS))
limits = [3, (1,), (1, 0), ("a", "b"), (NAN, 1), (0, INF), (0, None), [], np.zeros((2, 2))]
plane = {"limits": (None, limits), "path": (None, PATHS)}
entry("scatter_2d", G.scatter_2d, samples=(X, st.one_of(ARRAYS, st.sampled_from([*THINGS, {"a": X}, {"a": 3}]))), titles=(None, THINGS), **plane)
fields = [None, 3, "abc", lambda x: x[:1], lambda x: x * NAN, lambda x: "abc", lambda x: x.astype(str)]
entry("field_2d", G.field_2d, fn=(downhill, fields), samples=(X, ARRAYS), resolution=(3, SIZES), density=(None, fields[1:]), **plane)
entry("compare_fields_2d", G.compare_fields_2d, learned=(downhill, fields), exact=(downhill, fields), resolution=(3, SIZES), titles=(("a", "b", "c"), THINGS), **plane)
entry("save_points_gif", G.save_points_gif, states=(X[None], ARRAYS), path=("x.gif", PATHS), titles=(None, THINGS), trail=(0, SIZES), seconds=(1.0, NUMBERS), frames=(2, SIZES))
entry("costs", G.costs, sizes=([1, 2], ARRAYS), seconds=({"a": [1.0, 2.0]}, [*THINGS, {"a": 3}, {"a": "xy"}, {"a": [1.0]}]), path=(None, PATHS))
entry("Checkpoint", callbacks.Checkpoint, path=("x.keras", PATHS), seconds=(1.0, NUMBERS), notes=(None, THINGS[1:-1]))
entry("SampleGrid", callbacks.SampleGrid, path=("x.png", PATHS), seconds=(1.0, NUMBERS), num=(4, SIZES), steps=(None, SIZES), seed=(0, SEEDS), columns=(None, SIZES))
entry("BitsPerDimension", callbacks.BitsPerDimension, images=(CODED, ARRAYS), every=(1, SIZES), evaluations=(1, SIZES), pixels=(PIXELS, pixel_values[1:]), batch_size=(4, SIZES))
entry("StopAtStep", callbacks.StopAtStep, steps=(4, SIZES), done=(0, SIZES))
entry("Progress", callbacks.Progress, steps=(4, SIZES), seconds=(1.0, NUMBERS), done=(0, SIZES))
entry("saved_model", lambda model_=None, **a: tfd.export.saved_model(model() if model_ is None else model_, **a), model_=(None, THINGS[1:]), directory=(3, PATHS), **request, threshold=("auto", NAMES))
entry("saved_model, score", lambda **a: tfd.export.saved_model(score_model(), **a), directory=(3, PATHS), steps_per_level=(1, SIZES))
entry("from_diffusers", tfd.convert.from_diffusers, path=(".", PATHS), image_size=(None, SIZES), ema_decay=(0.9, NUMBERS))
entry("read_network", tfd.convert.read_network, folder=(".", PATHS))
entry("to_diffusers", lambda model_=None, **a: tfd.convert.to_diffusers(model() if model_ is None else model_, **a), model_=(None, THINGS[1:]), folder=(3, PATHS))
entry("from_score_sde", tfd.convert.from_score_sde, path=("nonesuch.pth", PATHS), config=("vp/cifar10_ddpmpp", [*NAMES, {"image_size": "a"}, {"nonesuch": 1}, {3: 4}]))


# What has to hold.


def raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` statement of the library threw it."""
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    ours = PACKAGE in Path(code.co_filename).parents
    return ours and code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]


def leaves(value):
    """The values in nested lists, tuples and dicts, and these themselves."""
    yield value
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)


def says_what_came(message: str, arguments: Mapping) -> bool:
    """Whether a message names a value that came, or its shape or dtype."""
    if re.search(r"[Rr]eceived|\bgot\b|[Ff]ound", message):
        return True
    for value in leaves(arguments):
        told = [repr(value), str(value)]
        if isinstance(value, np.ndarray):
            told += [str(value.shape), str(value.dtype)]
        if any(text and text in message for text in told):
            return True
    return False


def assert_sound(result, shape: tuple | None = None) -> None:
    """Numbers that came back are finite, and of the shape that was expected."""
    if dataclasses.is_dataclass(result) or isinstance(result, Mapping):
        fields = result if isinstance(result, Mapping) else vars(result)
        result = [v for k, v in fields.items() if k != "squared_error"]  # may have a NaN column
    if isinstance(result, list | tuple) and shape is None:
        for part in result:
            assert_sound(part)
    elif keras.ops.is_tensor(result) or isinstance(result, np.ndarray | np.generic | float | tuple | list):
        values = numpy(result) if keras.ops.is_tensor(result) else np.asarray(result)
        if values.dtype.kind in "fc":
            assert np.isfinite(values).all(), "not finite"
        if shape is not None:
            assert values.shape == shape


def call(entry: Entry, arguments: Mapping):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return entry.call(**arguments)


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_a_sound_result_or_one_clear_sentence(entry, data):
    names = st.lists(st.sampled_from(sorted(entry.odd)), min_size=1, max_size=2, unique=True)
    arguments = dict(entry.right)
    for name in data.draw(names):
        odd = entry.odd[name]
        arguments[name] = data.draw(odd if isinstance(odd, st.SearchStrategy) else st.sampled_from(odd))
    try:
        result = call(entry, arguments)
    except (ValueError, TypeError, OSError, tfd.likelihood.ToleranceError) as error:
        assert raised_by_us(error)
        assert says_what_came(str(error), arguments)
    else:
        assert_sound(result)
