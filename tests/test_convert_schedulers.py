"""diffusers' schedulers beside ours: the same tables, timesteps and samples, from the same noise.

Both sides ask one smooth function instead of a network, and are fed the same noise, so that samples
are numbers to compare and nothing is random.
"""

from __future__ import annotations

import inspect
import sys

import keras
import numpy as np
import pytest
from keras import ops
from oracles import DOUBLE, numpy

import tfdiffusion as tfd
from tfdiffusion import processes, random, samplers, times
from tfdiffusion.convert import schedulers
from tfdiffusion.denoiser import NetworkDenoiser, Threshold
from tfdiffusion.samplers import Sampling
from tfdiffusion.samplers.loop import ending, integrate, resolve_grid

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers deprecates itself

SHAPE = (2, 4, 4, 3)
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# The configurations whose samples are compared: name, settings, number of steps.
CASES = [
    ("DDPM", {}, 10),
    ("DDPM", {"variance_type": "fixed_large"}, 10),
    ("DDPM", {"timestep_spacing": "linspace", "clip_sample_range": 1.5}, 10),
    ("DDPM", {"thresholding": True, "sample_max_value": 1.5, "steps_offset": 1}, 10),
    ("DDPM", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}, 7),
    ("DDIM", {"clip_sample_range": 0.6}, 10),
    ("DDIM", {**LATENT, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}, 10),
    ("DDIM", {"set_alpha_to_one": False}, 10),
    ("DDIM", {"prediction_type": "sample", "clip_sample": False}, 7),
    (
        "DDIM",
        {
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
        },
        10,
    ),
    ("PNDM", {}, 10),
    ("PNDM", {**LATENT, "skip_prk_steps": True, "steps_offset": 1}, 10),
    ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": True}, 7),
    ("DPMSolverMultistep", {}, 10),
    ("DPMSolverMultistep", {"solver_order": 1, "timestep_spacing": "leading"}, 10),
    ("DPMSolverMultistep", {"solver_order": 3, "lower_order_final": False}, 10),
    ("DPMSolverMultistep", {"solver_type": "heun", "timestep_spacing": "trailing"}, 10),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min", "solver_order": 3}, 10),
    ("DPMSolverMultistep", {"final_sigmas_type": "sigma_min"}, 16),
    ("DPMSolverMultistep", {**LATENT, "use_karras_sigmas": True}, 10),
    ("DPMSolverMultistep", {"use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}, 10),
    ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, 10),
    (
        "DPMSolverMultistep",
        {
            "algorithm_type": "sde-dpmsolver++",
            "solver_type": "heun",
            "use_karras_sigmas": True,
        },
        10,
    ),
    (
        "DPMSolverMultistep",
        {
            "beta_schedule": "squaredcos_cap_v2",
            "lambda_min_clipped": -5.1,
            "prediction_type": "v_prediction",
            "thresholding": True,
        },
        10,
    ),
    (
        "DPMSolverMultistep",
        {
            **LATENT,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "prediction_type": "v_prediction",
        },
        10,
    ),
    ("UniPCMultistep", {}, 10),
    ("UniPCMultistep", {"solver_order": 3, "final_sigmas_type": "sigma_min"}, 10),
    ("UniPCMultistep", {"solver_order": 1, "timestep_spacing": "trailing"}, 7),
    ("UniPCMultistep", {**LATENT, "use_karras_sigmas": True}, 10),
    ("EulerDiscrete", {}, 7),
    ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, 10),
    ("EulerDiscrete", {**LATENT, "use_karras_sigmas": True}, 10),
    ("EulerDiscrete", {"use_exponential_sigmas": True, "prediction_type": "v_prediction"}, 10),
    ("EulerDiscrete", {**LATENT, "final_sigmas_type": "sigma_min"}, 10),
    ("HeunDiscrete", {"clip_sample": True, "clip_sample_range": 0.7}, 7),
    ("HeunDiscrete", {"use_karras_sigmas": True, "timestep_spacing": "leading"}, 10),
    ("HeunDiscrete", {"timestep_spacing": "trailing", "prediction_type": "sample"}, 10),
    ("FlowMatchEulerDiscrete", {}, 10),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, 10),
]


def ids(case):
    name, settings, steps = case
    return "-".join([name, *(f"{k}={v}" for k, v in settings.items()), str(steps)])


def configuration(name, settings):
    return {"_class_name": f"{name}Scheduler", **settings}


