"""Bring notebooks, reports, linked sources and the API into the site that ``make docs`` builds.

Pages keep their place in the repository, so a link that works there works in the site: what lies
outside ``docs/`` and is linked becomes a page too, a notebook with its outputs, a source file with
its text.
"""

import importlib
import inspect
import re
import tomllib
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()[^)#:\s]+(?=[)#])")
SHOWN = {".py": "python", ".yaml": "yaml", ".sh": "bash"}
HIDDEN_FROM_SEARCH = "---\nsearch: {exclude: true}\n---\n"
# Where in the repository a page came from, by its address in the site.
SOURCES: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Take the addresses from pyproject.toml, the one place that has them."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    config.site_url = urls["Documentation"]
    # Not `repo_url`: the theme would ask GitHub for stars and forks on every page.
    config.extra["social"] = [{"icon": "fontawesome/brands/github", "link": urls["Repository"]}]
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the API, the notebooks, and what pages link to, and what that links to."""

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, uri, content=content))

    todo = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    todo += [path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks").glob("*.ipynb")]
    todo += ["CONTRIBUTING.md", "CHANGELOG.md", "training/README.md"]
    done = set[str]()
    while todo:
        source = todo.pop()
        if source in done or not (ROOT / source).is_file():
            continue
        done.add(source)
        uri = site_uri(source)
        if not uri.endswith(".md"):
            if not source.startswith("docs/"):
                add(uri, (ROOT / source).read_bytes())
            continue
        text, pictures = page_text(source)
        todo += [normpath(join(dirname(source), target)) for target in LINK.findall(text)]
        SOURCES[uri] = source
        if not source.startswith("docs/"):
            add(uri, text)
            for name, picture in pictures.items():
                add(join(dirname(uri), name), picture)
    for module in public_modules():
        add(f"reference/{module}.md", api_page(module))
    return files


def on_page_markdown(text: str, *, page: Page, **_: Any) -> str:
    """Point links at the pages of what they name."""
    here = page.file.src_uri
    if here not in SOURCES:
        return text

    def moved(link: re.Match[str]) -> str:
        target = normpath(join(dirname(SOURCES[here]), link[0]))
        # What only the site has, such as a notebook's images, stays beside its page.
        return relpath(site_uri(target), dirname(here)) if (ROOT / target).exists() else link[0]

    return LINK.sub(moved, text)


def site_uri(source: str) -> str:
    """Where in the site a file of the repository is.

    Example:
        >>> site_uri("docs/scan.md"), site_uri("training/scan/lora_ws_mini.yaml")
        ('scan.md', 'training/scan/lora_ws_mini.yaml.md')
    """
    path = Path(source.removeprefix("docs/"))
    if path.suffix == ".ipynb":
        return path.with_suffix(".md").as_posix()
    return f"{path.as_posix()}.md" if path.suffix in SHOWN else path.as_posix()


def page_text(source: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of a file of the repository, and images that are only inside it."""
    path = ROOT / source
    if path.suffix == ".ipynb":
        text, resources = MarkdownExporter().from_filename(str(path))
        name = path.stem
        pictures = {f"{name}_{key}": data for key, data in resources["outputs"].items()}
        return re.sub(r"(?<=\]\()(?=output_\d)", f"{name}_", text), pictures
    text = path.read_text(encoding="utf-8")
    if language := SHOWN.get(path.suffix):
        text = f"{HIDDEN_FROM_SEARCH}# {source}\n\n````{language}\n{text}````\n"
    return text, {}


def public_modules() -> list[str]:
    """The packages that say what is public, the library itself first."""
    packages = [
        file.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for file in (ROOT / "lora_ws").rglob("__init__.py")
        if "\n__all__ = " in file.read_text(encoding="utf-8")
    ]
    return sorted(packages)


def api_page(module: str) -> str:
    """The reference of a module: what it is for, and every name of its ``__all__``."""
    found = importlib.import_module(module)
    parts = [f"# {module}", inspect.getdoc(found) or ""]
    names = [name for name in found.__all__ if not name.startswith("__")]
    if module == "lora_ws":
        rows = [f"| {_linked(name)} | {_sentence(getattr(found, name))} |" for name in names]
        parts.append("\n".join(["| name | what it is |", "|---|---|", *rows]))
        elsewhere = [n for m in public_modules()[1:] for n in importlib.import_module(m).__all__]
        names = [name for name in names if name not in elsewhere]
    parts += [f"::: {_home(module, name)}.{name}" for name in names]
    return "\n\n".join(parts) + "\n"


def _linked(name: str) -> str:
    return f"[`{name}`][{_home('lora_ws', name)}.{name}]"


def _sentence(value: object) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0]


def _home(module: str, name: str) -> str:
    """The module that defines a public name; data is where it is exported."""
    value = getattr(importlib.import_module(module), name)
    home = getattr(value, "__module__", module)
    return home if home.startswith("lora_ws") else module
