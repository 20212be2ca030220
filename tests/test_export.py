"""The SavedModel against the model it came from, run where neither Keras nor tfdiffusion exists."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zlib
from types import SimpleNamespace

import keras
import numpy as np
import pytest

import tfdiffusion as tfd
from tfdiffusion import export, samplers, times
from tfdiffusion.denoiser import Threshold

on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="SavedModels are written by TensorFlow alone"
)

CLASSES, STEPS = 3, 4
SEEDS = np.array([7, -5, 2**40 + 3, 0, 123456789, 8, 9], dtype="int64")
LABELS = np.array([0, 1, 2, 3, 2, 1, 0], dtype="int32")  # 3: no label
GUIDANCE = np.array([1.0, 2.5, 0.0, 1.0, 3.0, 1.0, 1.0], dtype="float32")
REQUEST = {"seed": SEEDS, "label": LABELS, "guidance": GUIDANCE}
SHUFFLED, LABELLED = [4, 0, 2], [0, 1, 2, 4, 5, 6]

# Loads the SavedModel twice, and once more as TensorFlow Serving does: by a session that runs a
# signature's outputs. Answers requests from a file, errors as text.
CLIENT = """
import json, sys
sys.modules["keras"] = sys.modules["tf_keras"] = sys.modules["tfdiffusion"] = None
import numpy as np
import tensorflow as tf

for name in ("keras", "tfdiffusion"):
    try:
        __import__(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")

directory, requests, answers = sys.argv[1:]
arrays = np.load(requests)
jobs = json.loads(str(arrays["jobs"]))
loaded = [tf.saved_model.load(directory) for _ in range(2)]
graph = tf.Graph()
with graph.as_default():
    session = tf.compat.v1.Session()
    definition = tf.compat.v1.saved_model.load(session, ["serve"], directory).signature_def

def by_session(signature, inputs):
    signature = definition[signature]
    feed = {signature.inputs[name].name: value for name, value in inputs.items()}
    return session.run({k: v.name for k, v in signature.outputs.items()}, feed)

def by_function(loaded, signature, inputs):
    inputs = {name: tf.constant(value) for name, value in inputs.items()}
    return {k: v.numpy() for k, v in loaded.signatures[signature](**inputs).items()}

results = {"signatures": json.dumps({
    name: [sorted(function.structured_input_signature[1]), sorted(function.structured_outputs)]
    for name, function in loaded[0].signatures.items()
})}
for job, (runner, signature, names) in jobs.items():
    inputs = {name: arrays[f"{job}/{name}"] for name in names}
    try:
        if runner == "session":
            outputs = by_session(signature, inputs)
        else:
            outputs = by_function(loaded[int(runner)], signature, inputs)
        for name, value in outputs.items():
            # Padded as text, NumPy would drop the zero bytes that a file ends in.
            if value.dtype == object:
                value = np.array([item.hex() for item in value])
            results[f"{job}/{name}"] = value
    except (tf.errors.InvalidArgumentError, TypeError) as error:
        results[f"{job}/error"] = str(error)
np.savez(answers, **results)
"""


def randomize(model, seed):
    """Weights of a size that lets every layer matter; fresh networks say zero."""
    rng = np.random.default_rng(seed)
    for variable in model.network.trainable_variables:
        fan_in = max(int(np.prod(variable.shape[:-1])), 1) if len(variable.shape) > 1 else 25
        variable.assign(rng.normal(size=variable.shape) / fan_in**0.5)


def make(shape, sampling=None, **config):
    """A model with weights as loaded from elsewhere, never trained."""
    unet = {"out_channels": shape[-1], "widths": (8,), "groups": 4, "blocks_per_level": 1}
    # "v" keeps random networks in range, where "noise" is clipped to black and white.
    network = tfd.networks.UNet(**{**unet, **config})
    model = tfd.DiffusionModel(network, prediction="v", sampling=sampling)
    model.build((None, *shape))
    randomize(model, seed=0)
    return model


def train(model):
    """One update as far as the average can tell, which stays behind."""
    model.ema.reset()
    model.ema.updates.assign(1)
    randomize(model, seed=1)


def answers_to(directory, jobs, folder):
    """Runs {job: (runner, signature, inputs)} in a process of its own."""
    arrays = {
        f"{job}/{name}": a for job, (_, _, inputs) in jobs.items() for name, a in inputs.items()
    }
    listing = {job: (runner, sig, list(inputs)) for job, (runner, sig, inputs) in jobs.items()}
    np.savez(folder / "requests.npz", jobs=json.dumps(listing), **arrays)
    files = [str(directory), str(folder / "requests.npz"), str(folder / "answers.npz")]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, *files], capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "answers.npz"))


def rows(indices, **changes):
    return {**{name: values[indices] for name, values in REQUEST.items()}, **changes}


def messages():
    """tensorflow_serving/apis, as far as warm-up needs it, from its published field numbers."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="log.proto", package="s", syntax="proto3")
    fields = {
        "ModelSpec": [("name", 1, "string"), ("signature_name", 3, "string")],
        "PredictRequest": [("model_spec", 1, "ModelSpec"), ("inputs", 2, "InputsEntry")],
        "PredictLog": [("request", 1, "PredictRequest")],
        "PredictionLog": [("predict_log", 6, "PredictLog")],
    }
    entry = [("key", 1, "string"), ("value", 2, "bytes")]

    def add(message, listing):
        for name, number, kind in listing:
            field = message.field.add(name=name, number=number, label=kinds.LABEL_OPTIONAL)
            if kind in ("string", "bytes"):
                field.type = kinds.TYPE_STRING if kind == "string" else kinds.TYPE_BYTES
            else:
                field.type = kinds.TYPE_MESSAGE
                field.type_name = f".s.{'PredictRequest.' * (kind == 'InputsEntry')}{kind}"
                if kind == "InputsEntry":
                    field.label = kinds.LABEL_REPEATED

    for name, listing in fields.items():
        message = file.message_type.add(name=name)
        add(message, listing)
        if name == "PredictRequest":
            nested = message.nested_type.add(name="InputsEntry")
            nested.options.map_entry = True
            add(nested, entry)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("s.PredictionLog"))