def theirs(config):
    return getattr(diffusers, config["_class_name"]).from_config(config)


# The network.


def smooth(x, time, prediction, xp):
    """What a network could say: a Gaussian's answer, a little bent, in NumPy's manner.

    It believes in α = exp(−0.05 τ − 4.975 τ²) at τ = timestep/1000, about the linear chain's.
    """
    tau = time / 1000.0
    alpha = xp.exp(-0.05 * tau - 4.975 * tau * tau - 5e-5)
    sigma = xp.sqrt(1.0 - alpha * alpha)
    spread = 0.25 * alpha * alpha + sigma * sigma
    clean = 0.25 * alpha * x / spread + 0.3 * sigma * alpha * xp.sin(2.0 * x + 3.0 * tau)
    noise = (x - alpha * clean) / sigma
    flow = 0.5 * x + 0.3 * xp.sin(2.0 * x + 3.0 * tau) - 0.1
    said = {"noise": noise, "clean": clean, "v": alpha * noise - sigma * clean, "flow": flow}
    return said[prediction]


@keras.saving.register_keras_serializable(package="tests")
class Smooth(keras.layers.Layer):
    """The same as a network."""

    num_classes = None

    def __init__(self, prediction="noise", **kwargs):
        super().__init__(**kwargs)
        self.prediction = prediction

    def build(self, shapes):
        self.built = True

    def call(self, inputs, training=False):
        time = ops.reshape(inputs["time"], (-1, 1, 1, 1))
        return smooth(inputs["x"], time, self.prediction, ops)

    def get_config(self):
        return {**super().get_config(), "prediction": self.prediction}


def our_denoiser(schedule, network=None):
    denoiser = NetworkDenoiser(
        network or Smooth(schedule.prediction),
        schedule.process,
        schedule.prediction,
        time_input=schedule.time_input,
        scale_input=schedule.scale_input,
    )
    threshold = schedule.sampling.threshold
    return denoiser if threshold is None else threshold(denoiser)


def our_sample(schedule, x, steps, network=None):
    """Without compiling: one run each."""
    denoiser, sampling = our_denoiser(schedule, network), schedule.sampling
    sampler = samplers.get(sampling.sampler)
    visited = resolve_grid(denoiser, sampling.grid, steps, sampler)
    keys, x = random.keys(range(len(x))), ops.convert_to_tensor(x)
    return numpy(integrate(denoiser, sampler, visited, keys, x, **ending(sampling.grid)))


def our_noise(rows, shape, *streams):
    """The noise that a sampler draws with the key of a step."""
    keys = random.keys(range(rows))
    for stream in streams:
        keys = random.fold_in(keys, stream)
    return torch.tensor(numpy(random.normal(keys, shape)))


def in_variance_exploding_space(scheduler):
    return type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")


def their_sample(scheduler, prediction, x, steps, monkeypatch):
    """As a pipeline does it, from the state x of a variance-preserving process."""
    scheduler.set_timesteps(steps)
    drawn = (our_noise(len(x), x.shape[1:], k + 1) for k in range(steps + 1))
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn), raising=False)
    x = torch.tensor(x)
    if in_variance_exploding_space(scheduler):
        x = x * (1.0 + scheduler.sigmas[0] ** 2) ** 0.5
    for timestep in scheduler.timesteps:
        scaled = x
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(x, timestep)
        said = smooth(scaled, timestep.to(torch.float32), prediction, torch)
        x = scheduler.step(said, timestep, x).prev_sample
    if in_variance_exploding_space(scheduler):
        x = x / (1.0 + scheduler.sigmas[-1] ** 2) ** 0.5
    return x.numpy()


# Those whose samples are compared by default; the rest with -m slow.
QUICK = (0, 5, 6, 10, 11, 13, 17, 19, 21, 26, 28, 29, 31, 34, 38)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if k in QUICK else pytest.mark.slow, id=ids(case))
        for k, case in enumerate(CASES)
    ],
)
def test_samples_agree(case, monkeypatch):
    name, settings, steps = case
    config = configuration(name, settings)
    schedule = schedulers.read(config)
    x = np.random.default_rng(0).normal(size=SHAPE).astype("float32")
    expected = their_sample(theirs(config), schedule.prediction, x, steps, monkeypatch)
    assert np.abs(expected).max() > 0.3  # of the size of data
    np.testing.assert_allclose(our_sample(schedule, x, steps), expected, atol=1e-4)


