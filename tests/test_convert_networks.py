"""Networks of diffusers in Keras: outputs, gradients, folders, both ways."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")


import parity
import torch

torch.set_num_threads(1)


@pytest.mark.parametrize("name", parity.CONFIGURATIONS)
def test_outputs_and_gradients_agree(name):
    config = parity.CONFIGURATIONS[name]
    network = parity.theirs(config)
    converted = parity.ours(network)
    called = parity.inputs(config)
    assert parity.output_error(network, converted, called) <= 1e-5
    errors = parity.gradient_errors(network, converted, called)
    assert len(errors) > 4 and max(errors.values()) <= 1e-4
