"""diffusers' schedulers as processes, predictions and ways to sample, and back.

A scheduler mixes what this library keeps apart: the noising process, what the network regresses,
and how samples are drawn. `read` takes the configuration apart, `write` puts it together.

| scheduler             | process                        | sampler                     | steps |
|-----------------------|--------------------------------|-----------------------------|-------|
| DDPM                  | chain                          | `DDPM`, variance β̃ or β     | T     |
| DDIM                  | chain                          | `DDIM`, which clips itself  | 50    |
| PNDM                  | chain                          | `PLMS` with its start-up    | 50    |
| DPMSolverMultistep    | chain, levels between          | `DPMSolverPP`, `SDEDPM...`  | 20    |
| UniPCMultistep        | chain, levels between          | `UniPC`                     | 20    |
| EulerDiscrete         | chain, levels between          | `DDIM`, which it is         | 50    |
| HeunDiscrete          | chain, levels between          | `Heun`                      | 50    |
| FlowMatchEulerDiscrete| `RectifiedFlow`                | `DDIM`, which it is         | 50    |
| ScoreSdeVe            | `VarianceExploding`            | `PredictorCorrector`        | T     |

A configuration does not say in how many steps to sample: the numbers are those that pipelines take,
for the solvers those that their papers recommend. "Levels between" are those of Karras' and other
grids, which lie between the steps of the chain: the process is then `Interpolated`, and trained on
the chain's own steps.

What comes from other numbers of steps than diffusers' code was made for is theirs alone:
`DDIMScheduler` and `PNDMScheduler` step by ⌊T/N⌋, off their own trailing grid where N does not
divide T, and PNDM's Runge–Kutta steps meet half-way only where ⌊T/N⌋ is even. ScoreSdeVe starts
from noise of variance σ², and so do Euler's and Heun's schedulers on linspace and trailing grids;
samples here start from that of noisy data, α² + σ² times the data's 1. ScoreSdeVe's correctors take
the mean of the norms over a batch, ours those of each image. Its images lie in [0, 1]; here they
are mapped to [−1, 1], with 2σ for σ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from keras import ops

from tfdiffusion import processes, samplers, times
from tfdiffusion.denoiser import Threshold
from tfdiffusion.processes import Process
from tfdiffusion.samplers import Sampling


@dataclass(frozen=True)
class Schedule:
    """What a scheduler's configuration says of a model.

    Attributes:
        process: how data become noise.
        prediction: what the network regresses.
        time_input: what it is told about time.
        sampling: how samples are drawn.
        scale_input: whether it gets the noisy data at unit scale, or as they are.
        unit_range: whether its images lie in [0, 1] there. Here they are those in [−1, 1], with
            twice the noise.
    """

    process: Process
    prediction: str
    sampling: Sampling
    time_input: str = "timestep"
    scale_input: bool = False
    unit_range: bool = False

    def model_arguments(self) -> dict:
        """Arguments of `DiffusionModel` beside the network: of the model that was imported."""
        arguments = {
            "process": self.process,
            "prediction": self.prediction,
            "time_input": self.time_input,
            "scale_input": self.scale_input,
            "sampling": self.sampling,
        }
        if isinstance(self.process, processes.Interpolated):
            arguments["times"] = times.DiscreteUniform(self.process.resolution)
        return arguments


# What a configuration leaves out has the values that the constructors of diffusers give it.

_CHAIN = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLDED = {
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SIGMAS = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
}
_SOLVER = {
    "solver_order": 2,
    "lower_order_final": True,
    "use_flow_sigmas": False,
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
    "use_dynamic_shifting": False,
    "time_shift_type": "exponential",
    "timestep_spacing": "linspace",
}
_DEFAULTS: dict[str, dict] = {
    "DDPMScheduler": {
        **_CHAIN,
        **_CLIPPED,
        **_THRESHOLDED,
        **_ZERO_SNR,
        "variance_type": "fixed_small",
        "timestep_spacing": "leading",
    },
    "DDIMScheduler": {
        **_CHAIN,
        **_CLIPPED,
        **_THRESHOLDED,
        **_ZERO_SNR,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    },
    "PNDMScheduler": {
        **_CHAIN,
        "skip_prk_steps": False,
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    },
    "DPMSolverMultistepScheduler": {
        **_CHAIN,
        **_THRESHOLDED,
        **_ZERO_SNR,
        **_SIGMAS,
        **_SOLVER,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **_CHAIN,
        **_THRESHOLDED,
        **_ZERO_SNR,
        **_SIGMAS,
        **_SOLVER,
        "predict_x0": True,
        "solver_type": "bh2",
        "disable_corrector": [],
        "solver_p": None,
        "shift_terminal": None,
    },
    "EulerDiscreteScheduler": {
        **_CHAIN,
        **_ZERO_SNR,
        **_SIGMAS,
        "interpolation_type": "linear",
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "HeunDiscreteScheduler": {
        **_CHAIN,
        **_SIGMAS,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "clip_sample_range": 1.0,
        "timestep_spacing": "linspace",
    },
    "FlowMatchEulerDiscreteScheduler": {
        **_SIGMAS,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "ScoreSdeVeScheduler": {
        "num_train_timesteps": 2000,
        "snr": 0.15,
        "sigma_min": 0.01,
        "sigma_max": 1348.0,
        "sampling_eps": 1e-5,
        "correct_steps": 1,
    },
}
# What diffusers ignores where a scheduler does not know it: the settings of the other schedulers,
# which conversions between them leave behind, and what old files hold.
_HARMLESS = {"tensor_format", "timestep_values", "name_or_path", "clip_sample", "skip_prk_steps"}
_KNOWN = _HARMLESS.union(*_DEFAULTS.values())

_PREDICTIONS = {"epsilon": "noise", "sample": "clean", "v_prediction": "v"}


class _Config(dict):
    """A configuration with the defaults filled in."""

    def __init__(self, config: Mapping):
        self.name = config.get("_class_name")
        if self.name not in _DEFAULTS:
            known = ", ".join(name.removesuffix("Scheduler") for name in _DEFAULTS)
            raise ValueError(
                f"_class_name={self.name!r} is no scheduler that can be imported. Those are "
                f"{known}: save the pipeline with one of them."
            )
        super().__init__(_DEFAULTS[self.name])
        for key, value in config.items():
            if not key.startswith("_") and key not in _KNOWN and value not in (None, False):
                raise self.refusal(key, "nothing is known of this setting", value)
            if key in self:
                self[key] = value

    def refusal(self, key: str, why: str, value=None) -> ValueError:
        """The error for a setting that cannot be mapped."""
        value = self.get(key) if value is None else value
        return ValueError(f"{self.name}: {key}={value!r} cannot be imported: {why}.")

    def only(self, key: str, *values, why: str) -> None:
        """Raises unless the setting has one of the values."""
        if self[key] not in values:
            raise self.refusal(key, f"{why}; {' and '.join(map(repr, values))} can")

    def chosen(self, key: str, table: Mapping):
        """`table[setting]`, or an error that lists what there is."""
        if self[key] not in table:
            raise self.refusal(key, f"known are {', '.join(map(repr, table))}")
        return table[self[key]]


def read(config: Mapping) -> Schedule:
    """The schedule of a `scheduler_config.json`.

    Example:

    >>> schedule = read(json.loads(path.read_text()))
    >>> model = tfd.DiffusionModel(network, **schedule.model_arguments())

    Args:
        config: its contents.

    Raises:
        ValueError: If it says what cannot be mapped; the message names key and value.
    """
    config = _Config(config)
    return _READERS[config.name](config)


# Processes.

_CURVES: dict[str, Callable] = {
    "linear": processes.LinearBeta,
    "scaled_linear": processes.ScaledLinearBeta,
    "sigmoid": processes.SigmoidBeta,
    "squaredcos_cap_v2": lambda steps, start, end: processes.Cosine(steps),
}
# Which of them a scheduler has: all but one only these.
_NO_SIGMOID = {key: value for key, value in _CURVES.items() if key != "sigmoid"}


def _chain(config: _Config, floor: float = 0.0) -> processes.Tabulated:
    """The chain of a configuration; `floor` is α_T where it is rescaled to end in noise."""
    try:
        if config["trained_betas"] is not None:
            chain = processes.Tabulated.from_betas(config["trained_betas"])
        else:
            curves = _CURVES if config.name == "DDPMScheduler" else _NO_SIGMOID
            curve = config.chosen("beta_schedule", curves)
            start, end = config["beta_start"], config["beta_end"]
            chain = curve(config["num_train_timesteps"], start, end)
    except ValueError as error:
        if config.name in str(error):
            raise
        raise ValueError(f"{config.name}: {error}") from error
    divides = config.name not in ("DDPMScheduler", "DDIMScheduler")
    if divides and _table(chain)[0][-1] == 0.0:
        raise config.refusal("trained_betas", "it divides by alpha, which ends at 0", "[..., 1.0]")
    if not config.get("rescale_betas_zero_snr"):
        return chain
    if floor == 0.0 and config["prediction_type"] == "epsilon":
        why = "the noise says nothing about the image where alpha = 0 (prediction_type='epsilon')"
        raise config.refusal("rescale_betas_zero_snr", why)
    alphas, sigmas = _table(processes.zero_terminal_snr(chain))
    alphas[-1], sigmas[-1] = floor, np.sqrt(1.0 - floor**2)
    try:
        return processes.Tabulated(alphas, sigmas)
    except ValueError as error:
        why = (
            "with these betas its last step, alpha_bar = 2^-24, has less noise than the one before"
        )
        raise config.refusal("rescale_betas_zero_snr", why) from error


#: What alpha_bar, rescaled to 0, is set to by schedulers that divide by it.
_SQUARED_FLOOR = 2.0**-24


def _table(chain: processes.Tabulated) -> tuple[np.ndarray, np.ndarray]:
    """α_1 … α_T and σ_1 … σ_T."""
    config = processes.Tabulated.get_config(chain)
    return np.array(config["alphas"]), np.array(config["sigmas"])


# What they share.


def _prediction(config: _Config) -> str:
    return config.chosen("prediction_type", _PREDICTIONS)


def _threshold(config: _Config) -> Threshold | None:
    """How x̂_0 is kept in range."""
    if config.get("thresholding"):
        most, quantile = config["sample_max_value"], config["dynamic_thresholding_ratio"]
        # What is divided by lies between 1 and the most.
        return Threshold(most, None if most == 1.0 else quantile)
    clipped = "clip_sample" in _DEFAULTS[config.name] and config["clip_sample"]
    return Threshold(config["clip_sample_range"]) if clipped else None


def _spacing(config: _Config, **settings) -> times.Timesteps:
    """The grid of timesteps."""
    known = ("leading", "linspace", "trailing")
    spacing = config.chosen("timestep_spacing", {name: name for name in known})
    offset = config["steps_offset"] if spacing == "leading" else 0
    return times.Timesteps(spacing, offset, **settings)


def _no_gaps(config: _Config) -> None:
    why = "its steps go by T // N, not to the next time of that grid, as those of leading and "
    config.only("timestep_spacing", "leading", "trailing", why=why + "trailing grids do")


def _until_first(config: _Config) -> bool:
    """Whether sampling ends at the least noise of the chain."""
    return config.chosen("final_sigmas_type", {"zero": False, "sigma_min": True})


def _no_other_levels(config: _Config) -> None:
    """Raises for noise levels that no grid here has."""
    config.only("use_beta_sigmas", False, None, why="no grid here has quantiles of a beta law")
    if _levels(config):
        for key in ("sigma_min", "sigma_max"):
            config.only(key, None, why="these grids run between the ends of the chain")


def _levels(config: _Config) -> str | None:
    """Which kind of noise levels lies between the chain's."""
    kinds = {
        "use_karras_sigmas": "karras",
        "use_lu_lambdas": "log",
        "use_exponential_sigmas": "log",
    }
    return next((kind for key, kind in kinds.items() if config.get(key)), None)