def warm_up_requests(directory):
    """{signature: {input: array}} of a SavedModel's warm-up file."""
    import tensorflow as tf

    path = directory / "assets.extra" / "tf_serving_warmup_requests"
    requests = {}
    for record in tf.data.TFRecordDataset(str(path)):
        log = messages().FromString(record.numpy())
        request = log.predict_log.request
        assert request.model_spec.name
        tensor = tf.make_tensor_proto(0).__class__
        requests[request.model_spec.signature_name] = {
            name: tf.make_ndarray(tensor.FromString(value))
            for name, value in request.inputs.items()
        }
    return requests


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A conditional model, its export, and the answers of a process that only has TensorFlow."""
    folder = tmp_path_factory.mktemp("conditional")
    model = make((8, 8, 1), num_classes=CLASSES)
    train(model)
    directory = export.saved_model(model, folder / "deep" / "saved_model", steps=STEPS)
    x_t = np.random.default_rng(2).normal(size=(4, 8, 8, 1)).astype("float32")
    noisy = {"x_t": x_t, "t": np.float32([1.0, 0.5, 0.1, 0.7]), "label": LABELS[:4]}
    everything = rows(slice(None))
    jobs = {
        "all": ("0", "serving_default", everything),
        "again": ("0", "serving_default", everything),
        "reloaded": ("1", "serving_default", everything),
        "session": ("session", "serving_default", everything),
        "shuffled": ("0", "serving_default", rows(SHUFFLED)),
        "none": ("0", "serving_default", rows(slice(0, 0))),
        "float": ("0", "sample_float", everything),
        "float shuffled": ("0", "sample_float", rows(SHUFFLED)),
        "png": ("0", "sample_png", everything),
        "same steps": ("0", "sample_steps", rows(slice(None), num_steps=np.int32(STEPS))),
        "two steps": ("0", "sample_steps", rows(slice(None), num_steps=np.int32(2))),
        "denoised": ("0", "denoise", noisy),
        "bad label": ("0", "serving_default", rows([0], label=np.int32([CLASSES + 1]))),
        "bad label in a session": (
            "session",
            "serving_default",
            rows([0], label=np.int32([CLASSES + 1])),
        ),
        "negative label": ("0", "denoise", {**noisy, "label": np.int32([0, 0, -1, 0])}),
        "lengths": ("0", "serving_default", rows([0, 1], label=np.int32([0]))),
        "no steps": ("0", "sample_steps", rows([0], num_steps=np.int32(0))),
        "many steps": ("0", "sample_steps", rows([0], num_steps=np.int32(1001))),
    }
    for scale in (0, 1):
        request = rows([3], label=np.int32([1]), guidance=np.float32([scale]))
        jobs[f"guided by {scale}"] = ("0", "sample_float", request)
    jobs |= {f"float {i}": ("0", "sample_float", rows([i])) for i in range(len(SEEDS))}
    answers = answers_to(directory, jobs, folder)
    return SimpleNamespace(model=model, directory=directory, noisy=noisy, answers=answers)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """In mixed precision, with channels no PNG has, on its own grid, batched, as if it were big."""
    folder = tmp_path_factory.mktemp("unconditional")
    config = {"widths": (4,), "groups": 2, "mid_attention": False, "dtype": "mixed_bfloat16"}
    model = make((4, 4, 2), **config)
    grid = [1.0, 0.6, 0.2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_MOST_CONSTANT_BYTES", 0)
        directory = export.saved_model(
            model, folder / "saved_model", grid=grid, sampler="ddpm", batch_invariant=False
        )
    jobs = {"all": ("0", "sample_float", {"seed": SEEDS})}
    warm_up = warm_up_requests(directory)
    jobs |= {f"warm-up {name}": ("session", name, inputs) for name, inputs in warm_up.items()}
    answers = answers_to(directory, jobs, folder)
    return SimpleNamespace(model=model, directory=directory, grid=grid, answers=answers)


def samples(model, **arguments):
    """`model.sample` of the rows that have a label."""
    request = {"label": LABELS[LABELLED], "guidance": GUIDANCE[LABELLED]}
    return model.sample(len(LABELLED), seeds=SEEDS[LABELLED], **request, **arguments)


def stored(directory):
    """Sizes of the variables of a SavedModel."""
    import tensorflow as tf

    names = tf.train.list_variables(str(directory / "variables" / "variables"))
    return [int(np.prod(shape)) for name, shape in names if "CHECKPOINTABLE" not in name]


def pixels(images):
    return np.clip(np.rint((np.asarray(images, "float64") + 1.0) * 127.5), 0, 255)


@on_tensorflow
class TestConditional:
    def test_signatures(self, conditional):
        drawn = sorted(REQUEST)
        assert json.loads(str(conditional.answers["signatures"])) == {
            "serving_default": [drawn, ["images"]],
            "sample_float": [drawn, ["images"]],
            "sample_png": [drawn, ["image_bytes"]],
            "sample_steps": [sorted([*drawn, "num_steps"]), ["images"]],
            "denoise": [["label", "t", "x_t"], ["x_0"]],
        }

    def test_types_and_shapes(self, conditional):
        answers = conditional.answers
        assert answers["all/images"].dtype == np.uint8
        assert answers["float/images"].dtype == np.float32
        assert answers["all/images"].shape == answers["float/images"].shape == (7, 8, 8, 1)
        assert answers["none/images"].shape == (0, 8, 8, 1)
        # The rest of this file would hold for a constant image, too.
        assert answers["float/images"].std() > 0.1
        assert np.mean(np.abs(answers["float/images"]) < 0.99) > 0.2  # nor clipped throughout
        assert len({image.tobytes() for image in answers["all/images"]}) == len(SEEDS)

    @pytest.mark.parametrize("other", ["again", "reloaded", "session", "same steps"])
    def test_the_same_request_gives_the_same_bytes(self, conditional, other):
        images = conditional.answers["all/images"]
        np.testing.assert_array_equal(conditional.answers[f"{other}/images"], images)

    def test_a_row_gives_the_same_bits_alone_and_in_any_batch(self, conditional):
        images = conditional.answers["float/images"]
        alone = [conditional.answers[f"float {i}/images"] for i in range(len(SEEDS))]
        np.testing.assert_array_equal(np.concatenate(alone), images)
        np.testing.assert_array_equal(
            conditional.answers["float shuffled/images"], images[SHUFFLED]
        )
        shuffled = conditional.answers["shuffled/images"]
        np.testing.assert_array_equal(shuffled, conditional.answers["all/images"][SHUFFLED])

    def test_pixels_are_the_rounded_floats(self, conditional):
        expected = pixels(conditional.answers["float/images"])
        np.testing.assert_array_equal(conditional.answers["all/images"], expected)

    def test_equals_the_model_and_its_average(self, conditional):
        images = conditional.answers["float/images"][LABELLED]
        expected = samples(conditional.model, steps=STEPS)
        np.testing.assert_allclose(images, expected, atol=1e-4)
        difference = conditional.answers["all/images"][LABELLED] - pixels(expected)
        assert np.abs(difference).max() <= 1
        assert np.abs(images - samples(conditional.model, steps=STEPS, ema=False)).max() > 0.1

    def test_without_a_label_or_guidance(self, conditional):
        """Guidance 0 is the unconditional model, which is also what the null label asks for."""
        images = conditional.answers["float/images"]
        np.testing.assert_allclose(
            conditional.answers["guided by 0/images"][0], images[3], atol=1e-4
        )
        assert np.abs(conditional.answers["guided by 1/images"][0] - images[3]).max() > 0.01

    def test_num_steps(self, conditional):
        expected = pixels(samples(conditional.model, steps=2))
        assert np.abs(conditional.answers["two steps/images"][LABELLED] - expected).max() <= 1
        assert np.abs(conditional.answers["all/images"][LABELLED] - expected).max() > 1

    def test_png_files_hold_the_pixels(self, conditional):
        files = [bytes.fromhex(text) for text in conditional.answers["png/image_bytes"]]
        for file, image in zip(files, conditional.answers["all/images"], strict=True):
            np.testing.assert_array_equal(read_png(file), image)

    def test_denoise_is_the_denoiser(self, conditional):
        expected = conditional.model.denoiser()(*conditional.noisy.values())
        x_0 = conditional.answers["denoised/x_0"]
        expected = keras.ops.convert_to_numpy(expected)
        np.testing.assert_allclose(x_0, expected, rtol=1e-4, atol=1e-4)
        assert np.abs(x_0).max() > 1.0  # not clipped

    def test_only_the_average_is_stored_and_once(self, conditional, unconditional):
        """As constants; of a big network as variables."""
        size = 4 * conditional.model.network.count_params()
        file = (conditional.directory / "saved_model.pb").read_bytes()
        assert stored(conditional.directory) == [] and len(file) > size
        kernels = [pair for pair in conditional.model.ema.pairs() if len(pair[0].shape) == 4]
        assert len(kernels) > 3
        for raw, average in kernels:
            assert keras.ops.convert_to_numpy(raw).tobytes() not in file
            assert file.count(keras.ops.convert_to_numpy(average).tobytes()) == 1

        sizes = stored(unconditional.directory)
        assert sum(sizes) == unconditional.model.network.count_params()
        values = unconditional.directory / "variables" / "variables.data-00000-of-00001"
        assert values.stat().st_size < 1.5 * 4 * sum(sizes) + 10_000

    def test_no_sum_can_be_fused_with_what_it_adds(self, conditional, unconditional):
        """TensorFlow's fused kernels crash, or mix rows up, where two rows run at once."""
        from tensorflow.core.protobuf import saved_model_pb2

        sums, apart = ("Add", "AddV2", "AddN"), 0
        for export_ in (conditional, unconditional):
            model = saved_model_pb2.SavedModel()
            model.ParseFromString((export_.directory / "saved_model.pb").read_bytes())
            for function in model.meta_graphs[0].graph_def.library.function:
                operations = {node.name: node.op for node in function.node_def}
                for node in function.node_def:
                    inputs = [operations.get(name.split(":")[0]) for name in node.input]
                    if node.op in sums:
                        assert "BiasAdd" not in inputs, (function.signature.name, node.name)
                        apart += "EnsureShape" in inputs
        assert apart > 10

    @pytest.mark.parametrize(
        "job, message",
        [
            ("bad label", "label must lie between 0 and 2, or be 3"),
            ("bad label in a session", "label must lie between 0 and 2, or be 3"),
            ("negative label", "label must lie between 0 and 2, or be 3"),
            ("lengths", "seed, label, guidance must have one entry a sample"),
            ("no steps", "num_steps must lie between 1 and 1000"),
            ("many steps", "num_steps must lie between 1 and 1000"),
        ],
    )
    def test_bad_requests_are_refused(self, conditional, job, message):
        assert message in str(conditional.answers[f"{job}/error"])

    def test_warm_up(self, conditional):
        """One request for each signature, of one sample; a request that works is replayed below."""
        requests = warm_up_requests(conditional.directory)
        signatures = json.loads(str(conditional.answers["signatures"]))
        assert {name: sorted(inputs) for name, inputs in requests.items()} == {
            name: inputs for name, (inputs, _) in signatures.items()
        }
        types = {"x_t": "float32", "t": "float32", "guidance": "float32", "seed": "int64"}
        for inputs in requests.values():
            for name, value in inputs.items():
                assert value.dtype == types.get(name, "int32")
                assert value.shape == {"x_t": (1, 8, 8, 1), "num_steps": ()}.get(name, (1,))


