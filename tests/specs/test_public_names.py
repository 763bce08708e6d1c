"""Every public name is explained: a docstring with an example that runs, and a page of the site."""

import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    file.parent.relative_to(ROOT).as_posix().replace("/", ".")
    for file in (ROOT / "lora_ws").rglob("__init__.py")
    if "\n__all__ = " in file.read_text(encoding="utf-8")
)


def test_the_packages_are_found() -> None:
    assert {"lora_ws", "lora_ws.adapters", "lora_ws.learn.tasks"} <= set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_example(package: str) -> None:
    """The examples themselves run with all doctests."""
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__}
    ours = {
        name: value
        for name, value in public.items()
        if inspect.isclass(value) or inspect.isfunction(value)
    }
    assert [name for name, value in ours.items() if ">>>" not in (value.__doc__ or "")] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_package_is_in_the_menu_of_the_site(package: str) -> None:
    assert f"- reference/{package}.md\n" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