# One by one.


def _read_ddpm(config: _Config) -> Schedule:
    variances = {"fixed_small": "posterior", "fixed_small_log": "posterior", "fixed_large": "beta"}
    variance = config.chosen("variance_type", variances)
    grid = _spacing(config)
    if variance == "beta" and (grid.spacing == "trailing" or grid.offset > 0):
        why = "on a grid that stops short of timestep 0 it leaves noise in the image"
        raise config.refusal("variance_type", f"{why} (steps_offset, timestep_spacing)")
    chain, sampler = _chain(config), samplers.DDPM(variance)
    sampling = Sampling(sampler, grid, chain.num_timesteps, _threshold(config))
    return Schedule(chain, _prediction(config), sampling)


def _read_ddim(config: _Config) -> Schedule:
    _no_gaps(config)
    threshold = _threshold(config)
    if threshold is not None and threshold.quantile is not None:
        why = "the noise is not that of the thresholded image; with 1.0, which only clips, it works"
        raise config.refusal("sample_max_value", why)
    sampler = samplers.DDIM(clip=threshold.limit if threshold else None)
    grid = _spacing(config, until_first=not config["set_alpha_to_one"])
    chain = _chain(config)
    sampling = Sampling(sampler, grid, min(50, chain.num_timesteps), None)
    return Schedule(chain, _prediction(config), sampling)


