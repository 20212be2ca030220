"""Error against number of evaluations, for our solvers and for diffusers' on the same problem.

    python benchmarks/solvers.py          (needs diffusers, torch, scipy and matplotlib)

The problem is an 8-dimensional Gaussian mixture under the linear β of DDPM, T = 1000, with the
exact denoiser; all start from the same noise, and the truth is the end of the probability-flow ODE
by SciPy's `solve_ivp`. Errors are root mean squares over 128 samples and 8 dimensions. diffusers'
schedulers get the exact ε̂ at their own timesteps. Where both visit the same noise levels, two
methods of one name differ by their arithmetic alone. Writes solvers.md here and assets/solvers.png.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import diffusers
import numpy as np
import torch
from keras import ops
from scipy.integrate import solve_ivp

import tfdiffusion as tfd
from tfdiffusion import _backend, samplers
from tfdiffusion.samplers.loop import integrate, resolve_grid

HERE = Path(__file__).parent
BUDGETS = (5, 6, 8, 10, 12, 15, 20)
COUNT, DIMENSION = 128, 8

# Ours by the names that they share with diffusers'.
SHARED = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpm_solver_1": ("EulerDiscreteScheduler", {}),
    "dpm_solver_2": ("KDPM2DiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc_2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
}
# Those that have σ between the levels of the chain, though they ask at a rounded timestep: here
# they get ε̂ at their σ.
ROUNDED = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
# Their way to begin, where it is an option of ours.
AS_THEIRS = {"plms": samplers.PLMS(start_up="trapezoid")}
NOTES = """
Ours visit the noise levels at which diffusers' scheduler asks, and end where it ends:
`DEISMultistepScheduler` at σ = 0.01, the others at the data. PLMS begins as `PNDMScheduler` does,
with a second evaluation in its first step. `DDIMScheduler` and `PNDMScheduler` step by 1000 // N,
and so to other levels than they ask at where N does not divide 1000: there (\\*) the two are not on
one grid.
"""
# What has no counterpart on the other side.
ONLY_OURS = ("euler", "rk4", "dpm_solver_3")
ONLY_THEIRS = {
    "DPM-Solver++ 2S": ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    "DPM-Solver++ 3S": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
}
THEIR_NAMES = {
    "ddim": "DDIM",
    "dpm_solver_1": "Euler",
    "dpm_solver_2": "KDPM2 (DPM-Solver-2)",
    "heun": "Heun",
    "lms": "LMS",
    "plms": "PNDM (PLMS)",
    "dpmpp_2m": "DPM-Solver++ 2M",
    "dpmpp_3m": "DPM-Solver++ 3M",
    "unipc_2": "UniPC 2",
    "unipc_3": "UniPC 3",
    "deis": "DEIS",
}
OUR_GRIDS = {
    "trailing": "uniform",
    "karras": "karras",
    "quadratic": "quadratic",
    "log_snr": "log_snr",
    "optimized": "optimized",
}
THEIR_GRIDS = {
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"timestep_spacing": "trailing", "use_karras_sigmas": True},
    "log_snr": {"timestep_spacing": "trailing", "use_lu_lambdas": True},
}


class LowOrderLast(samplers.base.Sampler):
    """A multistep sampler whose last step is of order 1 although it does not end at the data."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.steps = None

    def start(self, x_t, evaluations=None) -> tuple:
        """As many evaluations as there will be steps."""
        return self.sampler.start(x_t, self.steps)

    def step(self, denoiser, carry: tuple, t, s, keys) -> tuple:
        """The step of the sampler."""
        return self.sampler.step(denoiser, carry, t, s, keys)


