"""What the site is made of: the README, the notebooks and the docstrings, where they lie.

Nothing is copied into `docs/`: these hooks of MkDocs hand it the files from their own places, write
a reference page for each room of the library, and put a copy of MathJax beside the pages, so that
the site needs no other server.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
_MATHJAX = "sphinx-mathjax-offline"  # MathJax 3 as a Python package
_MATHJAX_FILE = "assets/mathjax.js"
_NBCONVERT_MATHJAX = re.compile(
    r"<!-- Load mathjax -->.*?<!-- End of mathjax configuration -->", re.DOTALL
)
_CONFIGURED_MATHJAX = """
<script>
window.MathJax = {tex: {inlineMath: [["$", "$"]], processEscapes: true}};
</script>
<script defer src="../assets/mathjax.js"></script>
"""


def on_config(config):
    """Fills in the chapters of the tutorial, in order."""
    for part in config.nav:
        for title, pages in part.items():
            if "notebooks/*.ipynb" in pages:
                chapters = sorted(path.name for path in (ROOT / "notebooks").glob("*.ipynb"))
                found = [f"notebooks/{name}" for name in chapters]
                part[title] = [*(p for p in pages if p != "notebooks/*.ipynb"), *found]
    return config


@event_priority(100)  # before the plugin that makes pages of notebooks
def on_files(files: Files, config) -> Files:
    """Adds what lies elsewhere."""
    for pattern in ("assets/*.*", "notebooks/*.ipynb", "notebooks/*.md", "benchmarks/*.md"):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    files.append(File.generated(config, _MATHJAX_FILE, abs_src_path=str(_mathjax())))
    for title, name in _reference_pages(config.nav):
        room = Path(name).stem
        text = f"# {title}\n\n`tfdiffusion.{room}`\n\n::: tfdiffusion.{room}\n"
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(html: str, page, **kwargs) -> str:
    """Notebooks use the MathJax beside them, and links to notebooks lead to pages."""
    html = _NBCONVERT_MATHJAX.sub(lambda _: _CONFIGURED_MATHJAX, html)
    if page.file.src_uri.endswith(".ipynb"):
        html = re.sub(r'(href="[\w./]+)\.ipynb(["#])', r"\1.html\2", html)
        html = html.replace('href="README.md"', 'href="index.html"')
    return html


def _reference_pages(nav: list) -> list[tuple[str, str]]:
    """(title, file) of the pages that are made of docstrings."""
    pages = [
        (title, name)
        for part in nav
        for entry in part.values()
        if isinstance(entry, list)
        for page in entry
        if isinstance(page, dict)
        for title, name in page.items()
    ]
    return [(title, name) for title, name in pages if name.startswith("reference/")]


def _mathjax() -> Path:
    try:
        package = metadata.distribution(_MATHJAX)
    except metadata.PackageNotFoundError as error:
        raise PluginError(f"The site needs {_MATHJAX}: pip install '.[docs]'.") from error
    return Path(str(package.locate_file(f"{_MATHJAX}/static/mathjax/tex-svg.js")))