def _read_pndm(config: _Config) -> Schedule:
    _no_gaps(config)
    config.only(
        "prediction_type", "epsilon", why="it extrapolates what the network says, not noise"
    )
    sampler = samplers.PLMS(4, "trapezoid" if config["skip_prk_steps"] else "runge_kutta")
    grid = _spacing(config, until_first=not config["set_alpha_to_one"])
    chain = _chain(config)
    sampling = Sampling(sampler, grid, min(50, chain.num_timesteps), None)
    return Schedule(chain, _prediction(config), sampling)


def _read_solver(config: _Config, sampler: samplers.Sampler) -> Schedule:
    """What DPM-Solver and UniPC share."""
    why = "only grids of a chain's own levels are known"
    config.only("use_flow_sigmas", False, why=why)
    config.only("use_dynamic_shifting", False, None, why=why)
    config.only("use_exponential_sigmas", False, None, why="it cuts the timesteps off, unrounded")
    _no_other_levels(config)
    chain, end = _chain(config, floor=_SQUARED_FLOOR**0.5), {"until_first": _until_first(config)}
    process, grid, time_input, levels = chain, None, "timestep", _levels(config)
    if levels:
        process, time_input = processes.Interpolated(chain), "nearest_timestep"
        grid = times.Timesteps("linspace", rounded=False, levels=levels, **end)
    else:
        count = _clipped_count(config, chain)
        exclusive = config["timestep_spacing"] != "trailing"
        grid = _spacing(config, exclusive=exclusive, count=count, **end)
    sampling = Sampling(sampler, grid, min(20, chain.num_timesteps), _threshold(config))
    return Schedule(process, _prediction(config), sampling, time_input)


