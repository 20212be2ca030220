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
import os
import re
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
from tfdiffusion import callbacks, models
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
SEEDS = [-1, 2**63, 2**64, -(2**70), 0.5, NAN, True, None, "3", [1, 2], np.int64(3), np.eye(2)]
SHAPES = [(), 3, None, "ab", (0,), (-1, 2), (2.5,), (True,), (2**40,), (2**20, 2**20), ((1,), 2)]
PATHS = [None, 3, 2.5, [], {}, b"x", object(), True]
TIMES = [NAN, INF, -1.0, 2.0, True, None, "0.5", 1j, np.zeros(3), np.ones((2, 2)), [0.5, None], []]
DTYPES = "uint8 int32 int64 float16 float32 float64 bool complex64 object str".split()


def array(shape, dtype, value) -> np.ndarray:
    """An array full of a value, as far as the dtype can hold it."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return np.full(shape, value).astype(dtype)


def filled(shapes, dtypes, values) -> st.SearchStrategy:
    return st.builds(array, shapes, st.sampled_from(dtypes), st.sampled_from(values))


any_shape = st.lists(st.integers(0, 5), max_size=5).map(tuple)
# Of arrays that are looked at, and of those that may be in a graph, where values cannot be looked
# at, and come through Keras, which has no other dtypes.
WHATEVER = DTYPES, [0.0, 0.5, -1.0, 3.0, 300.0, 1e30, NAN, INF]
MODERATE = [dtype for dtype in DTYPES if dtype not in ("object", "str")], [0.0, 0.5, -1.0, 300.0]
RAGGED = [[[1.0], [1.0, 2.0]], [], "abc", None, 3, [None], {"a": 1}, np.float32(1.0)]
ARRAYS = st.one_of(filled(any_shape, *WHATEVER), st.sampled_from(RAGGED))
FINITE = filled(any_shape, *MODERATE)


def like(right, odd) -> st.SearchStrategy:
    """Arrays of the right shape but of another dtype or with other values, or quite odd ones."""
    return st.one_of(
        filled(st.just(np.shape(right)), *(WHATEVER if odd is ARRAYS else MODERATE)), odd
    )


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
    for key in [key for key in right if odd.get(key) is ARRAYS or odd.get(key) is FINITE]:
        odd[key] = like(right[key], odd[key])
    ENTRIES.append(Entry(name, call, right, odd, shape))


def drawn_from(values) -> Callable:
    """`sizes(num=2)` for num=(2, SIZES), and so on."""
    return lambda **right: {name: (value, values) for name, value in right.items()}


sizes, numbers, names, seeds = map(drawn_from, (SIZES, NUMBERS, NAMES, SEEDS))
shapes, paths, things, times = map(drawn_from, (SHAPES, PATHS, THINGS, TIMES))
odd_arrays, finite = map(drawn_from, (ARRAYS, FINITE))


def lazily(make: Callable, method: str) -> Callable:
    """The method of something that is made when it is first needed."""
    return lambda **arguments: getattr(make(), method)(**arguments)


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
LABELS = st.one_of(ARRAYS, st.sampled_from([-1, 7, 2**40, 1.5, "1", True, [0, 1, 9], [0, 1]]))
labels = drawn_from(LABELS)
entry("processes.get", P.get, **names(process="linear"))
entry("zero_terminal_snr", P.zero_terminal_snr, **things(process=CHAIN))
for cls, arguments in (
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
    entry(cls.__name__, cls, **steps, **{name: (..., NUMBERS) for name in arguments})
entry("Tabulated", P.Tabulated, **odd_arrays(alphas=[0.9, 0.5], sigmas=[0.1, 0.5]))
entry("from_betas", P.Tabulated.from_betas, **odd_arrays(betas=[0.1, 0.99]))
entry("from_sigmas", P.Tabulated.from_sigmas, **odd_arrays(sigmas=[0.1, 0.9]))
entry("Interpolated", P.Interpolated, **things(chain=CHAIN), **names(along="level"))
for process in (VP, CHAIN):
    kind = type(process).__name__
    entry(f"{kind}.marginal", process.marginal, **odd_arrays(x_0=X), **times(t=0.5))
    entry(f"{kind}.transition", process.transition, **times(t=0.5, s=0.25))
    entry(f"{kind}.posterior", process.posterior, **times(t=0.5, s=0.25))
entry("predictions.get", tfd.predictions.get, **names(prediction="v"))
V = tfd.predictions.get("v")
rows_of = drawn_from(["3", None, 1j, True, {}])(alpha=0.6, sigma=0.8, sigma_data=1.0)
entry("target", V.target, X.shape, **finite(x_0=X, noise=X), **rows_of)
entry("clean", V.clean, X.shape, **finite(y=X, x_t=X), **rows_of)
entry("weights.get", tfd.weights.get, **names(weight="snr"))
entry("MinSNR", tfd.weights.MinSNR, **numbers(gamma=5.0))
entry("P2", tfd.weights.P2, **numbers(gamma=1.0, k=1.0))
entry("Sigmoid", tfd.weights.Sigmoid, **numbers(bias=0.0))
entry("random.keys", tfd.random.keys, **seeds(seeds=[1, 2]))
for draw in (tfd.random.uniform, tfd.random.normal):
    entry(f"random.{draw.__name__}", draw, (3, 2), **odd_arrays(keys=KEYS), **shapes(shape=(2,)))

entry("times.get", T.get, **names(distribution="uniform"))
entry("DiscreteUniform", T.DiscreteUniform, **sizes(num_timesteps=5))
entry("LogitNormal", T.LogitNormal, **numbers(mean=0.0, std=1.0))
entry("LogNormalSigma", T.LogNormalSigma, **numbers(mean=0.0, std=1.0))
entry(
    "TimeDistribution.sample",
    T.get("logit_normal").sample,
    (3,),
    **odd_arrays(keys=KEYS),
    **things(process=VP),
    **numbers(latest=1.0),
)
entry(
    "times.grid",
    T.grid,
    (4,),
    **names(name="karras", dtype="float32"),
    **sizes(num_steps=4),
    **things(process=CHAIN),
    **numbers(latest=1.0),
)
entry("check_steps", T.check_steps, **sizes(num_steps=4), process=(CHAIN, None))
entry(
    "Timesteps", T.Timesteps, **names(spacing="leading", levels=None), **sizes(offset=0, count=None)
)
entry("Shifted", T.Shifted, **numbers(last=0.1, shift=1.0))

# Samplers, denoisers, guidance.

request = {"sampler": ("ddim", NAMES), "steps": (2, SIZES)}
grids = [*NAMES, [1.0, 0.5], [0.5, 1.0], [NAN], [], ["a"], [[1.0], [0.5]], [2.0, 1.0], 0.5]
request["grid"] = ("uniform", grids)
entry(
    "sample",
    tfd.sample,
    (2, 2),
    denoiser=(GAUSS, [*THINGS, model]),
    **seeds(seeds=[0, 1]),
    **shapes(shape=(2,)),
    **odd_arrays(x=None),
    **request,
)
entry("encode", S.encode, (3, 2), **things(denoiser=GAUSS), **odd_arrays(x_0=X), **request)
entry("decode", S.decode, (3, 2), **things(denoiser=GAUSS), **odd_arrays(x_t=X), **request)
entry(
    "reconstruct", S.reconstruct, (3, 2), **things(denoiser=GAUSS), **odd_arrays(x_0=X), **request
)
entry("slerp", S.slerp, (3, 2), **odd_arrays(first=X, second=X[::-1], share=0.5))
entry(
    "interpolate",
    S.interpolate,
    (1, 3, 2),
    **things(denoiser=GAUSS),
    **odd_arrays(first=X, second=X[::-1], shares=[0.5]),
    **request,
)
entry(
    "noising_path",
    S.noising_path,
    (2, 3, 2),
    **names(process="vp"),
    **odd_arrays(x_0=X, times=[0.5, 1.0]),
    **seeds(seed=0),
)
entry(
    "prior",
    S.prior,
    (3, 2),
    **things(denoiser=GAUSS),
    **odd_arrays(keys=KEYS),
    **shapes(shape=(2,)),
)
entry(
    "integrate",
    lambda **arguments: S.integrate(settle=True, **arguments),
    (3, 2),
    **things(denoiser=GAUSS, sampler=S.DDIM()),
    **finite(times=np.array([1.0, 0.5], "float32"), keys=KEYS, x=X),
)
entry("samplers.get", S.get, **names(sampler="ddim"))
entry("DDPM", S.DDPM, **names(variance="beta"))
entry("DDIM", S.DDIM, **numbers(eta=0.5, clip=None))
entry(
    "PredictorCorrector",
    S.PredictorCorrector,
    **names(predictor="ddpm"),
    **numbers(snr=0.1),
    **sizes(corrections=1),
)
entry(
    "Heun",
    S.Heun,
    **{name: (1.0, NUMBERS) for name in ("churn", "churn_from", "churn_to", "noise")},
)
for cls in (S.DPMSolver, S.DEIS, S.LMS, S.PLMS, S.UniPC):
    entry(cls.__name__, cls, **sizes(order=2))
entry("PLMS start", S.PLMS, **names(start_up="trapezoid"))
entry("DPMSolverPP", S.DPMSolverPP, **sizes(order=2, settles=15), **numbers(curvature=0.5))
entry("SDEDPMSolverPP", S.SDEDPMSolverPP, **sizes(order=2, settles=15))
entry("RK45", S.RK45, **numbers(rtol=0.1, atol=0.1), **sizes(max_evaluations=50))
entry(
    "Sampling",
    S.Sampling,
    **names(sampler="ddim", grid="uniform", threshold="clip"),
    **sizes(steps=4),
)
entry("Threshold", Threshold, **numbers(limit=1.0, quantile=0.5))
entry("Clipped", Clipped, **things(denoiser=GAUSS), **numbers(limit=1.0))
entry(
    "DynamicallyThresholded",
    DynamicallyThresholded,
    **things(denoiser=GAUSS),
    **numbers(quantile=0.5, most=2.0),
)
entry(
    "NetworkDenoiser",
    lambda network=None, **others: tfd.denoiser.NetworkDenoiser(network, **others),
    **things(network=print),
    **names(process="vp", prediction="v", time_input="timestep"),
    **numbers(sigma_data=1.0),
)
LABELS = st.one_of(ARRAYS, st.sampled_from([-1, 7, 2**40, 1.5, "1", True, [0, 1, 9], [0, 1]]))
entry(
    "Conditioned",
    lambda label, denoiser=None: Conditioned(denoiser or model().denoiser(), label),
    **labels(label=1),
    denoiser=(None, [3, "abc", GAUSS]),
)
entry(
    "ClassifierFreeGuidance",
    lambda label, scale, denoiser=None: tfd.guidance.ClassifierFreeGuidance(
        denoiser or model().denoiser(), label, scale
    )(X, 0.5),
    (3, 2),
    **labels(label=1),
    **numbers(scale=2.0),
    denoiser=(None, [3, "abc", GAUSS]),
)
entry(
    "GaussianMixture",
    tfd.exact.GaussianMixture,
    **odd_arrays(means=[[0.0, 1.0]], variances=[1.0], weights=[1.0]),
    **names(process="vp"),
)
entry(
    "GaussianMixture.draw", lambda **a: GAUSS.draw(**a)[0], (3, 2), **sizes(num=3), **seeds(seed=0)
)
for method, shape in (("__call__", (3, 2)), ("score", (3, 2)), ("log_density", (3,))):
    bound = getattr(GAUSS, method)
    entry(
        f"GaussianMixture.{method}",
        bound,
        shape,
        **odd_arrays(x_t=X),
        t=(0.5, [None, "1", 1j, [], np.ones(2)]),
    )

# Models.

entry(
    "DiffusionModel",
    tfd.DiffusionModel,
    **things(network=network(), sampling=QUICK),
    **names(process="vp", prediction="v", weight="snr", times="uniform", time_input="timestep"),
    **numbers(label_dropout=0.1, ema_decay=0.9, sigma_data=1.0),
    bounded=(None, ["yes", 1, [], NAN]),
    **seeds(seed=0),
)
entry(
    "DiffusionModel.sample",
    lazily(model, "sample"),
    (2, 2),
    **sizes(num=2, batch_size=256),
    **labels(label=1),
    **numbers(guidance=1.0),
    **names(threshold="auto"),
    **seeds(seed=0, seeds=None),
    **request,
)
entry(
    "DiffusionModel.sample, unconditional",
    lazily(lambda: model(None), "sample"),
    (2, 2),
    **sizes(num=2),
    **labels(label=None),
    **numbers(guidance=1.0),
)
entry(
    "DiffusionModel.__call__",
    lambda x_t, t, label: model()(x_t, t=t, label=label),
    (3, 2),
    **finite(x_t=X, label=np.array([0, 1, 2])),
    **times(t=0.5),
)
entry(
    "DiffusionModel.denoiser",
    lambda x_t, t, label: model().denoiser()(x_t, t, label),
    (3, 2),
    **finite(x_t=X),
    t=(0.5, [None, "1", 1j, [], np.ones(2)]),
    **labels(label=np.array([0, 1, 2])),
)
entry(
    "DiffusionModel.guided",
    lazily(model, "guided"),
    **labels(label=1),
    **numbers(guidance=2.0),
    **names(threshold="auto"),
)
entry(
    "DiffusionModel.evaluate",
    lambda x, y: model().evaluate(x, y, verbose=0),
    (5,),
    **odd_arrays(x=X, y=np.array([0, 1, 2])),
)
entry(
    "ScoreModel",
    sm.ScoreModel,
    **things(network=sm.ScoreMLP(SIGMAS, width=8, depth=1)),
    **odd_arrays(sigmas=SIGMAS),
    **names(objective="denoising"),
    **numbers(ema_decay=0.9),
    bounded=(None, ["yes", 1, [], NAN]),
    **seeds(seed=0),
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
    **sizes(num=2, batch_size=256),
    **seeds(seed=0, seeds=None),
    **langevin_request,
)
entry(
    "ScoreModel.inpaint",
    lazily(score_model, "inpaint"),
    (3, 2),
    **odd_arrays(known=X, mask=[1, 0]),
    **seeds(seed=0, seeds=None),
    **sizes(batch_size=256),
    **langevin_request,
)
entry(
    "ScoreModel.interpolate",
    lazily(score_model, "interpolate"),
    (2, 2),
    **seeds(seed_a=0, seed_b=1),
    **sizes(num=2, batch_size=256),
    **langevin_request,
)
entry(
    "ScoreModel.score", lazily(score_model, "score"), (3, 2), **odd_arrays(x=X), **labels(level=1)
)
entry(
    "LearnedVarianceModel",
    lambda **arguments: tfd.variational.LearnedVarianceModel(network(out_features=4), **arguments),
    **names(process=CHAIN, objective="vlb"),
    **numbers(vlb_weight=0.1),
    **sizes(levels=4),
)
entry(
    "VariationalDiffusionModel",
    lambda **arguments: tfd.variational.VariationalDiffusionModel(network(), **arguments),
    **names(prediction="v", times="uniform"),
    **numbers(gamma_min=-9.0, gamma_max=5.0),
    **sizes(levels=4),
)
entry(
    "WithFourierFeatures",
    tfd.variational.WithFourierFeatures,
    **things(network=network()),
    frequencies=((1, 2), [*SHAPES, [1.5], ["1"], [60]]),
)

# Networks.

entry(
    "MLP",
    tfd.networks.MLP,
    **sizes(width=8, depth=1, out_features=None, num_classes=2),
    **names(time_embedding="fourier"),
    **numbers(fourier_scale=1.0),
)
entry(
    "UNet",
    tfd.networks.UNet,
    **sizes(
        out_channels=1,
        blocks_per_level=1,
        num_heads=None,
        head_dim=None,
        groups=4,
        downsample_padding=0,
        patch_size=1,
        time_width=None,
        freq_shift=1,
        num_classes=2,
    ),
    **shapes(widths=(8, 8), attention_levels=(1,)),
    **numbers(norm_epsilon=1e-05, dropout=0.0, output_scale=1.0, fourier_scale=1.0),
    **names(downsample="conv", upsample="conv", time_embedding="sinusoidal"),
)
LEVEL = {"width": 4, "blocks": 1, "groups": 2}
entry(
    "UNet2D",
    tfd.networks.UNet2D,
    **sizes(
        out_channels=1,
        out_groups=2,
        downsample_padding=0,
        time_width=8,
        num_times=None,
        num_classes=None,
    ),
    **things(encoder=[LEVEL], middle=None, decoder=[{**LEVEL, "blocks": 2}]),
    **numbers(norm_epsilon=1e-05, dropout=0.0, time_scale=1.0, time_shift=0.0, freq_shift=0),
    **names(activation="silu", time_embedding="sinusoidal", label=None),
)
entry(
    "Level",
    tfd.networks.Level,
    **sizes(width=4, blocks=1, groups=2, attention_groups=2, head_dim=2),
    **names(attention="each", resample="conv", pyramid="skip"),
    **numbers(output_scale=1.0),
)
N = tfd.networks
entry("ResidualDense", N.ResidualDense, **sizes(width=4))
entry(
    "GroupNormalization",
    N.GroupNormalization,
    **sizes(groups=2),
    **numbers(epsilon=1e-05),
    **names(activation="silu"),
)
entry(
    "TimeEmbedding",
    N.TimeEmbedding,
    **sizes(width=8, features=8, freq_shift=0),
    **names(kind="fourier"),
    **numbers(fourier_scale=1.0),
)
entry(
    "SelfAttention",
    N.SelfAttention,
    **sizes(num_heads=2, groups=2, width=4),
    **numbers(norm_epsilon=1e-05, output_scale=1.0),
)
entry("Downsample", N.Downsample, **names(kind="conv"), **sizes(padding=0, width=4))
entry("Upsample", N.Upsample, **names(kind="conv"))
entry(
    "ResidualBlock",
    N.ResidualBlock,
    **sizes(width=4, groups=2, groups_out=2),
    **numbers(norm_epsilon=1e-05, dropout=0.1, output_scale=1.0),
    **names(resample="down", activation="relu"),
)
entry("NCSN", sm.NCSN, **sizes(num_levels=3, width=4, patch_size=1))
entry("NCSNv2", sm.NCSNv2, **odd_arrays(sigmas=SIGMAS), **sizes(width=4, patch_size=1))
entry("ScoreMLP", sm.ScoreMLP, **odd_arrays(sigmas=SIGMAS), **sizes(width=4, depth=1))
entry("InstanceNormPlus", sm.InstanceNormPlus, **sizes(num_levels=3))


@functools.cache
def built(kind: str):
    if kind == "MLP":
        made, shape = network(num_classes=3), (None, 2)
    else:
        made = N.UNet(
            out_channels=1,
            widths=(4, 4),
            blocks_per_level=1,
            groups=2,
            num_classes=3,
            mid_attention=False,
        )
        shape = (None, 4, 4, 1)
    made.build({"x": shape, "time": (None,), "label": (None,)})
    return made


for kind, x in (("MLP", X), ("UNet", IMAGES[:3])):
    entry(
        f"{kind}.__call__",
        lambda kind=kind, **inputs: built(kind)(inputs),
        x.shape,
        **finite(x=x, time=np.ones(3, "float32"), label=np.array([0, 1, 3])),
    )
entry(
    "models.unet",
    models.unet,
    **shapes(shape=(4, 4, 1)),
    **sizes(num_classes=2),
    **names(size="small", dtype="float32"),
)
entry(
    "models.refinenet",
    models.refinenet,
    **shapes(shape=(4, 4, 1)),
    **odd_arrays(sigmas=SIGMAS),
    **names(method="ncsn", size="small", dtype="float32"),
)
entry("models.path", models.path, model=("mnist", [*NAMES, *PATHS]))
entry("models.load", models.load, model=("mnist", [*NAMES, *PATHS]))

# Data.

sources = st.one_of(
    ARRAYS,
    st.tuples(ARRAYS, ARRAYS),
    st.sampled_from(["nonesuch/", "/nonesuch", ".", 3, None, {}, object()]),
)
entry(
    "data.read",
    tfd.data.read,
    source=((IMAGES, np.array([0, 1, 0, 1])), sources),
    **names(split="train"),
    **sizes(image_size=4, channels=1),
    **paths(data_dir=None),
)
entry(
    "Examples.batches",
    lambda **arguments: next(iter(examples().batches(**arguments))),
    **sizes(batch_size=2, from_step=0),
    **seeds(seed=0),
)
entry("Examples.split", lazily(examples, "split"), **sizes(num=2), **seeds(seed=0))
entry("Examples.arrays", lazily(examples, "arrays"), **sizes(num=2))
entry(
    "data.load",
    tfd.data.load,
    source=((IMAGES, np.array([0, 1, 0, 1])), sources),
    **sizes(batch_size=2, image_size=4),
    **seeds(seed=0),
)
entry("data.toy", tfd.data.toy, (5, 2), **names(name="moons"), **sizes(num=5), **seeds(seed=0))
entry("has_splits", tfd.data.has_splits, source=("digits", [*NAMES, *THINGS]))
entry("to_float", tfd.data.to_float, (2, 2), **odd_arrays(images=np.zeros((2, 2), "uint8")))
entry("to_uint8", tfd.data.to_uint8, (3, 2), **odd_arrays(images=X))

# Likelihood.

L = tfd.likelihood
PIXELS = L.Pixels(3)
CODED = np.array([[-1.0, 0.0], [1.0, 0.0]], "float32")
pixel_values = ["8 bits", 256, [], object()]
entry("Pixels", L.Pixels, **sizes(levels=4), **numbers(low=0.0, high=1.0))
entry("Pixels.check", PIXELS.check, (2, 2), **odd_arrays(x=CODED))
bits = {
    "x_0": (CODED, ARRAYS),
    "pixels": (PIXELS, pixel_values),
    "seed": (0, SEEDS),
    "batch_size": (4, SIZES),
}
entry(
    "bound",
    L.bound,
    **things(model=GAUSS),
    **labels(label=None),
    **names(variance="beta"),
    **sizes(steps=2, evaluations=1),
    **bits,
)
entry(
    "continuous_bound",
    L.continuous_bound,
    **things(model=GAUSS),
    **labels(label=None),
    **sizes(evaluations=1),
    **bits,
)
entry(
    "estimate",
    L.estimate,
    **things(model=GAUSS),
    **labels(label=None),
    **sizes(evaluations=1),
    **bits,
)
entry(
    "bound, labels",
    lambda **arguments: L.bound(model(), steps=1, pixels=PIXELS, **arguments),
    **odd_arrays(x_0=CODED),
    **labels(label=np.array([0, 1])),
)
entry(
    "log_likelihood",
    L.log_likelihood,
    **things(model=GAUSS),
    **labels(label=None),
    **names(divergence="gaussian", dequantization="uniform"),
    **sizes(draws=1, max_steps=50),
    **numbers(tolerance=0.1, prior_tolerance=1.0),
    **bits,
)
FILED = np.zeros((2, 2, 2, 1), "float32")
filed = {"images": (FILED, ARRAYS), "pixels": (PIXELS, pixel_values)}
entry(
    "baselines.gaussian_mixture",
    L.baselines.gaussian_mixture,
    (2,),
    train=(np.tile(FILED, (9, 1, 1, 1)), ARRAYS),
    **sizes(components=2, iterations=2),
    **seeds(seed=0),
    **filed,
)
entry("baselines.png", L.baselines.png, (2,), **filed)
entry("baselines.png_of_all", L.baselines.png_of_all, **filed)
entry("baselines.xz", L.baselines.xz, **filed)
entry(
    "progressive_decoding",
    L.progressive_decoding,
    **things(model=GAUSS),
    **odd_arrays(x_0=X, times=[1.0, 0.5]),
    **labels(label=None),
    **seeds(seed=0),
)
entry(
    "rate_distortion",
    lambda bound: L.rate_distortion(
        L.bound(GAUSS, X, pixels=None, steps=2) if bound is None else bound
    ),
    bound=(None, THINGS[1:]),
)

# Evaluation.

E = tfd.evaluation
F = np.random.default_rng(0).normal(size=(4, 2))
entry("frechet_distance", E.frechet_distance, **odd_arrays(features_a=F, features_b=F))
entry(
    "frechet_distance_from_moments",
    E.frechet_distance_from_moments,
    **odd_arrays(mean_a=F[0], covariance_a=np.eye(2), mean_b=F[1], covariance_b=np.eye(2)),
)
entry(
    "nearest_neighbours", E.nearest_neighbours, **odd_arrays(samples=X, references=X), **sizes(k=1)
)
entry("build_judge", E.build_judge, **shapes(shape=(4, 4, 1)), **sizes(num_classes=2))
entry(
    "features",
    lambda judge_=None, **a: E.features(judge() if judge_ is None else judge_, **a),
    (4, 128),
    judge_=(None, THINGS[1:]),
    **odd_arrays(images=IMAGES),
    **sizes(batch_size=4),
)
entry(
    "judge_samples",
    lambda judge_=None, **a: E.judge_samples(judge() if judge_ is None else judge_, **a),
    judge_=(None, THINGS[1:]),
    **odd_arrays(samples=IMAGES, labels=np.array([0, 1, 0, 1]), references=IMAGES),
)
entry(
    "train_judge",
    E.train_judge,
    **odd_arrays(images=np.zeros((0, 4, 4, 1)), labels=np.array([0, 1, 0, 1])),
    **sizes(epochs=1, batch_size=4),
    **seeds(seed=0),
)

# Score matching.

ladder = {"sigma_max": (1.0, NUMBERS), "sigma_min": (0.1, NUMBERS)}
entry("geometric", sm.geometric, (3,), **sizes(num_levels=3), **ladder)
entry("for_dimension", sm.for_dimension, **numbers(dimension=100, overlap=0.5), **ladder)
entry(
    "from_data",
    sm.from_data,
    **odd_arrays(x=np.linspace(0, 1, 24).reshape(3, 8)),
    **numbers(sigma_min=0.1, overlap=0.5),
    **sizes(num_examples=2),
    **seeds(seed=0),
)
entry(
    "variance_ratio",
    sm.variance_ratio,
    **numbers(step_size=0.1, sigma=1.0, ratio=1.1),
    **sizes(steps=3),
)
entry("best_step_size", sm.best_step_size, **odd_arrays(sigmas=SIGMAS), **sizes(steps=3))


def downhill(x):
    return -x


def half_square(x):
    return 0.5 * keras.ops.sum(x**2, axis=-1)


losses_ = sm.objectives
losses = {"score": (downhill, None), "x": (X, ARRAYS)}
keyed = {**losses, "keys": (KEYS, ARRAYS)}
projected = {"projection": ("gaussian", NAMES), "num_projections": (1, SIZES)}
entry("explicit", losses_.explicit, (3,), **odd_arrays(true_score=X), **losses)
entry("implicit", losses_.implicit, (3,), **losses)
entry("sliced", losses_.sliced, (3,), **keyed, **projected)
entry(
    "finite_difference_sliced",
    losses_.finite_difference_sliced,
    (3,),
    **numbers(step=0.1),
    **keyed,
    **projected,
)
for objective in (losses_.denoising, losses_.multi_level_denoising):
    entry(objective.__name__, objective, (3,), **odd_arrays(sigma=0.5), **keyed)
chain = {
    "x": (X, ARRAYS),
    "keys": (KEYS, ARRAYS),
    "step_size": (0.01, NUMBERS),
    "steps": (2, SIZES),
    "convention": ("ncsn", NAMES),
}
entry(
    "langevin",
    sm.langevin.langevin,
    (3, 2),
    score=(downhill, None),
    **numbers(temperature=1.0, smallest_sigma=1.0),
    **chain,
)
entry("metropolis_langevin", sm.langevin.metropolis_langevin, energy=(half_square, None), **chain)
entry(
    "annealed",
    lambda **a: sm.langevin.annealed(
        lambda x, level: -x, noise=sm.langevin.noise_of(KEYS, (2,)), **a
    ),
    (3, 2),
    **odd_arrays(sigmas=SIGMAS),
    **numbers(step_size=0.01),
    **sizes(steps_per_level=1),
    **names(convention="ncsn"),
)
entry("exact_score", sm.laboratory.exact_score, **odd_arrays(data=X, sigmas=SIGMAS))
entry(
    "field_error",
    lambda **a: sm.laboratory.field_error(score_model(), sm.laboratory.exact_score(X, SIGMAS), **a),
    **sizes(level=1),
    **odd_arrays(x=X),
)
entry(
    "unequal_modes",
    sm.laboratory.unequal_modes,
    num=(0, SIZES[:-3]),
    **odd_arrays(weights=(1, 4)),
    seed=(0, SEEDS[:-2]),
)

# Pictures, callbacks, exports, conversions.

G = tfd.plotting
PICTURES = np.zeros((3, 2, 2, 1), "float32")
layout = {"columns": (2, SIZES), "padding": (1, SIZES), "scale": (1, SIZES)}
entry("image_grid", G.image_grid, **odd_arrays(images=PICTURES), **sizes(background=0), **layout)
entry(
    "show_grid",
    G.show_grid,
    **odd_arrays(images=PICTURES),
    **sizes(columns=2),
    **things(row_labels=None),
)
entry("save_grid", G.save_grid, **odd_arrays(images=PICTURES), **paths(path="x.png"), **layout)
entry(
    "save_path_gif",
    G.save_path_gif,
    **odd_arrays(path_states=np.zeros((2, *PICTURES.shape))),
    **paths(path="x.gif"),
    **numbers(seconds=1.0, hold=1.0),
    **sizes(frames=2),
)
entry(
    "loss_curve",
    G.loss_curve,
    history=(
        {"loss": [1.0, 0.5]},
        [
            *THINGS,
            {"loss": "abc"},
            {"loss": [NAN]},
            {"loss": 3},
            {"loss": [[1], [1, 2]]},
            {3: [1.0]},
        ],
    ),
    **paths(path=None),
)
entry("schedule_curves", G.schedule_curves, **things(processes=VP), **paths(path=None))
edges = np.linspace(0, 1, 4)
entry(
    "bits_by_time",
    G.bits_by_time,
    curves=(
        {"a": (edges, np.ones(3))},
        [*THINGS, {"a": 3}, {"a": (edges, edges)}, {"a": ("x", "y")}, {"a": (edges, [NAN] * 3)}],
    ),
    **paths(path=None),
)
entry(
    "plotting.rate_distortion",
    G.rate_distortion,
    curves=(
        {"a": (edges, edges)},
        [*THINGS, {"a": 3}, {"a": (edges, edges[1:])}, {"a": ("x", "y")}],
    ),
    **paths(path=None),
)
limits = [3, (1,), (1, 0), ("a", "b"), (NAN, 1), (0, INF), (0, None), [], np.zeros((2, 2))]
plane = {"limits": (None, limits), "path": (None, PATHS)}
entry(
    "scatter_2d",
    G.scatter_2d,
    samples=(X, st.one_of(ARRAYS, st.sampled_from([*THINGS, {"a": X}, {"a": 3}]))),
    **things(titles=None),
    **plane,
)
functions_of_points = [
    None,
    3,
    "abc",
    lambda x: x[:1],
    lambda x: x * NAN,
    lambda x: "abc",
    lambda x: x.astype(str),
]
entry(
    "field_2d",
    G.field_2d,
    fn=(downhill, functions_of_points),
    **odd_arrays(samples=X),
    **sizes(resolution=3),
    density=(None, functions_of_points[1:]),
    **plane,
)
entry(
    "compare_fields_2d",
    G.compare_fields_2d,
    learned=(downhill, functions_of_points),
    exact=(downhill, functions_of_points),
    **sizes(resolution=3),
    **things(titles=("a", "b", "c")),
    **plane,
)
entry(
    "save_points_gif",
    G.save_points_gif,
    **odd_arrays(states=np.stack([X, X])),
    **paths(path="x.gif"),
    **things(titles=None),
    **sizes(trail=0, frames=2),
    **numbers(seconds=1.0),
)
entry(
    "costs",
    G.costs,
    **odd_arrays(sizes=[1, 2]),
    seconds=({"a": [1.0, 2.0]}, [*THINGS, {"a": 3}, {"a": "xy"}, {"a": [1.0]}]),
    **paths(path=None),
)
entry(
    "Checkpoint",
    callbacks.Checkpoint,
    **paths(path="x.keras"),
    **numbers(seconds=1.0),
    notes=(None, THINGS[1:-1]),
)
entry(
    "SampleGrid",
    callbacks.SampleGrid,
    **paths(path="x.png"),
    **numbers(seconds=1.0),
    **sizes(num=4, steps=None, columns=None),
    **seeds(seed=0),
)
entry(
    "BitsPerDimension",
    callbacks.BitsPerDimension,
    **odd_arrays(images=CODED),
    **sizes(every=1, evaluations=1, batch_size=4),
    pixels=(PIXELS, pixel_values[1:]),
)
entry("StopAtStep", callbacks.StopAtStep, **sizes(steps=4, done=0))
entry("Progress", callbacks.Progress, **sizes(steps=4, done=0), **numbers(seconds=1.0))
if keras.backend.backend() == "tensorflow":  # on others, it says that it cannot
    entry(
        "saved_model",
        lambda model_=None, **a: tfd.export.saved_model(model() if model_ is None else model_, **a),
        model_=(None, THINGS[1:]),
        **paths(directory="."),
        **request,
        **names(threshold="auto"),
    )
    entry(
        "saved_model, score",
        lambda **a: tfd.export.saved_model(score_model(), **a),
        **paths(directory="."),
        **sizes(steps_per_level=1),
    )
entry(
    "from_diffusers",
    tfd.convert.from_diffusers,
    **paths(path="."),
    **sizes(image_size=None),
    **numbers(ema_decay=0.9),
)
entry("read_network", tfd.convert.read_network, **paths(folder="."))
entry(
    "to_diffusers",
    lambda model_=None, **a: tfd.convert.to_diffusers(model() if model_ is None else model_, **a),
    model_=(None, THINGS[1:]),
    **paths(folder="."),
)
entry(
    "from_score_sde",
    tfd.convert.from_score_sde,
    **paths(path="nonesuch.pth"),
    config=("vp/cifar10_ddpmpp", [*NAMES, {"image_size": "a"}, {"nonesuch": 1}, {3: 4}]),
)


# What has to hold.


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(tmp_path_factory):
    """Files are written into a folder of their own, which holds something already."""
    here, folder = os.getcwd(), tmp_path_factory.mktemp("any_input")
    (folder / "something").touch()
    os.chdir(folder)
    yield
    os.chdir(here)


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
        value = [*value, *value.values()]
    if isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)


def says_what_came(message: str, arguments: Mapping) -> bool:
    """Whether a message names a value that came, or its shape or dtype."""
    if re.search(r"[Rr]eceived|\bgot\b|[Ff]ound|has shape|has dtype|is an? \w+", message):
        return True
    for value in leaves(arguments):
        told = [repr(value), str(value)]
        if isinstance(value, np.ndarray):
            told += [str(value.shape), str(value.dtype)]
        if any(text and text in message for text in told):
            return True
    return False


def assert_sound(result) -> None:
    """Numbers that came back are finite."""
    if dataclasses.is_dataclass(result) or isinstance(result, Mapping):
        fields = result if isinstance(result, Mapping) else vars(result)
        # Settings may be infinite, and where no network was asked there is no error of it.
        fields = {key: v for key, v in fields.items() if key != "squared_error"}
        result = [v for v in fields.values() if isinstance(v, np.ndarray)]
    if isinstance(result, list | tuple):
        for part in result:
            assert_sound(part)
    elif keras.ops.is_tensor(result) or isinstance(result, np.ndarray | np.generic | float):
        values = numpy(result) if keras.ops.is_tensor(result) else np.asarray(result)
        assert values.dtype.kind not in "fc" or np.isfinite(values).all(), "not finite"


def call(entry: Entry, arguments: Mapping):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return entry.call(**arguments)


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_a_sound_result_or_one_clear_sentence(entry, data):
    chosen = st.lists(st.sampled_from(sorted(entry.odd)), min_size=1, max_size=2, unique=True)
    arguments = dict(entry.right)
    for name in data.draw(chosen):
        odd = entry.odd[name]
        arguments[name] = data.draw(
            odd if isinstance(odd, st.SearchStrategy) else st.sampled_from(odd)
        )
    try:
        result = call(entry, arguments)
    except (ValueError, TypeError, OSError, tfd.likelihood.ToleranceError) as error:
        assert raised_by_us(error)
        assert says_what_came(str(error), arguments)
    else:
        assert_sound(result)


SHAPED = [entry for entry in ENTRIES if entry.shape is not None]


@pytest.mark.parametrize("entry", SHAPED, ids=[entry.name for entry in SHAPED])
def test_the_right_arguments_are_right(entry):
    result = call(entry, entry.right)
    assert_sound(result)
    assert numpy(result).shape == entry.shape


def test_what_passes_is_judged():
    """The judges know a foreign error, a mute one and a NaN when they see one."""
    with pytest.raises(ValueError) as foreign:
        np.zeros(3).reshape(2)
    with pytest.raises(TypeError) as accident:  # within the library, but by no `raise`
        tfd.denoiser._listed(3)
    with pytest.raises(ValueError) as ours:
        tfd.processes.get("liner")
    assert not raised_by_us(foreign.value) and not raised_by_us(accident.value)
    assert raised_by_us(ours.value)
    assert says_what_came(str(ours.value), {"process": "liner"})
    assert not says_what_came("This cannot be.", {"process": "liner"})
    with pytest.raises(AssertionError, match="not finite"):
        assert_sound([1.0, {"a": np.array([np.nan])}])