class Score(Smooth):
    """Of data N(0.5, 0.04), a little bent, told σ; called, of 2x − 1, told 2σ."""

    @staticmethod
    def of(x, sigma, xp):
        return -(x - 0.5) / (0.04 + sigma * sigma) + 0.1 * xp.sin(x) / (1.0 + sigma * sigma)

    def call(self, inputs, training=False):
        x, sigma = inputs["x"] / 2 + 0.5, inputs["time"] / 2
        return self.of(x, ops.reshape(sigma, (-1, 1, 1, 1)), ops) / 2


@pytest.mark.parametrize("corrections", [0, 1, 2])
def test_samples_of_a_variance_exploding_pipeline_agree(corrections, monkeypatch):
    """One image, for theirs takes the norms of a batch; ours those of each."""
    settings = {"sigma_max": 50.0, "correct_steps": corrections, "snr": 0.16}
    config, steps, shape = configuration("ScoreSdeVe", settings), 10, (1, 4, 4, 3)
    schedule, scheduler = schedulers.read(config), theirs(config)
    x = 50.0 * np.random.default_rng(0).normal(size=shape).astype("float32")
    # Langevin steps draw from streams 1, 2, … of a step's key, the predictor from 0.
    streams = [*range(1, corrections + 1), *((0,) if corrections else ((),))]
    drawn = iter(
        [
            our_noise(1, shape[1:], k + 1, *np.atleast_1d(s).astype(int))
            for k in range(steps)
            for s in streams
        ]
    )
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(drawn))
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    state = torch.tensor(x)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas):
        for _ in range(corrections):
            state = scheduler.step_correct(Score.of(state, sigma, torch), state).prev_sample
        moved = scheduler.step_pred(Score.of(state, sigma, torch), timestep, state)
        state = moved.prev_sample
    ours = our_sample(schedule, 2 * x - 1, steps, Score())
    np.testing.assert_allclose(ours / 2 + 0.5, moved.prev_sample_mean.numpy(), atol=1e-4)
    assert schedule.sampling.steps == 2000


# Tables.