def _clipped_count(config: _Config, chain: processes.Tabulated) -> int | None:
    """How many steps of the chain have ln(α/σ) of at least `lambda_min_clipped`."""
    least = config.get("lambda_min_clipped", -np.inf)
    if least == -np.inf:
        return None
    if config["timestep_spacing"] == "trailing":
        why = "with timestep_spacing='trailing' it changes the number of steps"
        raise config.refusal("lambda_min_clipped", why)
    alphas, sigmas = _table(chain)
    return int(np.sum(np.log(alphas / sigmas) >= least))


def _read_dpm_solver(config: _Config) -> Schedule:
    config.only(
        "variance_type", None, "fixed_small", "fixed_large", why="variances are not learned"
    )
    kinds = {"dpmsolver++": samplers.DPMSolverPP, "sde-dpmsolver++": samplers.SDEDPMSolverPP}
    kind = config.chosen("algorithm_type", {**kinds, "deis": samplers.DPMSolverPP})
    rules = {"heun": False, **dict.fromkeys(("midpoint", "logrho", "bh1", "bh2"), True)}
    if config["euler_at_final"] and config["final_sigmas_type"] != "zero":
        raise config.refusal("euler_at_final", "the order falls only in short runs")
    if _levels(config) and config["beta_schedule"] == "squaredcos_cap_v2":
        why = "on the levels of other grids it cuts the timesteps off, unrounded"
        raise config.refusal("beta_schedule", why)
    order, orders = config["solver_order"], range(1, kind.highest + 1)
    config.only("solver_order", *orders, why=f"{config['algorithm_type']} has other orders here")
    midpoint, settles = config.chosen("solver_type", rules), 15 * bool(config["lower_order_final"])
    return _read_solver(config, kind(order, midpoint=midpoint, settles=settles))


