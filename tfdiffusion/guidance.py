"""Guidance: wrappers that turn a denoiser into a denoiser."""

from __future__ import annotations

from keras import ops

from tfdiffusion import _checks
from tfdiffusion._backend import rows
from tfdiffusion.denoiser import Denoiser, NetworkDenoiser, check, check_labels


class ClassifierFreeGuidance(Denoiser):
    """Pushes away from what the image would be without its label.

    x̂_0 = s x̂_0(x_t, label) + (1 − s) x̂_0(x_t), and the same in ε̂, v or score, because x_t cancels.
    Scale s = 0 is the unconditional model, 1 the conditional one, above 1 sharper and less varied
    (Ho & Salimans 2022, arXiv:2207.12598, eq. 6, where w = s − 1).

    Both halves are one batch of 2B, so that a step costs one call of the network.

    Args:
        denoiser: a `NetworkDenoiser` with labels.
        label: int (B,) or scalar.
        scale: s, a number or float (B,).

    Raises:
        TypeError: If the denoiser is none.
        ValueError: If the network was made without `num_classes`, the labels are none of its own,
            or the scale is no finite number.
    """

    def __init__(self, denoiser: NetworkDenoiser, label, scale):
        if getattr(check(denoiser), "num_classes", None) is None:
            raise ValueError(
                "Guidance needs a model that was trained with labels. Received one with "
                "num_classes=None. Make it with num_classes=..., and train on (images, labels)."
            )
        check_labels(label, denoiser.num_classes)
        if not _checks.is_symbol(scale):
            _checks.array("scale", scale, "one number, or one a row")
        self.denoiser, self.label, self.scale = denoiser, label, scale
        self.process, self.latest = denoiser.process, denoiser.latest
        self.variables = denoiser.variables

    def __call__(self, x_t, t):
        """x̂_0, guided."""
        _checks.one_a_row(x_t, t=t, label=self.label, scale=self.scale)
        batch = ops.shape(x_t)[0]
        label = ops.broadcast_to(ops.cast(self.label, "int32"), (batch,))
        labels = ops.concatenate([label, ops.full_like(label, self.denoiser.num_classes)])
        times = ops.tile(ops.broadcast_to(ops.convert_to_tensor(t), (batch,)), (2,))
        both = self.denoiser(ops.concatenate([x_t, x_t]), times, labels)
        conditional, unconditional = both[:batch], both[batch:]
        scale = rows(self.scale, x_t)
        return scale * conditional + (1.0 - scale) * unconditional
