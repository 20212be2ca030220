"""What every test starts from."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest


@pytest.fixture(autouse=True)
def _seeded():
    """Initial weights, and whatever else draws from a global generator, are those of seed 0."""
    keras.utils.set_random_seed(0)