def _read_unipc(config: _Config) -> Schedule:
    config.only("predict_x0", True, why="UniPC interpolates the clean image here")
    config.only("solver_type", "bh2", "midpoint", "heun", "logrho", why="B(h) is expm1(h) here")
    config.only("disable_corrector", [], None, why="the corrector is always on")
    config.only("solver_p", None, why="the predictor is UniPC's own")
    config.only("lower_order_final", True, why="UniPC always ends with low orders")
    config.only("solver_order", 1, 2, 3, why="UniPC has other orders here")
    return _read_solver(config, samplers.UniPC(config["solver_order"]))


def _read_by_levels(config: _Config, sampler: samplers.Sampler, until_first: bool) -> Schedule:
    """What Euler's and Heun's schedulers share: they visit levels that no step of a chain has."""
    _no_other_levels(config)
    chain, levels = _chain(config, floor=_SQUARED_FLOOR**0.5), _levels(config)
    rounded = config["timestep_spacing"] != "linspace"
    grid = _spacing(config, rounded=rounded, levels=levels, until_first=until_first)
    process: Process = chain
    if levels or grid.spacing == "linspace":
        process = processes.Interpolated(chain, "log_level" if levels else "level")
    sampling = Sampling(sampler, grid, min(50, chain.num_timesteps), _threshold(config))
    return Schedule(process, _prediction(config), sampling)


def _read_euler(config: _Config) -> Schedule:
    config.only("interpolation_type", "linear", why="it gives a grid of another length")
    schedule = _read_by_levels(config, samplers.DDIM(), _until_first(config))
    # diffusers heeds this setting with one prediction only.
    if (config["timestep_type"], config["prediction_type"]) == ("continuous", "v_prediction"):
        return replace(schedule, time_input="edm")
    return schedule


def _read_heun(config: _Config) -> Schedule:
    return _read_by_levels(config, samplers.Heun(), until_first=False)


def _read_flow(config: _Config) -> Schedule:
    config.only("num_train_timesteps", 1000, why="networks are told thousandths")
    config.only("use_dynamic_shifting", False, None, why="the shift depends on the size of images")
    config.only("stochastic_sampling", False, None, why="no sampler forgets its noise at each step")
    config.only("invert_sigmas", False, None, why="time runs from noise to data")
    config.only("shift_terminal", None, why="the grid ends with the shift of 1/1000")
    for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        config.only(key, False, None, why="the grid of a flow is even, or shifted")
    shift = config["shift"]
    # Shifted once by the constructor, then again with the whole grid.
    last = shift / (999.0 + shift)
    sampling = Sampling(samplers.DDIM(), times.Shifted(last, shift), 50, None)
    return Schedule(processes.RectifiedFlow(), "flow", sampling, "thousandths")


def _read_score_sde(config: _Config) -> Schedule:
    process = processes.VarianceExploding(2.0 * config["sigma_min"], 2.0 * config["sigma_max"])
    corrections, snr = config["correct_steps"], config["snr"]
    sampler: samplers.Sampler = samplers.ReverseDiffusion()
    if corrections:
        settings = {"measured": True, "correct_last": True}
        sampler = samplers.PredictorCorrector("reverse_diffusion", snr, corrections, **settings)
    config.only("sampling_eps", 1e-5, why="networks are told times that end there")
    sampling = Sampling(sampler, times.Shifted(last=0.0), config["num_train_timesteps"], None)
    return Schedule(process, "score", sampling, "score_sde_sigma", unit_range=True)


