"""Puts MathJax into the built site, so that formulas show without a network.

The files come from the package jupyter-server-mathjax, installed without what it requires (a Jupyter server).
"""

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

PACKAGE = "jupyter-server-mathjax"
STATIC = "jupyter_server_mathjax/static/"
CONFIG = Path(__file__).with_name("mathjax-config.js")


def on_files(site: Files, *, config: MkDocsConfig) -> Files:
    try:
        carried = files(PACKAGE) or []
    except PackageNotFoundError as error:
        raise PluginError(f"{PACKAGE} is missing: pip install --no-deps {PACKAGE}") from error
    site.append(File.generated(config, "assets/mathjax-config.js", abs_src_path=str(CONFIG)))
    for path in carried:
        if str(path).startswith(STATIC):
            target = "assets/mathjax/" + str(path).removeprefix(STATIC)
            site.append(File.generated(config, target, abs_src_path=str(path.locate())))
    return site