@on_tensorflow
class TestUnconditional:
    def test_signatures(self, unconditional):
        signatures = json.loads(str(unconditional.answers["signatures"]))
        assert signatures == {
            "serving_default": [["seed"], ["images"]],
            "sample_float": [["seed"], ["images"]],
            "denoise": [["t", "x_t"], ["x_0"]],
        }

    def test_warm_up_requests_are_answered(self, unconditional):
        for name, output in (("serving_default", "images"), ("denoise", "x_0")):
            assert unconditional.answers[f"warm-up {name}/{output}"].shape == (1, 4, 4, 2)

    def test_equals_the_model(self, unconditional):
        model, grid = unconditional.model, unconditional.grid
        expected = model.sample(len(SEEDS), seeds=SEEDS, sampler="ddpm", grid=grid)
        # The network rounds to bfloat16, whose unit is 2⁻⁸.
        np.testing.assert_allclose(unconditional.answers["all/images"], expected, atol=0.05)
        assert expected.std() > 0.1


@on_tensorflow
@pytest.mark.parametrize(
    "sampler, grid", [("dpmpp_2m", "optimized"), ("heun", "karras"), ("rk45", "uniform")]
)
def test_any_sampler_and_grid(sampler, grid, tmp_path):
    """With its history, its stages, its own steps: the same images, whoever runs it."""
    import tensorflow as tf

    model = make((4, 4, 2), widths=(4,), groups=2, mid_attention=False)
    directory = export.saved_model(
        model, tmp_path / "out", sampler=sampler, grid=grid, steps=4, batch_invariant=False
    )
    signatures = tf.saved_model.load(directory).signatures
    expected = model.sample(len(SEEDS), seeds=SEEDS, sampler=sampler, grid=grid, steps=4)
    answer = signatures["sample_float"](seed=tf.constant(SEEDS))["images"]
    np.testing.assert_allclose(answer.numpy(), expected, atol=2e-3)
    assert expected.std() > 0.1
    expected = model.sample(2, seeds=SEEDS[:2], sampler=sampler, grid=grid, steps=6)
    requested = {"seed": tf.constant(SEEDS[:2]), "num_steps": tf.constant(6)}
    pixels = signatures["sample_steps"](**requested)["images"].numpy()
    assert np.abs(pixels - (expected + 1.0) * 127.5).max() < 1.0


