"""The package as a whole: which room imports which, what an import brings along, the metadata."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tfdiffusion"

# Which rooms a room may import anywhere, also inside functions. `_checks`, `_names`, `_states` and
# `random` know nothing of diffusion, `_backend` only Keras; they are open to all.
COMMON = {"_backend", "_checks", "_defaults", "_names", "_states", "random"}
TABLE = {
    "_backend": set(),
    "_checks": set(),
    "_defaults": set(),
    "_names": set(),
    "_states": set(),
    "random": set(),
    "processes": set(),
    "predictions": set(),
    "_grid_search": set(),
    "times": {"_grid_search", "processes"},
    "weights": {"processes"},
    "networks": set(),
    "denoiser": {"processes", "predictions"},
    "guidance": {"denoiser"},
    "samplers": {"denoiser", "processes", "times"},
    "fitting": {"denoiser", "processes", "times"},
    "training": {
        "denoiser",
        "fitting",
        "guidance",
        "predictions",
        "processes",
        "samplers",
        "times",
        "weights",
    },
    "exact": {"denoiser", "processes"},
    "likelihood": {"denoiser", "processes", "times"},
    "variational": {"denoiser", "fitting", "likelihood", "processes", "training"},
    "score_matching": {"denoiser", "exact", "fitting", "networks", "processes", "samplers"},
    "evaluation": {"data"},
    "data": set(),
    "plotting": set(),
    "checkpoints": set(),
    "callbacks": {"checkpoints", "evaluation", "likelihood", "plotting", "samplers"},
    "convert": {
        *("denoiser", "networks", "predictions", "processes", "samplers", "times", "training"),
    },
    "export": {"denoiser", "samplers", "score_matching", "times", "training"},
    "models": {"fitting", "networks", "score_matching", "training", "variational"},
    "runs": {
        *("callbacks", "checkpoints", "data", "export", "fitting", "models", "plotting"),
        "training",
    },
    "_arguments": {"models"},
    "cli": None,  # everything
    "__main__": {"cli"},
    "__init__": None,
}
# Heavy packages and the rooms that may use them, then inside functions only.
HEAVY = {
    "tensorflow": {"_backend", "data", "export", "evaluation"},
    "jax": {"_backend"},
    "tensorflow_datasets": {"data"},
    "sklearn": {"data", "likelihood"},
    "matplotlib": {"plotting"},
    "imageio": {"plotting"},
    "PIL": {"plotting", "data", "likelihood"},
    "torch": {"convert"},
    "safetensors": {"convert"},
    "huggingface_hub": {"convert"},
    "scipy": {"evaluation"},
    "rich": {"callbacks", "cli"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(path: Path):
    """(imported dotted name, whether it runs when the module is imported) of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) not in later
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}", id(node) not in later


def our_imports(path: Path, at_once: bool = False) -> set[str]:
    names = {name for name, now in imports(path) if now or not at_once}
    rooms = {name.split(".")[1] for name in names if re.match(r"tfdiffusion\.", name)}
    return {
        name for name in rooms if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()
    }


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_what_the_table_allows(path):
    here = room(path)
    assert here in TABLE, f"{here} is new: say in this table what it may import"
    if TABLE[here] is not None:
        extra = our_imports(path) - TABLE[here] - COMMON - {here}
        assert not extra, f"{here} must not import {sorted(extra)}"


def test_no_cycles():
    graph = {name: set() for name in TABLE}
    for path in modules():
        graph[room(path)] |= our_imports(path, at_once=True) - {room(path)}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        for needs in graph.values():
            needs.difference_update(leaves)
    assert not graph, f"a cycle among {sorted(graph)}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_heavy_packages_stay_in_their_rooms(path):
    for name, at_once in imports(path):
        package = name.split(".")[0]
        if package in HEAVY:
            assert room(path) in HEAVY[package], f"{package} belongs to {HEAVY[package]}"
            assert not at_once, f"{package} is imported inside functions, not with the module"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_one_file_asks_for_the_backend(path):
    asks = re.search(r"backend\.backend\(\)", path.read_text(encoding="utf-8"))
    # The command line tells people about it, the export refuses others, a run notes it down.
    assert not asks or room(path) in {"_backend", "cli", "export", "runs"}


def run(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_an_import_brings_no_heavy_package():
    heavy = ["matplotlib", "imageio", "tensorflow_datasets", "sklearn", "PIL", "torch", "scipy"]
    code = """
import sys, keras
before = set(sys.modules)
import tfdiffusion
print(*(set(sys.modules) - before))
"""
    brought = {name.split(".")[0] for name in run(code).split()}
    assert "tfdiffusion" in brought
    assert not brought & set(heavy)


def test_on_jax_it_trains_saves_and_samples_without_tensorflow(tmp_path):
    pytest.importorskip("jax")
    code = f"""
import sys
sys.modules["tensorflow"] = None  # importing it now fails
import keras, numpy as np, tfdiffusion as tfd
network = tfd.networks.UNet(
    out_channels=1, widths=(8,), blocks_per_level=1, groups=4, mid_attention=False)
model = tfd.DiffusionModel(network)
model.compile("adam")
model.fit(np.zeros((4, 4, 4, 1), "float32"), batch_size=4, verbose=0)
model.save({str(tmp_path / "model.keras")!r})
loaded = keras.saving.load_model({str(tmp_path / "model.keras")!r})
same = np.allclose(model.sample(2, steps=2), loaded.sample(2, steps=2), atol=1e-5)
print(same, keras.backend.backend())
"""
    assert run(code, KERAS_BACKEND="jax").split()[-2:] == ["True", "jax"]


def setup() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in text.split("\n") if line}


def test_the_version_can_be_read_without_importing():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    versions = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert len(versions) == 1 and re.fullmatch(r"\d+\.\d+\.\d+", versions[0])
    assert setup()["metadata"]["version"] == "attr: tfdiffusion.__version__"


def test_what_is_imported_is_required():
    """Every package that the code imports is a dependency, of the base or of an extra."""
    config = setup()
    names = {"sklearn": "scikit_learn", "PIL": "pillow", "absl": "keras"}  # Keras requires absl-py
    required = requirements(config["options"]["install_requires"])
    for extra in config["options.extras_require"].values():
        required |= requirements(extra)
    for path in modules():
        for name, _ in imports(path):
            package = name.split(".")[0]
            if package not in sys.stdlib_module_names and package != "tfdiffusion":
                assert names.get(package, package) in required, f"{path.name} imports {package}"


def test_the_base_is_lean_and_bounded():
    base = setup()["options"]["install_requires"].strip().split("\n")
    assert all(">=" in line for line in base)
    assert not requirements("\n".join(base)) & {"torch", "diffusers", "jax", "pytest", "jupyterlab"}
    test = setup()["options.extras_require"]["test"]
    assert not requirements(test) & {"torch", "diffusers"}  # gigabytes


def test_package_files():
    data = setup()["options.package_data"]["tfdiffusion"].split()
    assert "py.typed" in data and "pretrained/*.keras" in data
    assert (PACKAGE / "py.typed").is_file()
    for folder in {path.parent for path in modules()}:
        assert (folder / "__init__.py").is_file(), f"{folder} would not be installed"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_annotations_are_postponed(path):
    text = path.read_text(encoding="utf-8")
    if "def " in text:
        assert "from __future__ import annotations" in text
