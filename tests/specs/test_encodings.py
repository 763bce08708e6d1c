"""Every text file names its encoding: ruff's rule sees only the calls whose object it can infer."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODE = set("rwxatb+")


def leaves_encoding_open(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding of the machine."""
    name = ast.unparse(call.func).rpartition(".")[2]
    options = {keyword.arg: keyword.value for keyword in call.keywords}
    if "encoding" in options:
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) <= (name == "write_text")
    if name in ("open", "NamedTemporaryFile", "TemporaryFile", "fdopen"):
        return text_mode(call, options, name)
    return ast.unparse(call.func).startswith("subprocess.") and "text" in options


def text_mode(call: ast.Call, options: dict, name: str) -> bool:
    """Whether a file is opened as text; what is no mode belongs to an ``open`` of another kind."""
    modes = [options["mode"]] if "mode" in options else call.args
    texts = [m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)]
    given = [text for text in texts if text and set(text) <= MODE]
    if given:
        return "b" not in given[-1]
    return name == "open" and isinstance(call.func, ast.Name)


@pytest.mark.parametrize(
    "code",
    [
        "path.read_text()",
        "path.write_text(text)",
        "open(path)",
        "path.open('a')",
        "path.open(mode='w')",
        "NamedTemporaryFile('w')",
        "subprocess.run(args, text=True)",
    ],
)
def test_open_encodings_are_seen(code: str) -> None:
    assert leaves_encoding_open(ast.parse(code, mode="eval").body)


@pytest.mark.parametrize(
    "code",
    [
        "path.read_text('utf-8')",
        "path.write_text(text, encoding='utf-8')",
        "path.open('rb')",
        "open(path, 'wb')",
        "NamedTemporaryFile(suffix='.rows')",
        "Image.open(path)",
        "AdapterSet.open(path)",
        "subprocess.run(args, capture_output=True)",
    ],
)
def test_others_are_let_through(code: str) -> None:
    assert not leaves_encoding_open(ast.parse(code, mode="eval").body)


@pytest.mark.slow
def test_text_files_name_their_encoding() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{call.lineno}"
        for folder in ("lora_ws", "tests", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        for call in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(call, ast.Call) and leaves_encoding_open(call)
    ]
    assert not found, 'name encoding="utf-8" at each of these'
