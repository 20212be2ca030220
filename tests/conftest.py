"""What every test starts from."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# At these sizes compilers take longer than they save. What TensorFlow runs in a process of its own
# (serving, several workers) is optimized as ever.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import keras
import pytest

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """On JAX, tests that its compiler takes a minute for are among the slow ones."""
    for item in items:
        if keras.backend.backend() == "jax" and item.get_closest_marker("slow_on_jax"):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seeded():
    """Initial weights, and whatever else draws from a global generator, are those of seed 0."""
    keras.utils.set_random_seed(0)
