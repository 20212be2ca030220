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
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "unipc_2": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc_3": ("UniPCMultistepScheduler", {"solver_order": 3}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 3}),
}
# Their Karras levels end where the trailing grid does, ours at the last level of the chain.
OTHER_ENDS = {(name, "karras") for name in ("dpm_solver_1", "heun", "lms")}
NOTES = """
Trailing grids are the same to the last digit, but for three of diffusers': `DDIMScheduler` steps by
1000 // N, off its own grid where N does not divide 1000 (6, 12, 15); `PNDMScheduler` asks twice at
its first step and so has one time less; `DEISMultistepScheduler` ends at σ = 0.01, one step of
order 1 away from the data (and of order 3 from 15 steps on, which is where it fails). In Karras and
log-SNR grids diffusers' timesteps are rounded, and so are ours, not always to the same side.
"""
# What has no counterpart on the other side.
ONLY_OURS = ("euler", "rk4", "dpm_solver_2", "dpm_solver_3")
ONLY_THEIRS = {
    "DPM-Solver++ 2S": ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    "DPM-Solver++ 3S": ("DPMSolverSinglestepScheduler", {"solver_order": 3}),
    "KDPM2": ("KDPM2DiscreteScheduler", {}),
}
THEIR_NAMES = {
    "ddim": "DDIM",
    "dpm_solver_1": "Euler",
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


class Problem:
    """The mixture, its noise, and where the flow takes it."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.means = rng.uniform(-1, 1, (10, DIMENSION))
        self.variances = rng.uniform(0.05, 0.3, 10) ** 2
        self.weights = rng.dirichlet(3.0 * np.ones(10))
        self.denoiser = tfd.exact.GaussianMixture(
            self.means, self.variances, self.weights, process="linear"
        )
        alphas_bar = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
        self.alpha_end = np.sqrt(alphas_bar[-1])
        self.log_levels = 0.5 * np.log(1.0 / alphas_bar - 1.0)  # ln(σ/α)
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

    def epsilon(self, x_t, timestep: float):
        """ε̂ at a 0-based timestep, also between two."""
        level = np.exp(np.interp(timestep, np.arange(1000), self.log_levels))
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
        """Error of one of our samplers with at most so many evaluations."""
        sampler = samplers.get(name)
        steps = (budget - 1) // sampler.evaluations + 1
        times = resolve_grid(self.denoiser, OUR_GRIDS[grid], steps, sampler)
        if name not in self.runs:
            keys = tfd.random.keys(range(COUNT))
            self.runs[name] = _backend.compiled(
                lambda times, x: integrate(self.denoiser, sampler, times, keys, x), ()
            )
        return self.error(self.runs[name](times, self.noise.astype("float32")))

    def theirs(self, kind: str, arguments: dict, budget: int) -> float:
        """Error of one of diffusers' schedulers with at most so many evaluations."""
        make = getattr(diffusers, kind)
        scheduler = make(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, **arguments)
        for steps in range(budget, 1, -1):
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) <= budget:
                break
        x = torch.tensor(self.noise)
        if float(scheduler.init_noise_sigma) != 1.0:  # its state is x/α
            x = x / self.alpha_end
        for timestep in scheduler.timesteps:
            x_t = scheduler.scale_model_input(x, timestep).numpy()
            epsilon = torch.tensor(self.epsilon(x_t, float(timestep)))
            x = scheduler.step(epsilon, timestep, x).prev_sample
        return self.error(x)


def measure(problem: Problem) -> tuple[dict, dict]:
    """(ours, theirs): (name, grid) → errors at the budgets."""
    ours = {
        (name, grid): [problem.ours(name, grid, budget) for budget in BUDGETS]
        for name in (*SHARED, *ONLY_OURS)
        for grid in OUR_GRIDS
    }
    theirs = {}
    for name, (kind, arguments) in {**SHARED, **ONLY_THEIRS}.items():
        known = set(getattr(diffusers, kind)().config)
        for grid, more in THEIR_GRIDS.items():
            if grid != "trailing" and not set(more) <= known:
                continue
            kept = {key: value for key, value in more.items() if key in known}
            errors = [problem.theirs(kind, {**arguments, **kept}, budget) for budget in BUDGETS]
            theirs[name, grid] = errors
    return ours, theirs


def row(cells) -> str:
    return "| " + " | ".join(cells) + " |\n"


def best(errors: dict) -> list[tuple[float, str]]:
    """(error, who) at each budget."""
    return [min((e[i], f"{n}, {g}") for (n, g), e in errors.items()) for i in range(len(BUDGETS))]


def table(ours: dict, theirs: dict) -> str:
    """Markdown: the best of each side, the same names on the same grids, all of the rest."""
    head = row(["", *map(str, BUDGETS)]) + row(["---"] * (len(BUDGETS) + 1))
    text = "## The best of each, by number of evaluations\n\n" + head
    for who, errors in (("tfdiffusion", ours), ("diffusers", theirs)):
        text += row([who, *(f"{e:.4f} ({n})" for e, n in best(errors))])
    text += "\n## The same name on the same grid: ours, diffusers'\n\n" + head
    same = [key for key in ours if key in theirs and key not in OTHER_ENDS]
    for name, grid in same:
        pairs = zip(ours[name, grid], theirs[name, grid])
        text += row([f"{name}, {grid}", *(f"{a:.4f}, {b:.4f}" for a, b in pairs)])
    text += NOTES
    text += "\n## The others\n\n" + head
    for who, side in (("", ours), ("diffusers ", theirs)):
        for (name, grid), errors in side.items():
            if (name, grid) not in same:
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
    ours, theirs = measure(problem)
    text = table(ours, theirs)
    print(text)
    command = "Written by `python benchmarks/solvers.py`; what it is, stands there.\n\n"
    (HERE / "solvers.md").write_text("# Solvers\n\n" + command + text, encoding="utf-8")
    draw(ours, theirs, HERE.parent / "assets" / "solvers.png")


if __name__ == "__main__":
    main()