@pytest.mark.parametrize(
    "name, settings",
    [
        ("DDPM", {}),
        ("DDPM", {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}),
        ("DDPM", {"beta_schedule": "sigmoid"}),
        ("DDIM", LATENT),
        ("DDIM", {"beta_schedule": "squaredcos_cap_v2"}),
        ("DDPM", {"trained_betas": np.geomspace(1e-4, 0.1, 200).tolist()}),
        ("DDIM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("EulerDiscrete", {**LATENT, "rescale_betas_zero_snr": True}),
        ("UniPCMultistep", {"beta_schedule": "squaredcos_cap_v2"}),
        ("HeunDiscrete", {}),
    ],
)
def test_alphas_are_those_of_the_scheduler(name, settings):
    config = configuration(name, settings)
    process = schedulers.read(config).process
    expected = theirs(config).alphas_cumprod.numpy()
    t = np.arange(1, process.resolution + 1) / process.resolution
    alphas, sigmas = numpy(process.alpha(t)), numpy(process.sigma(t))
    # Theirs are products of a thousand float32 factors.
    np.testing.assert_allclose(alphas**2, expected, rtol=2e-4, atol=1e-7)
    np.testing.assert_allclose(sigmas**2, 1.0 - expected, rtol=2e-3, atol=1e-6)


GRIDS = [
    ("DDPM", {"timestep_spacing": "linspace"}),
    ("DDIM", {"steps_offset": 1}),
    ("DDIM", {"timestep_spacing": "trailing"}),
    ("PNDM", {"skip_prk_steps": True}),
    ("DPMSolverMultistep", {}),
    ("DPMSolverMultistep", {"timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistep", {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True}),
    ("UniPCMultistep", {"timestep_spacing": "trailing"}),
    ("EulerDiscrete", {}),
    ("EulerDiscrete", {"timestep_spacing": "leading", "use_karras_sigmas": True}),
    ("EulerDiscrete", {"use_exponential_sigmas": True}),
    ("HeunDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"shift": 2.0}),
]


@pytest.mark.parametrize("name, settings", GRIDS)
def test_timesteps_and_levels_are_those_of_the_scheduler(name, settings):
    config = configuration(name, settings)
    schedule, scheduler = schedulers.read(config), theirs(config)
    process, told = schedule.process, NetworkDenoiser(Smooth(), schedule.process, "flow")
    told = {"timestep": told._time_input, "thousandths": lambda process, t: 1000.0 * t}
    # One step of a linspace grid is the least noisy there, and is the noisiest here.
    counts = [*range(2, 60), 75, 96, 100, 112, 200, 250, 500] if DOUBLE else [5, 10, 25, 50]
    for steps in counts:
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.numpy().astype("float64")
        if name == "HeunDiscrete":
            expected = expected[[0, *range(1, 2 * steps - 1, 2)]]  # each but the first twice
        if name == "PNDM":
            expected = np.delete(expected, 1) if steps > 1 else expected  # the second twice
        t = times.grid(schedule.sampling.grid, steps, process, 1.0, resolve_dtype())[:steps]
        between = isinstance(process, processes.Interpolated)
        kind = schedule.time_input.removeprefix("nearest_")
        visited = numpy(told[kind](process, t))
        if schedule.time_input == "nearest_timestep":
            assert np.abs(visited - expected).max() < 0.51
        else:
            np.testing.assert_allclose(visited, expected, atol=0.01 if between else 1e-3)
        if hasattr(scheduler, "sigmas") and name != "HeunDiscrete":
            level = numpy(process.sigma(t)) / numpy(process.alpha(t))
            if name == "FlowMatchEulerDiscrete":
                level = numpy(t)
            np.testing.assert_allclose(level, scheduler.sigmas[:steps].numpy(), rtol=1e-3)


def resolve_dtype():
    return "float64" if DOUBLE else "float32"


@pytest.mark.parametrize("name", schedulers._DEFAULTS)
def test_what_is_left_out_has_the_default_of_the_scheduler(name):
    """A changed default in a new diffusers would be seen here."""
    signature = inspect.signature(getattr(diffusers, name).__init__)
    expected = {
        key: parameter.default
        for key, parameter in signature.parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    ours = {key: value for key, value in schedulers._DEFAULTS[name].items() if key in expected}
    assert ours == expected
    # What it doesn't know, conversions between schedulers may leave behind.
    extra = set(schedulers._DEFAULTS[name]) - set(expected)
    assert extra <= {"sigma_min", "sigma_max", "steps_offset", "trained_betas"}


# What a configuration becomes.


def test_a_published_configuration():
    """google/ddpm-cifar10-32's, of diffusers 0.1.1, with what such files hold."""
    schedule = schedulers.read(
        {
            "_class_name": "DDPMScheduler",
            "_diffusers_version": "0.1.1",
            "beta_end": 0.02,
            "beta_schedule": "linear",
            "beta_start": 0.0001,
            "clip_sample": True,
            "num_train_timesteps": 1000,
            "trained_betas": None,
            "timestep_values": None,
            "tensor_format": "pt",
            "variance_type": "fixed_large",
        }
    )
    assert isinstance(schedule.process, processes.LinearBeta)
    grid, clip = times.Timesteps("leading"), Threshold(1.0)
    assert schedule.sampling == Sampling(samplers.DDPM("beta"), grid, 1000, clip)
    assert (schedule.prediction, schedule.time_input) == ("noise", "timestep")
    assert not schedule.scale_input


def test_levels_between_those_of_a_chain_are_trained_on_the_chain():
    schedule = schedulers.read(configuration("EulerDiscrete", {"num_train_timesteps": 500}))
    arguments = schedule.model_arguments()
    assert arguments["times"] == times.DiscreteUniform(500)
    t = numpy(arguments["times"].sample(random.keys(range(50)), schedule.process))
    np.testing.assert_allclose(t * 500, np.rint(t * 500), atol=1e-3)


def test_a_continuous_timestep_is_a_quarter_of_the_log_level():
    settings = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    config = configuration("EulerDiscrete", {**LATENT, **settings, "use_karras_sigmas": True})
    schedule, scheduler = schedulers.read(config), theirs(config)
    scheduler.set_timesteps(10)
    t = times.grid(schedule.sampling.grid, 10, schedule.process, 1.0, resolve_dtype())
    denoiser = our_denoiser(schedule)
    told = numpy(denoiser._time_input(schedule.process, t))
    np.testing.assert_allclose(told, scheduler.timesteps.numpy(), atol=1e-3)
    # With other predictions diffusers goes by its timesteps.
    other = schedulers.read({**config, "prediction_type": "epsilon"})
    assert other.time_input == "timestep"


def test_settings_of_other_schedulers_are_ignored_as_diffusers_ignores_them():
    left_behind = {"clip_sample": True, "variance_type": "fixed_large", "skip_prk_steps": True}
    config = configuration("DPMSolverMultistep", left_behind)
    plain = schedulers.read(configuration("DPMSolverMultistep", {}))
    assert schedulers.read(config).sampling == plain.sampling
    euler = configuration("EulerDiscrete", {"thresholding": True, "use_lu_lambdas": True})
    assert schedulers.read(euler).sampling.threshold is None
    assert schedulers.read(euler).sampling.grid.levels is None


REFUSED = [
    ("DDPM", {"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    ("DDPM", {"variance_type": "learned_range"}, "variance_type='learned_range'"),
    ("DDPM", {"variance_type": "fixed_large", "steps_offset": 1}, "variance_type='fixed_large'"),
    ("DDPM", {"prediction_type": "velocity"}, "prediction_type='velocity'"),
    ("DDPM", {"timestep_spacing": "log"}, "timestep_spacing='log'"),
    ("DDPM", {"beta_end": 1.2}, "DDPMScheduler: Every beta must lie in (0, 1)"),
    ("DDPM", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
    ("DDIM", {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
    ("DDIM", {"timestep_spacing": "linspace"}, "timestep_spacing='linspace'"),
    ("DDIM", {"thresholding": True, "sample_max_value": 2.0}, "sample_max_value=2.0"),
    ("PNDM", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
    ("PNDM", {"timestep_spacing": "linspace"}, "timestep_spacing='linspace'"),
    ("PNDM", {"trained_betas": [0.5, 0.6, 1.0]}, "trained_betas='[..., 1.0]'"),
    ("DPMSolverMultistep", {"algorithm_type": "dpmsolver"}, "algorithm_type='dpmsolver'"),
    (
        "DPMSolverMultistep",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
        "solver_order=3",
    ),
    ("DPMSolverMultistep", {"solver_type": "bh3"}, "solver_type='bh3'"),
    ("DPMSolverMultistep", {"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ("DPMSolverMultistep", {"use_beta_sigmas": True}, "use_beta_sigmas=True"),
    ("DPMSolverMultistep", {"use_exponential_sigmas": True}, "use_exponential_sigmas=True"),
    ("DPMSolverMultistep", {"variance_type": "learned"}, "variance_type='learned'"),
    ("DPMSolverMultistep", {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True"),
    (
        "DPMSolverMultistep",
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        "euler_at_final=True",
    ),
    (
        "DPMSolverMultistep",
        {"lambda_min_clipped": -5.1, "timestep_spacing": "trailing"},
        "lambda_min_clipped=-5.1",
    ),
    (
        "DPMSolverMultistep",
        {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2"},
        "beta_schedule='squaredcos_cap_v2'",
    ),
    ("DPMSolverMultistep", {"use_karras_sigmas": True, "sigma_min": 0.1}, "sigma_min=0.1"),
    ("UniPCMultistep", {"solver_type": "bh1"}, "solver_type='bh1'"),
    ("UniPCMultistep", {"solver_order": 4}, "solver_order=4"),
    ("UniPCMultistep", {"predict_x0": False}, "predict_x0=False"),
    ("UniPCMultistep", {"disable_corrector": [0]}, "disable_corrector=[0]"),
    ("UniPCMultistep", {"lower_order_final": False}, "lower_order_final=False"),
    ("EulerDiscrete", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear'"),
    ("EulerDiscrete", {"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
    ("HeunDiscrete", {"beta_schedule": "exp"}, "beta_schedule='exp'"),
    ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    ("FlowMatchEulerDiscrete", {"num_train_timesteps": 500}, "num_train_timesteps=500"),
    ("FlowMatchEulerDiscrete", {"shift_terminal": 0.1}, "shift_terminal=0.1"),
    ("KDPM2Discrete", {}, "_class_name='KDPM2DiscreteScheduler'"),
    ("ScoreSdeVe", {"sampling_eps": 1e-3}, "sampling_eps=0.001"),
    ("DDPM", {"beta_skew": 0.3}, "beta_skew=0.3"),
]


@pytest.mark.parametrize("name, settings, message", REFUSED)
def test_what_cannot_be_mapped_is_refused_by_key_and_value(name, settings, message):
    with pytest.raises(ValueError) as error:
        schedulers.read(configuration(name, settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_settings_that_say_nothing_are_no_reason_to_refuse():
    schedulers.read(configuration("DDPM", {"new_one": None, "other": False, "_private": 3}))


# Back again.


def model_of(schedule, **changes):
    model = tfd.DiffusionModel(
        Smooth(schedule.prediction), **{**schedule.model_arguments(), **changes}
    )
    model.build((None, *SHAPE[1:]))
    return model


def levels(scheduler):
    """Everything that a scheduler computes from its configuration, for 10 steps."""
    scheduler.set_timesteps(10)
    tables = [scheduler.timesteps.numpy()]
    for name in ("alphas_cumprod", "sigmas"):
        tables += [np.asarray(getattr(scheduler, name))] if hasattr(scheduler, name) else []
    return tables


ALL = [*CASES, ("ScoreSdeVe", {"snr": 0.16}, 10), ("ScoreSdeVe", {"correct_steps": 0}, 10)]


@pytest.mark.parametrize("case", ALL, ids=ids)
def test_what_is_read_is_written_so_that_diffusers_does_the_same(case):
    name, settings, _ = case
    config = configuration(name, settings)
    schedule = schedulers.read(config)
    written = schedulers.write(model_of(schedule))
    again = schedulers.read(written)
    assert again.sampling == schedule.sampling
    assert (again.prediction, again.time_input) == (schedule.prediction, schedule.time_input)
    if case == ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1}, 10):
        # On steps of the chain Euler's method is DDIM.
        assert written["_class_name"] == "DDIMScheduler"
        return
    assert written["_class_name"] == config["_class_name"]
    for ours, original in zip(levels(theirs(written)), levels(theirs(config)), strict=True):
        np.testing.assert_allclose(ours, original, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "process, prediction",
    [("cosine", "v"), ("linear", "noise"), ("sigmoid", "clean"), ("vp", "v")],
)
def test_a_model_trained_here_samples_there(process, prediction, monkeypatch):
    model = tfd.DiffusionModel(Smooth(prediction), process, prediction)
    model.build((None, *SHAPE[1:]))
    written = schedulers.write(model)
    assert written["_class_name"] == "DPMSolverMultistepScheduler"
    seeds, shape = np.arange(SHAPE[0]), SHAPE[1:]
    # The noise that our samples begin with.
    keys = random.fold_in(random.keys(seeds), 0)
    x = numpy(random.normal(keys, shape))
    x = x.astype("float32")
    expected = their_sample(theirs(written), prediction, x, 10, monkeypatch)
    ours = model.sample(SHAPE[0], grid="uniform", steps=10)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"process": "ve"}, "process='ve'"),
        ({"process": "sub_vp"}, "process='sub_vp'"),
        ({"process": "linear", "prediction": "edm"}, "prediction='edm'"),
        ({"process": "linear", "time_input": "log_snr"}, "time_input='log_snr'"),
        ({"process": "linear", "sampling": Sampling("rk45")}, "sampler=RK45("),
        ({"process": "linear", "sampling": Sampling("deis", "uniform")}, "sampler=DEIS("),
        ({"process": "linear", "sampling": Sampling("ddim", "karras")}, "grid='karras'"),
        ({"process": "linear", "sampling": Sampling("unipc_2", "leading")}, "grid=Timesteps("),
        ({"process": "linear", "sampling": Sampling("plms", "leading")}, "sampler=PLMS("),
        (
            {"process": "linear", "sampling": Sampling(samplers.DDIM(1.0), "uniform")},
            "eta=1.0",
        ),
        (
            {"process": "linear", "sampling": Sampling(samplers.DDPM("learned"), "leading")},
            "variance='learned'",
        ),
        (
            {
                "process": "flow",
                "prediction": "flow",
                "sampling": Sampling("ddim", times.Shifted(), 10, None),
            },
            "time_input='timestep'",
        ),
        (
            {
                "process": processes.zero_terminal_snr(processes.get("linear")),
                "prediction": "v",
            },
            "divides by alpha",
        ),
    ],
)
def test_what_no_scheduler_can_do_is_refused(arguments, message):
    model = tfd.DiffusionModel(Smooth(), **arguments)
    model.build((None, *SHAPE[1:]))
    with pytest.raises(ValueError) as error:
        schedulers.write(model)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