_READERS: dict[str, Callable[[_Config], Schedule]] = {
    "DDPMScheduler": _read_ddpm,
    "DDIMScheduler": _read_ddim,
    "PNDMScheduler": _read_pndm,
    "DPMSolverMultistepScheduler": _read_dpm_solver,
    "UniPCMultistepScheduler": _read_unipc,
    "EulerDiscreteScheduler": _read_euler,
    "HeunDiscreteScheduler": _read_heun,
    "FlowMatchEulerDiscreteScheduler": _read_flow,
    "ScoreSdeVeScheduler": _read_score_sde,
}


# Back again.


def write(model) -> dict:
    """The `scheduler_config.json` of a model: its process, its prediction and how it samples.

    A model that says nothing of sampling gets what is nearest to the library's choice among what
    diffusers can do as exactly: `sampler="dpmpp_2m", grid="uniform"`, clipped if its data are.

    Example:

    >>> path.write_text(json.dumps(write(model)))

    Args:
        model: a `DiffusionModel`.

    Raises:
        ValueError: If no scheduler can do what the model does; the message says what and which.
    """
    sampling = _explicit(model)
    sampler, grid = sampling.sampler, sampling.grid
    if type(sampler) not in _WRITERS or not isinstance(grid, times.Grid):
        what = "sampler" if type(sampler) not in _WRITERS else "grid"
        raise _not_written(what, getattr(sampling, what), "no scheduler has it")
    name, settings = _WRITERS[type(sampler)](model, sampling)
    config = {"_class_name": name, **_process_settings(model, name), **settings}
    try:
        schedule = read(config)
    except ValueError as error:
        raise ValueError(f"This model cannot be written for diffusers. {error}") from error
    _check_written(model, sampling, schedule, name)
    return config


def _check_written(model, sampling: Sampling, schedule: Schedule, name: str) -> None:
    """Raises unless what was written says what the model does."""
    pairs = {
        "process": (_kind(model.process), _kind(schedule.process)),
        "time_input": (model.raw.time_input, schedule.time_input),
        "sampler": (sampling.sampler, schedule.sampling.sampler),
        "grid": (sampling.grid, schedule.sampling.grid),
        "threshold": (sampling.threshold, schedule.sampling.threshold),
    }
    if not isinstance(schedule.process, processes.Tabulated | processes.Interpolated):
        # Elsewhere scaling the input changes nothing.
        pairs["scale_input"] = (model.raw.scale_input, schedule.scale_input)
    for what, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise _not_written(what, ours, f"{name} has {theirs!r}")


def _kind(process: Process) -> str:
    """What tells processes apart that have the same levels at the timesteps, or none."""
    if isinstance(process, processes.Interpolated):
        return f"interpolated along {process.along}"
    known = isinstance(process, processes.RectifiedFlow | processes.VarianceExploding)
    return processes.name(process) if known else "chain"


def _not_written(what: str, value, why: str) -> ValueError:
    return ValueError(
        f"{what}={value!r} cannot be written for diffusers: {why}. Make the model with another "
        "sampling=tfd.samplers.Sampling(...), process or prediction."
    )


def _explicit(model) -> Sampling:
    """The model's sampling, names made objects."""
    sampling = model.sampling
    if sampling == Sampling():
        sampling = replace(sampling, grid="uniform")
    grid, threshold = sampling.grid, sampling.threshold
    spacings = {"uniform": "trailing", "trailing": "trailing", "leading": "leading"}
    if isinstance(grid, str) and grid in {**spacings, "linspace": "linspace"}:
        grid = times.Timesteps({**spacings, "linspace": "linspace"}[grid])
    if threshold == "auto":
        threshold = "clip" if model.bounded else None
    named = {"clip": Threshold(1.0), "dynamic": Threshold(float("inf"), 0.995)}
    threshold = named.get(threshold, threshold) if isinstance(threshold, str) else threshold
    return Sampling(samplers.get(sampling.sampler), grid, sampling.steps, threshold)


