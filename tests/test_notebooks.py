"""The tutorial: each notebook is well formed, ran in one go, and still says what is so."""

import copy
import importlib.util
import re
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

import nbformat  # noqa: E402

_spec = importlib.util.spec_from_file_location("notebook_runner", ROOT / "notebooks" / "run.py")
runner = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(runner)

CHAPTERS = runner.notebooks()
every_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
on_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the tutorial runs on TensorFlow"
)


@every_chapter
def test_a_chapter_has_its_parts(path):
    notebook = runner.read(path)
    first, second = notebook.cells[:2]
    assert first.cell_type == "markdown"
    assert re.match(rf"# {int(path.name[:2])}\. \w", first.source), "title: # 3. Langevin dynamics"
    assert second in runner.tagged(notebook, "parameters")
    names = re.findall(r"^(\w+) =", second.source, re.MULTILINE)
    assert names and all(name.isupper() for name in names)
    assert set(runner.small_values(notebook)) <= set(names), "a small value of no parameter"
    markdown = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.search(r"^#+ What to read", markdown, re.MULTILINE)
    exercises = runner.tagged(notebook, "exercise")
    assert exercises and all("assert" in cell.source for cell in exercises)
    assert len(re.findall(r"^#+ Exercise", markdown, re.MULTILINE)) == len(exercises)
    assert runner.tagged(notebook, "checked"), "no number is held against a new run"


@every_chapter
def test_outputs_are_those_of_one_clean_run_of_this_code(path):
    notebook = runner.read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not list(runner.blemishes(notebook))
    assert notebook.metadata["tfdiffusion"]["digest"] == runner.digest(notebook), (
        f"the code was edited after its run: python notebooks/run.py {path.name[:2]}"
    )
    assert path.stat().st_size < runner.MAX_BYTES
    for link in re.findall(r"\]\((\.\./[^)#\s]+|\w[\w./]*\.ipynb)\)", path.read_text("utf-8")):
        assert (path.parent / link).exists(), f"{link} is shown and not there"


@on_tensorflow
@every_chapter
def test_a_new_run_agrees(path):
    committed = runner.read(path)
    notebook = runner.run(path, fast=True, save=False)
    assert not list(runner.blemishes(notebook))
    assert not list(runner.disagreements(notebook, committed))


# ------------------------------------------------------------------------------------ the runner


def small_notebook() -> nbformat.NotebookNode:
    cells = [
        nbformat.v4.new_markdown_cell("# 1. Title"),
        nbformat.v4.new_code_cell("SIZE = 1000", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print('size', SIZE)"),
        nbformat.v4.new_code_cell("print(f'{1 / 3:.3f}')", metadata={"tags": ["checked"]}),
    ]
    return nbformat.v4.new_notebook(cells=cells, metadata={"tfdiffusion": {"fast": {"SIZE": 7}}})


@pytest.mark.parametrize(
    ("fast", "eager", "expected"),
    [
        (True, True, "run_functions_eagerly"),
        (True, False, "disable_meta_optimizer"),
        (False, True, ""),
    ],
)
def test_small_runs_save_time(tmp_path, monkeypatch, fast, eager, expected):
    notebook = small_notebook()
    notebook.metadata["tfdiffusion"]["eager"] = eager
    runner.write(notebook, tmp_path / "small.ipynb")
    monkeypatch.setattr(runner, "execute", lambda notebook, changes, setting: (changes, setting))
    changes, setting = runner.run(tmp_path / "small.ipynb", fast=fast)
    assert changes == ({"SIZE": 7} if fast else {})
    assert expected in setting and bool(expected) == bool(setting)
    compile(setting, "setting", "exec")


@pytest.fixture(scope="module")
def executed():
    """The small notebook in full, and fast."""
    return runner.execute(small_notebook()), runner.execute(small_notebook(), {"SIZE": 7})


@on_tensorflow
def test_small_values_replace_the_parameters(executed):
    full, fast = executed
    assert runner.printed(full.cells[2]) == "size 1000"
    assert runner.printed(fast.cells[3]) == "size 7"
    assert not list(runner.disagreements(fast, full))


@on_tensorflow
def test_what_is_saved_is_the_same_after_every_run(executed, tmp_path):
    files = [tmp_path / "01_a.ipynb", tmp_path / "01_b.ipynb"]
    for file in files:
        notebook = copy.deepcopy(executed[0])
        notebook.metadata["started"] = file.name
        runner.write(runner.normalized(notebook, file.name), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert len(list(tmp_path.iterdir())) == 2
    saved = runner.read(files[0])
    assert saved.metadata["tfdiffusion"]["digest"] == runner.digest(small_notebook())
    saved.cells[2].source = "print('another', SIZE)"
    assert saved.metadata["tfdiffusion"]["digest"] != runner.digest(saved)


def test_stale_numbers_and_changed_words_are_seen():
    assert runner.same_text("variance 1.143, n = 200", "variance 1.144, n = 200")
    assert runner.same_text("2.0e-04", "2.1e-04") and not runner.same_text("2.0e-04", "2.3e-04")
    assert not runner.same_text("variance 1.15", "variance 1.12")
    assert not runner.same_text("n = 200", "n = 201")
    assert not runner.same_text("variance 1.143", "deviation 1.143")
    assert not runner.same_text("1 2", "1 2 3")


@pytest.mark.parametrize(
    ("stream", "text", "words"),
    [
        ("stderr", "I0000 a library talks", "stderr"),
        ("stdout", "tutorial.py:1: UserWarning: odd", "a warning"),
        ("stdout", "<object object at 0x7f9fa18a3b90>", "an address"),
    ],
)
def test_unclean_outputs_are_refused(stream, text, words):
    output = nbformat.v4.new_output("stream", name=stream, text=text)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=[output])])
    (fault,) = runner.blemishes(notebook)
    assert words in fault


@on_tensorflow
def test_a_cell_that_fails_names_its_error():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(Exception, match="ZeroDivisionError"):
        runner.execute(notebook)


def test_a_chapter_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="97"):
        runner.notebooks(["97"])