class Problem:
    """The mixture, its noise, and where the flow takes it."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.means = rng.uniform(-1, 1, (10, DIMENSION))
        self.variances = rng.uniform(0.05, 0.3, 10) ** 2
        self.weights = rng.dirichlet(3.0 * np.ones(10))
        alphas_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
        self.alpha_end = np.sqrt(alphas_bar[-1])
        self.log_levels = 0.5 * np.log(1.0 / alphas_bar - 1.0)  # ln(σ/α)
        self.denoiser, self.between = (
            tfd.exact.GaussianMixture(self.means, self.variances, self.weights, process=process)
            for process in ("linear", tfd.processes.Interpolated(tfd.processes.get("linear")))
        )
        self.noise = np.random.default_rng(1).standard_normal((COUNT, DIMENSION))
        self.truth = self._end_of_flow()
        self.runs = {}

    def clean(self, x, level):
        """E[x_0 | x] for x = x_0 + level ε, in NumPy."""
        variances = self.variances + level**2
        offset = x[:, None] - self.means
        logs = np.log(self.weights) - 0.5 * (offset**2).sum(-1) / variances
        logs -= 0.5 * DIMENSION * np.log(variances)
        share = np.exp(logs - logs.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        posterior = self.means + (self.variances / variances)[:, None] * offset
        return (share[..., None] * posterior).sum(1)

    def epsilon(self, x_t, level: float):
        """ε̂ where σ/α is `level`."""
        x = x_t * np.sqrt(1.0 + level**2)
        return (x - self.clean(x, level)) / level

    def _end_of_flow(self):
        """By the angle φ with tan φ = σ/α: dz/dφ = (cos φ z − x̂_0)/sin φ."""

        def slope(phi, state):
            z = state.reshape(COUNT, DIMENSION)
            x_0 = self.clean(z / np.cos(phi), np.tan(phi))
            return ((np.cos(phi) * z - x_0) / np.sin(phi)).ravel()

        begin, end = np.arctan(np.exp(self.log_levels[-1])), 1e-5
        z = solve_ivp(slope, (begin, end), self.noise.ravel(), "DOP853", rtol=1e-9, atol=1e-9).y
        return self.clean(z[:, -1].reshape(COUNT, DIMENSION) / np.cos(end), np.tan(end))

    def error(self, x) -> float:
        return float(np.sqrt(np.mean((np.asarray(x) - self.truth) ** 2)))

    def ours(self, name: str, grid: str, budget: int) -> float:
        """Error of one of our samplers on one of our grids, with at most so many evaluations."""
        sampler = samplers.get(name)
        steps = (budget - 1) // sampler.evaluations + 1
        times = resolve_grid(self.denoiser, OUR_GRIDS[grid], steps, sampler)
        return self._run(sampler, self.denoiser, times)

    def ours_on_theirs(self, name: str, kind: str, arguments: dict, budget: int) -> float:
        """Error of one of our samplers at the noise levels at which a scheduler asks."""
        scheduler = self._scheduler(kind, arguments, budget)
        timesteps = scheduler.timesteps.numpy().astype("float64")
        if kind in ROUNDED:
            logs = np.log(scheduler.sigmas.numpy()[: len(timesteps)].astype("float64"))
            timesteps = np.interp(logs, self.log_levels, np.arange(1000))
        asked = np.unique(timesteps)[::-1]
        if kind == "KDPM2DiscreteScheduler":
            asked = asked[::2]  # the others lie within its steps
        ends_early = kind in ROUNDED and float(scheduler.sigmas[-1]) > 0.0
        times = [*asked, 0.0] if ends_early else asked
        sampler = AS_THEIRS.get(name, samplers.get(name))
        times = (np.asarray(times) + 1.0) / 1000
        return self._run(sampler, self.between, times, ends_early)

    def _run(self, sampler, denoiser, times, ends_early: bool = False) -> float:
        key = (repr(sampler), denoiser, ends_early)
        if key not in self.runs:
            keys = tfd.random.keys(range(COUNT))
            if ends_early:
                sampler = LowOrderLast(sampler)

            def run(times, x):
                if ends_early:
                    sampler.steps = ops.shape(times)[0] - 1
                return integrate(denoiser, sampler, times, keys, x, denoise_last=not ends_early)

            self.runs[key] = _backend.compiled(run, ())
        times = ops.convert_to_tensor(times, _backend.TIME_DTYPE)
        return self.error(self.runs[key](times, self.noise.astype("float32")))

    def _scheduler(self, kind: str, arguments: dict, budget: int):
        """One of diffusers', set to at most so many evaluations."""
        make = getattr(diffusers, kind)
        scheduler = make(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **arguments)
        for steps in range(budget, 0, -1):
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) <= budget:
                return scheduler
        raise ValueError(f"{kind} takes more than {budget} evaluations for one step.")

    def theirs(self, kind: str, arguments: dict, budget: int) -> float:
        """Error of one of diffusers' schedulers with at most so many evaluations."""
        scheduler = self._scheduler(kind, arguments, budget)
        x = torch.tensor(self.noise)
        if float(scheduler.init_noise_sigma) != 1.0:  # its state is x/α
            x = x / self.alpha_end
        for k, timestep in enumerate(scheduler.timesteps):
            x_t = scheduler.scale_model_input(x, timestep).numpy()
            level = np.exp(np.interp(float(timestep), np.arange(1000), self.log_levels))
            if kind in ROUNDED:
                level = float(scheduler.sigmas[k])
            epsilon = torch.tensor(self.epsilon(x_t, level))
            x = scheduler.step(epsilon, timestep, x).prev_sample
        return self.error(x)


