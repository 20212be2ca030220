"""Several devices, on the engines that Keras has: two logical ones of this machine stand for them.

Each check needs devices that exist before TensorFlow or JAX start, so it runs in its own process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import tfdiffusion  # noqa: F401  (registers what a saved model holds)

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"
on_tensorflow = pytest.mark.skipif(not ON_TENSORFLOW, reason="a strategy of TensorFlow's")
on_jax = pytest.mark.skipif(ON_TENSORFLOW, reason="a distribution of JAX's")

COMMON = """
import json, sys
import keras
import numpy as np
import tfdiffusion as tfd

def data(num=64):
    rng = np.random.default_rng(0)
    return rng.normal(0.3, 0.5, (num, 2)).astype("float32"), np.arange(num) % 3

def made(rate=0.01):
    keras.utils.set_random_seed(0)
    network = tfd.networks.MLP(width=8, depth=1, num_classes=3)
    model = tfd.DiffusionModel(network, prediction="v", ema_decay=0.9)
    model.compile(keras.optimizers.SGD(rate))
    return model

def fit(model, epochs=2, **arguments):
    x, y = data()
    return model.fit(x, y, batch_size=16, epochs=epochs, verbose=0, shuffle=False, **arguments)

def told(model, history):
    return {
        "losses": history.history["loss"],
        "val_loss": history.history.get("val_loss"),
        "steps": model.steps_done,
        "updates": int(keras.ops.convert_to_numpy(keras.ops.add(model.ema.updates.value, 0))),
    }
"""

MIRRORED = (
    """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(cpu, two)
"""
    + COMMON
    + """
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = made()
results = told(model, fit(model, validation_data=data()))
model.save(sys.argv[1] + "/model.keras")

# The same rows on both replicas: only the noise can make their losses differ.
rows = strategy.experimental_distribute_values_from_function(lambda context: tf.zeros((4, 2)))
labels = strategy.experimental_distribute_values_from_function(lambda context: tf.zeros(4, "int32"))
losses = strategy.run(tf.function(lambda *data: model.mean_loss(data)), args=(rows, labels))
results["replicas"] = [float(v) for v in strategy.experimental_local_results(losses)]

with strategy.scope():
    constant = made(rate=0.0)
results["constant"] = fit(constant, epochs=15).history["loss"]
print(json.dumps(results))
"""
)

WORKER = (
    """
import os, sys
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
"""
    + COMMON
    + """
x, y = data()
dataset = tf.data.Dataset.from_tensor_slices((x, y)).repeat().batch(16)
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
with strategy.scope():
    model = made()
history = model.fit(
    dataset.with_options(options), epochs=2, steps_per_epoch=4, verbose=0, shuffle=False
)
results = told(model, history)
results["replicas"] = strategy.num_replicas_in_sync
results["weights"] = [float(np.sum(keras.ops.convert_to_numpy(w))) for w in model.network.weights]
print(json.dumps(results))
"""
)

DATA_PARALLEL = (
    COMMON
    + """
one = told(*((model := made()), fit(model, validation_data=data())))
devices = keras.distribution.list_devices()
keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
model = made()
results = told(model, fit(model, validation_data=data()))
model.save(sys.argv[1] + "/model.keras")
print(json.dumps({"devices": len(devices), "one": one, **results}))
"""
)

PROCESS = (
    """
import os
import keras
keras.distribution.initialize(os.environ["COORDINATOR"], 2, int(os.environ["RANK"]))
"""
    + COMMON
    + """
import jax
keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
model = made()
# Each process reads its half of every batch of 16.
x, y = (part.reshape(4, 2, 8, -1)[:, jax.process_index()] for part in data())
history = model.fit(
    x.reshape(-1, 2), y.reshape(-1), batch_size=8, epochs=2, verbose=0, shuffle=False
)
results = told(model, history)
name = "model" if jax.process_index() == 0 else "copy"  # all save, as reading the weights is joint
model.save(f"{sys.argv[1]}/{name}.keras")
results["weights"] = [float(np.sum(keras.ops.convert_to_numpy(w))) for w in model.network.weights]
print(json.dumps({"devices": jax.device_count(), "local": jax.local_device_count(), **results}))
"""
)


def free_addresses(count):
    """Loopback addresses with ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{listener.getsockname()[1]}" for listener in sockets]