def read_png(file):
    """Decodes by another library than the one that encoded."""
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(file))
    image.load()
    assert image.format == "PNG"
    return np.asarray(image).reshape(image.height, image.width, -1)


@on_tensorflow
def test_a_model_s_own_sampling_is_exported(tmp_path):
    """Sampler, grid, steps and threshold; also a run that ends in a state, not denoised."""
    import tensorflow as tf

    grid = times.Timesteps("leading", offset=1, until_first=True)
    own = samplers.Sampling(samplers.PLMS(4, "trapezoid"), grid, 5, Threshold(0.8))
    model = make((4, 4, 2), widths=(4,), groups=2, mid_attention=False, sampling=own)
    directory = export.saved_model(model, tmp_path / "out", batch_invariant=False)
    signatures = tf.saved_model.load(directory).signatures
    expected = model.sample(len(SEEDS), seeds=SEEDS)
    answer = signatures["sample_float"](seed=tf.constant(SEEDS))["images"]
    np.testing.assert_allclose(answer.numpy(), expected, atol=2e-3)
    assert expected.std() > 0.1
    requested = {"seed": tf.constant(SEEDS[:2]), "num_steps": tf.constant(7)}
    pixels = signatures["sample_steps"](**requested)["images"].numpy()
    expected = np.clip(model.sample(2, seeds=SEEDS[:2], steps=7), -1, 1)
    assert np.abs(pixels - (expected + 1.0) * 127.5).max() < 1.0
    # What is asked for comes first.
    named = {"sampler": "ddim", "grid": "uniform", "steps": 2}
    directory = export.saved_model(model, tmp_path / "other", batch_invariant=False, **named)
    answer = tf.saved_model.load(directory).signatures["sample_float"](seed=tf.constant(SEEDS))
    expected = model.sample(len(SEEDS), seeds=SEEDS, **named)
    np.testing.assert_allclose(answer["images"].numpy(), expected, atol=2e-3)