def measure(problem: Problem) -> tuple[dict, dict, dict]:
    """(ours, theirs, ours at the times of theirs): (name, grid) → errors at the budgets."""
    ours = {
        (name, grid): [problem.ours(name, grid, budget) for budget in BUDGETS]
        for name in (*SHARED, *ONLY_OURS)
        for grid in OUR_GRIDS
    }
    theirs, same = {}, {}
    for name, (kind, arguments) in {**SHARED, **ONLY_THEIRS}.items():
        known = set(getattr(diffusers, kind)().config)
        for grid, more in THEIR_GRIDS.items():
            if grid != "trailing" and not set(more) <= known:
                continue
            kept = {**arguments, **{key: value for key, value in more.items() if key in known}}
            theirs[name, grid] = [problem.theirs(kind, kept, budget) for budget in BUDGETS]
            if name in SHARED:
                same[name, grid] = [
                    problem.ours_on_theirs(name, kind, kept, budget) for budget in BUDGETS
                ]
    return ours, theirs, same


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |\n"


def best(errors: dict) -> list[tuple[float, str]]:
    """(error, who) at each budget."""
    return [min((e[i], f"{n}, {g}") for (n, g), e in errors.items()) for i in range(len(BUDGETS))]


def table(ours: dict, theirs: dict, same: dict) -> str:
    """Markdown: the best of each side, the same names on the same grids, all of the rest."""
    head = row(["", *map(str, BUDGETS)]) + row(["---"] * (len(BUDGETS) + 1))
    text = "## The best of each, by number of evaluations\n\n" + head
    for who, errors in (("tfdiffusion", ours), ("diffusers", theirs)):
        text += row([who, *(f"{e:.4f} ({n})" for e, n in best(errors))])
    text += "\n## The same name at the same times: ours, diffusers'\n\n" + head
    ratios = {}
    for (name, grid), errors in same.items():
        cells = []
        for a, b, budget in zip(errors, theirs[name, grid], BUDGETS):
            steps = {"ddim": budget, "plms": budget - 1}.get(name, 1)
            cells.append(f"{a:.4f}, {b:.4f}" + ("\\*" if 1000 % steps else ""))
            if 1000 % steps == 0:
                ratios[f"{name}, {grid}, {budget} evaluations"] = a / b
        text += row([f"{name}, {grid}", *cells])
    worst = max(ratios, key=ratios.get)
    line = f"Elsewhere the largest ratio of ours to theirs is {ratios[worst]:.4f} ({worst})."
    text += f"{NOTES}\n{line}\n"
    text += "\n## On grids of each side's own\n\n" + head
    for who, side in (("", ours), ("diffusers ", theirs)):
        for (name, grid), errors in side.items():
            if who == "" or (name, grid) not in same:
                text += row([f"{who}{name}, {grid}", *(f"{e:.4f}" for e in errors)])
    return text


def draw(ours: dict, theirs: dict, path: Path) -> None:
    """Log–log: every solver on its best grid, and the best of each side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), sharey=True, sharex=True)
    sides = (("tfdiffusion", ours, "#1b4f8a"), ("diffusers", theirs, "#b3470f"))
    for axis, (title, errors, _) in zip(axes, sides):
        names = list(dict.fromkeys(name for name, _ in errors))
        for i, name in enumerate(names):
            lowest = np.min([e for (n, _), e in errors.items() if n == name], axis=0)
            style = ("-", "--", ":")[i // 5]
            label = name if errors is ours else THEIR_NAMES.get(name, name)
            axis.loglog(BUDGETS, lowest, style, color=f"C{i % 10}", label=label, lw=1.2)
        for who, of_side, colour in sides:
            front = [error for error, _ in best(of_side)]
            axis.loglog(BUDGETS, front, "o-", color=colour, lw=2.8, label=f"best of {who}")
        axis.set_title(f"{title}: each solver on its best grid")
        axis.set_xlabel("evaluations of the denoiser")
        axis.set_xticks(BUDGETS, [str(b) for b in BUDGETS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, ncols=2, loc="lower left")
    axes[0].set_ylabel("root mean square error")
    axes[0].set_ylim(3e-4, 1.0)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    diffusers.utils.logging.set_verbosity_error()
    problem = Problem()
    ours, theirs, same = measure(problem)
    text = table(ours, theirs, same)
    print(text)
    command = "Written by `python benchmarks/solvers.py`; what it is, stands there.\n\n"
    (HERE / "solvers.md").write_text("# Solvers\n\n" + command + text, encoding="utf-8")
    draw(ours, theirs, HERE.parent / "assets" / "solvers.png")


if __name__ == "__main__":
    main()