def start(script, folder, **environment):
    root = str(Path(__file__).parents[1])
    inherited = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path[:1]])}
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder)],
        env={**inherited, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process):
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.splitlines()[-1])


def goes_on_alone(folder, steps):
    """A model that two devices trained is resumed by this process, on one."""
    model = keras.models.load_model(folder / "model.keras")
    assert model.steps_done == steps
    x = np.zeros((16, 2), "float32")
    model.fit(x, np.zeros(16, int), batch_size=16, verbose=0)
    assert model.steps_done == steps + 1
    assert int(keras.ops.convert_to_numpy(model.ema.updates)) == steps + 1
    assert np.isfinite(model.sample(2, label=0, steps=2)).all()


@on_tensorflow
def test_a_mirrored_strategy(tmp_path):
    results = result(start(MIRRORED, tmp_path))
    assert results["steps"] == results["updates"] == 8  # once per global batch, not per replica
    assert np.isfinite(results["losses"]).all() and np.isfinite(results["val_loss"]).all()
    first, second = results["replicas"]
    assert abs(first - second) > 1e-3
    goes_on_alone(tmp_path, 8)
    # With constant weights the loss of every step has one expectation, on any number of devices.
    namespace = {}
    exec(COMMON, namespace)
    alone = namespace["fit"](namespace["made"](rate=0.0), epochs=15).history["loss"]
    error = np.hypot(*(np.std(x, ddof=1) / np.sqrt(len(x)) for x in (alone, results["constant"])))
    assert abs(np.mean(alone) - np.mean(results["constant"])) < 4 * error
    assert error < 0.2 * np.mean(alone)


@on_tensorflow
def test_several_workers(tmp_path):
    """Two processes that talk over the loopback interface end with the same weights."""
    addresses = free_addresses(2)
    workers = [
        start(
            WORKER,
            tmp_path,
            TF_CONFIG=json.dumps(
                {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            ),
        )
        for index in range(2)
    ]
    first, second = (result(worker) for worker in workers)
    assert first["replicas"] == second["replicas"] == 2
    assert first["steps"] == first["updates"] == 8
    np.testing.assert_allclose(first["weights"], second["weights"], rtol=1e-5)
    assert np.isfinite(np.ravel(first["losses"])).all()


@on_jax
def test_data_parallel(tmp_path):
    """Every row has its own noise, so the losses are those of one device, not only on average."""
    flags = "--xla_force_host_platform_device_count=2"
    results = result(start(DATA_PARALLEL, tmp_path, XLA_FLAGS=flags))
    assert results["devices"] == 2
    assert results["steps"] == results["updates"] == 8
    for name in ("losses", "val_loss"):
        np.testing.assert_allclose(results[name], results["one"][name], rtol=1e-5)
    goes_on_alone(tmp_path, 8)


@on_jax
def test_data_parallel_over_processes(tmp_path):
    """Two processes with half of each batch end where one with all of it does."""
    (coordinator,) = free_addresses(1)
    processes = [
        start(PROCESS, tmp_path, COORDINATOR=coordinator, RANK=str(rank)) for rank in range(2)
    ]
    first, second = (result(process) for process in processes)
    assert first["devices"] == 2 and first["local"] == 1
    assert first["steps"] == first["updates"] == 8
    assert first == second
    namespace = {}
    exec(COMMON, namespace)
    alone = namespace["made"]()
    losses = namespace["fit"](alone).history["loss"]
    np.testing.assert_allclose(first["losses"], losses, rtol=1e-5)
    sums = [float(np.sum(keras.ops.convert_to_numpy(w))) for w in alone.network.weights]
    np.testing.assert_allclose(first["weights"], sums, rtol=1e-4, atol=1e-5)
    goes_on_alone(tmp_path, 8)