@on_tensorflow
def test_points_are_samples_and_no_images(tmp_path):
    import tensorflow as tf

    model = tfd.DiffusionModel(tfd.networks.MLP(width=8, depth=1))
    model.build((None, 2))
    randomize(model, seed=0)
    shipped = model.averaged()  # has no average beside its weights
    directory = export.saved_model(shipped, tmp_path / "points", steps=2, threshold=None)
    signatures = tf.saved_model.load(str(directory)).signatures
    assert sorted(signatures) == ["denoise", "sample_float", "sample_steps", "serving_default"]
    points = signatures["serving_default"](seed=tf.constant(SEEDS))["samples"]
    expected = model.sample(len(SEEDS), seeds=SEEDS, steps=2, threshold=None)
    np.testing.assert_allclose(points, expected, rtol=1e-4, atol=1e-4)


class StubGraph:
    """Writes a SavedModel without a network in it."""

    variables = ()
    signatures = None

    def __init__(self, *args):
        pass

    def examples(self):
        return {}


@pytest.fixture
def model():
    return make((4, 4, 1), widths=(4,), groups=2, mid_attention=False)


@on_tensorflow
def test_overwrites_only_what_it_may(tmp_path, monkeypatch, model):
    monkeypatch.setattr(export, "_Graph", StubGraph)
    directory = tmp_path / "saved_model"
    directory.mkdir()
    assert export.saved_model(model, str(directory)) == directory  # an empty folder will do
    (directory / "mark").touch()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export.saved_model(model, directory)
    assert (directory / "mark").exists()
    export.saved_model(model, directory, overwrite=True)
    assert (directory / "saved_model.pb").exists() and not (directory / "mark").exists()

    other = tmp_path / "photographs"
    other.mkdir()
    (other / "cat.jpg").touch()
    for taken in (other, other / "cat.jpg"):
        with pytest.raises(FileExistsError, match="not a SavedModel"):
            export.saved_model(model, taken, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photographs", "saved_model"]


@on_tensorflow
def test_a_failure_leaves_nothing_half_done(tmp_path, monkeypatch, model):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(export, "_Graph", StubGraph)
    directory = export.saved_model(model, tmp_path / "saved_model")
    before = zlib.crc32((directory / "saved_model.pb").read_bytes())
    monkeypatch.setattr(export, "_write_warm_up", fail)
    with pytest.raises(OSError, match="disk full"):
        export.saved_model(model, directory, overwrite=True)
    assert zlib.crc32((directory / "saved_model.pb").read_bytes()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["saved_model"]


@on_tensorflow
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0}, "steps must be an integer >= 1"),
        ({"steps": 1001}, "steps=1001 exceeds the 1000"),
        ({"sampler": "ddimm"}, "Did you mean 'ddim'"),
        ({"grid": "unifrom"}, "Did you mean 'uniform'"),
        ({"grid": [0.5, 0.7]}, "must fall strictly"),
        ({"threshold": "clp"}, "Did you mean 'clip'"),
    ],
)
def test_bad_arguments(tmp_path, model, arguments, message):
    with pytest.raises(ValueError, match=message):
        export.saved_model(model, tmp_path / "saved_model", **arguments)
    assert not list(tmp_path.iterdir())


@on_tensorflow
def test_models_that_cannot_be_exported(tmp_path):
    with pytest.raises(TypeError, match="Received a UNet"):
        export.saved_model(tfd.networks.UNet(out_channels=1), tmp_path / "saved_model")
    model = tfd.DiffusionModel(tfd.networks.UNet(out_channels=1, widths=(4,), groups=2))
    with pytest.raises(ValueError, match="call fit"):
        export.saved_model(model, tmp_path / "saved_model")
    model.build((None, None, None, 1))
    with pytest.raises(ValueError, match="height, width and channels"):
        export.saved_model(model, tmp_path / "saved_model")


def test_other_backends_are_told_the_way(tmp_path, monkeypatch, model):
    monkeypatch.setattr("tfdiffusion._backend.BACKEND", "jax")
    with pytest.raises(RuntimeError, match=r"model\.keras.*KERAS_BACKEND=tensorflow"):
        export.saved_model(model, tmp_path / "saved_model")