def _process_settings(model, name: str) -> dict:
    """What the configuration says of process and prediction."""
    process, prediction = model.process, model.prediction.name
    alone = {"ScoreSdeVeScheduler": "score", "FlowMatchEulerDiscreteScheduler": "flow"}
    if name in alone:
        if prediction != alone[name]:
            raise _not_written("prediction", prediction, f"{name} has {alone[name]!r}")
        return {}
    kinds = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
    if prediction not in kinds:
        raise _not_written("prediction", prediction, f"{name} knows {', '.join(kinds)}")
    chain = process.chain if isinstance(process, processes.Interpolated) else process
    settings = {"prediction_type": kinds[prediction], "num_train_timesteps": chain.resolution}
    curves = {cls: curve for curve, cls in _CURVES.items() if isinstance(cls, type)}
    if name != "DDPMScheduler":
        curves.pop(processes.SigmoidBeta)
    if type(chain) in curves:
        ends = {"beta_start": chain.beta_start, "beta_end": chain.beta_end}
        return {**settings, "beta_schedule": curves[type(chain)], **ends}
    if chain.get_config() == processes.Cosine(chain.resolution).get_config():
        return {**settings, "beta_schedule": "squaredcos_cap_v2"}
    return {**settings, "trained_betas": _betas(chain)}


def _levels_of(process: Process) -> tuple[np.ndarray, np.ndarray]:
    """α and σ at the timesteps, float64 (T,)."""
    if isinstance(process, processes.Tabulated):
        return _table(process)
    t = np.arange(1, process.resolution + 1) / process.resolution
    return tuple(
        ops.convert_to_numpy(f(t)).astype("float64") for f in (process.alpha, process.sigma)
    )


def _betas(process: Process) -> list[float]:
    """β_1 … β_T of a variance-preserving process."""
    alphas, sigmas = _levels_of(process)
    if not np.allclose(alphas**2 + sigmas**2, 1.0, atol=1e-5):
        why = "schedulers of chains preserve the variance, alpha^2 + sigma^2 = 1"
        raise _not_written("process", processes.name(process), why)
    return (1.0 - (alphas / np.r_[1.0, alphas[:-1]]) ** 2).tolist()


def _grid_settings(grid: times.Grid) -> dict:
    """Spacing, offset and levels."""
    if not isinstance(grid, times.Timesteps):
        raise _not_written("grid", grid, "schedulers of chains have tfd.times.Timesteps")
    settings = {"timestep_spacing": grid.spacing}
    if grid.spacing == "leading":
        settings["steps_offset"] = grid.offset
    return settings


def _threshold_settings(threshold: Threshold | None, clips: bool) -> dict:
    """How x̂_0 is kept in range, for a scheduler that clips or for one that only thresholds."""
    if clips and threshold is not None and threshold.quantile is None:
        return {"clip_sample": True, "clip_sample_range": threshold.limit}
    settings = {"clip_sample": False} if clips else {}
    if threshold is None:
        return settings
    quantile = 0.995 if threshold.quantile is None else threshold.quantile
    ratio = {"dynamic_thresholding_ratio": quantile, "sample_max_value": threshold.limit}
    return {**settings, "thresholding": True, **ratio}


def _write_ddpm(model, sampling: Sampling) -> tuple[str, dict]:
    variance = {"posterior": "fixed_small", "beta": "fixed_large"}.get(sampling.sampler.variance)
    if variance is None:
        raise _not_written("variance", sampling.sampler.variance, "schedulers here have fixed ones")
    settings = {**_grid_settings(sampling.grid), **_threshold_settings(sampling.threshold, True)}
    return "DDPMScheduler", {"variance_type": variance, **settings}


def _write_ddim(model, sampling: Sampling) -> tuple[str, dict]:
    """DDIM is Euler's method, for flows and in σ, and DPM-Solver++ of order 1."""
    sampler, grid = sampling.sampler, sampling.grid
    if sampler.eta:
        raise _not_written("eta", sampler.eta, "it is an argument of the pipeline there")
    if isinstance(grid, times.Shifted):
        return "FlowMatchEulerDiscreteScheduler", {"shift": grid.shift}
    if isinstance(model.process, processes.Interpolated) and sampling.threshold is None:
        return "EulerDiscreteScheduler", _euler_settings(model, grid, final=True)
    if sampling.threshold is not None and sampler.clip is None:
        return _write_dpm_solver(model, replace(sampling, sampler=samplers.DPMSolverPP(1)))
    clip = None if sampler.clip is None else Threshold(sampler.clip)
    settings = {**_grid_settings(grid), **_threshold_settings(clip, True)}
    return "DDIMScheduler", {**settings, "set_alpha_to_one": grid.denoise_last}


