"""The documentation site builds without a warning, and every link within it leads somewhere."""

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote

import keras
import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("mkdocs")
pytest.importorskip("mkdocs_jupyter")
pytest.importorskip("mkdocstrings")
pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the site is the same on any backend"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a site that was built as the developers' README says."""
    try:
        metadata.distribution("sphinx-mathjax-offline")
    except metadata.PackageNotFoundError:
        pytest.skip("sphinx-mathjax-offline is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def references(page: Path) -> list[str]:
    """What a page shows or links to."""
    html = re.sub(r"<pre.*?</pre>", "", page.read_text("utf-8"), flags=re.DOTALL)
    return re.findall(r'\b(?:src|href)="([^"]+)"', html)


def test_every_link_leads_to_a_file(site):
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    missing = []
    for page in pages:
        for reference in references(page):
            path = unquote(re.split("[#?]", reference)[0])
            local = path and not re.match(r"[a-z]+:|//|/", path) and page.name != "404.html"
            if local and not (page.parent / path).exists():
                missing.append(f"{page.relative_to(site)}: {reference}")
    assert not missing


def test_nothing_is_loaded_from_other_servers(site):
    for page in site.rglob("*.html"):
        html = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)\b[^>]*\bsrc="(https?:[^"]+)"', html)
        loaded += re.findall(r'<link\b[^>]*rel="stylesheet"[^>]*href="(https?:[^"]+)"', html)
        assert not loaded, page.name


def test_the_tutorial_and_the_docstrings_are_there(site):
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        html = (site / "notebooks" / f"{notebook.stem}.html").read_text("utf-8")
        assert "window.MathJax" in html and html.count("data:image/png;base64") > 0
    reference = (site / "reference" / "samplers.html").read_text("utf-8")
    assert "noising_path" in reference and "Keeps the marginals" in reference
