"""How images are drawn unless one says otherwise; see the README's section on solvers for why."""

SAMPLER = "dpmpp_2m"
GRID = "karras"
STEPS = 10