def _write_plms(model, sampling: Sampling) -> tuple[str, dict]:
    settings = {"skip_prk_steps": sampling.sampler.start_up == "trapezoid"}
    settings["set_alpha_to_one"] = sampling.grid.denoise_last
    return "PNDMScheduler", {**settings, **_grid_settings(sampling.grid)}


def _solver_settings(model, sampling: Sampling) -> dict:
    """What DPM-Solver and UniPC share."""
    grid = sampling.grid
    settings = {**_grid_settings(grid), **_threshold_settings(sampling.threshold, False)}
    if grid.levels is not None:
        settings["use_karras_sigmas" if grid.levels == "karras" else "use_lu_lambdas"] = True
    if grid.count is not None:
        alphas, sigmas = _levels_of(model.process)
        settings["lambda_min_clipped"] = float(np.log(alphas / sigmas)[grid.count - 1])
    settings["solver_order"] = sampling.sampler.order
    return {**settings, "final_sigmas_type": "zero" if grid.denoise_last else "sigma_min"}


def _write_dpm_solver(model, sampling: Sampling) -> tuple[str, dict]:
    sampler = sampling.sampler
    noisy = isinstance(sampler, samplers.SDEDPMSolverPP)
    settings = {
        "algorithm_type": "sde-dpmsolver++" if noisy else "dpmsolver++",
        "solver_type": "midpoint" if sampler.midpoint else "heun",
        "lower_order_final": sampler.settles > 0,
    }
    return "DPMSolverMultistepScheduler", {**_solver_settings(model, sampling), **settings}


def _write_unipc(model, sampling: Sampling) -> tuple[str, dict]:
    return "UniPCMultistepScheduler", _solver_settings(model, sampling)


def _euler_settings(model, grid: times.Grid, final: bool) -> dict:
    """What Euler's and Heun's schedulers share."""
    settings = _grid_settings(grid)
    if grid.levels is not None:
        kind = "use_karras_sigmas" if grid.levels == "karras" else "use_exponential_sigmas"
        settings[kind] = True
    if final:
        settings["final_sigmas_type"] = "zero" if grid.denoise_last else "sigma_min"
        settings["timestep_type"] = "continuous" if model.raw.time_input == "edm" else "discrete"
    return settings


def _write_heun(model, sampling: Sampling) -> tuple[str, dict]:
    settings = _euler_settings(model, sampling.grid, final=False)
    return "HeunDiscreteScheduler", {**settings, **_threshold_settings(sampling.threshold, True)}


def _write_score_sde(model, sampling: Sampling) -> tuple[str, dict]:
    if not isinstance(model.process, processes.VarianceExploding):
        raise _not_written("process", processes.name(model.process), "ScoreSdeVe has 've'")
    sampler = sampling.sampler
    correcting = isinstance(sampler, samplers.PredictorCorrector)
    return "ScoreSdeVeScheduler", {
        **{name: 0.5 * sigma for name, sigma in model.process.get_config().items()},
        "num_train_timesteps": sampling.steps,
        "correct_steps": sampler.corrections if correcting else 0,
        "snr": sampler.snr if correcting else 0.15,
    }


_WRITERS: dict[type, Callable[..., tuple[str, dict]]] = {
    samplers.DDPM: _write_ddpm,
    samplers.DDIM: _write_ddim,
    samplers.PLMS: _write_plms,
    samplers.DPMSolverPP: _write_dpm_solver,
    samplers.SDEDPMSolverPP: _write_dpm_solver,
    samplers.UniPC: _write_unipc,
    samplers.Heun: _write_heun,
    samplers.PredictorCorrector: _write_score_sde,
    samplers.ReverseDiffusion: _write_score_sde,
}
