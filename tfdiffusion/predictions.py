"""What the network regresses, as a row (a, b): y = a · x_0 + b · ε.

With x_t = α x_0 + σ ε, two linear equations in two unknowns: one solve inverts every prediction,

    x̂_0 = (σ y − b x_t) / (a σ − b α),

and an error Δy of the network is an error Δx_0 = σ Δy / (a σ − b α) of the denoised image. The
optimum is the same for all of them; the weight that the loss gives to each noise level is not.

| name  | a                     | b                     | source                              |
|-------|-----------------------|-----------------------|-------------------------------------|
| clean | 1                     | 0                     | Ho et al. 2020, arXiv:2006.11239    |
| noise | 0                     | 1                     | Ho et al. 2020, eq. 14              |
| v     | −σ                    | α                     | Salimans & Ho 2022, arXiv:2202.00512|
| flow  | −1                    | 1                     | Liu et al. 2022, arXiv:2209.03003   |
| score | 0                     | −1/σ                  | Song et al. 2021, arXiv:2011.13456  |
| edm   | σ / (σ_d n)           | −α σ_d / n            | Karras et al. 2022, arXiv:2206.00364|

with n = √(α² σ_d² + σ²) and σ_d the standard deviation of the data. `noise` and `score` hold no
information about x_0 where α = 0, so a process that ends there cannot start sampling from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tfdiffusion import _checks, _names


@dataclass(frozen=True)
class Prediction:
    """A row (a, b) as a function of α, σ and the data's standard deviation.

    Attributes:
        name: its name in the table above.
        row: (alpha, sigma, sigma_data) -> (a, b).
        singular: whether a(α=0) = 0, so that x_0 cannot be solved for where α = 0.
    """

    name: str
    row: Callable
    singular: bool = False

    def determinant(self, alpha, sigma, sigma_data=1.0):
        """a σ − b α: how strongly y depends on x_0 once x_t is known."""
        a, b = self.row(alpha, sigma, sigma_data)
        return a * sigma - b * alpha

    def target(self, x_0, noise, alpha, sigma, sigma_data=1.0):
        """y = a x_0 + b ε; the coefficients must broadcast against x_0.

        Raises:
            ValueError: If these are no numbers, or x_0 and ε differ in shape.
        """
        _checks.alike(x_0=x_0, noise=noise)
        _checks.real(alpha=alpha, sigma=sigma, sigma_data=sigma_data)
        a, b = self.row(alpha, sigma, sigma_data)
        return a * x_0 + b * noise

    def clean(self, y, x_t, alpha, sigma, sigma_data=1.0):
        """x̂_0 = (σ y − b x_t) / (a σ − b α).

        Raises:
            ValueError: If these are no numbers, or y and x_t differ in shape.
        """
        _checks.alike(y=y, x_t=x_t)
        _checks.real(alpha=alpha, sigma=sigma, sigma_data=sigma_data)
        _, b = self.row(alpha, sigma, sigma_data)
        return (sigma * y - b * x_t) / self.determinant(alpha, sigma, sigma_data)


def _edm_row(alpha, sigma, sigma_data):
    norm = (alpha**2 * sigma_data**2 + sigma**2) ** 0.5
    return sigma / (sigma_data * norm), -alpha * sigma_data / norm


_PREDICTIONS = {
    prediction.name: prediction
    for prediction in (
        Prediction("clean", lambda alpha, sigma, sigma_data: (1.0, 0.0)),
        Prediction("noise", lambda alpha, sigma, sigma_data: (0.0, 1.0), singular=True),
        Prediction("v", lambda alpha, sigma, sigma_data: (-sigma, alpha)),
        Prediction("flow", lambda alpha, sigma, sigma_data: (-1.0, 1.0)),
        Prediction("score", lambda alpha, sigma, sigma_data: (0.0, -1.0 / sigma), singular=True),
        Prediction("edm", _edm_row),
    )
}


def names() -> list[str]:
    """Names that `get` knows."""
    return list(_PREDICTIONS)


def get(prediction: str | Prediction) -> Prediction:
    """Looks a prediction up by name; a `Prediction` is returned as it is.

    Raises:
        ValueError: If the name is unknown; the message lists the known ones.
    """
    if isinstance(prediction, Prediction):
        return prediction
    return _names.look_up("prediction", prediction, _PREDICTIONS)
