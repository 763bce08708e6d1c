"""What is generated for the site is what the code says now."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_page_of_commands_is_current() -> None:
    """`make help` writes it."""
    spec = importlib.util.spec_from_file_location("cli_page", ROOT / "docs/site/cli_page.py")
    assert spec is not None
    assert spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text(encoding="utf-8") == page.render()


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_are_committed_with_their_outputs(file: Path) -> None:
    """`make notebooks` writes them."""
    book = nbformat.read(file, as_version=4)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    assert file.stat().st_size < 400_000
    assert not any(out.get("name") == "stderr" for cell in code for out in cell.outputs)
