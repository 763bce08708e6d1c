"""Give committed pages today's style and script, after a change of either.

`python docs/site/restyle.py` takes every `eval/results/*/report.html`. What a page says stays as it
is, to the last number: nothing is measured or drawn, which `reports.py` and `lora-ws reproduce` do.
"""

import re
from pathlib import Path

from markupsafe import escape

from lora_ws.report.page import content_policy, part_words, script, style

RESULTS = Path(__file__).parents[2] / "eval" / "results"
POLICY = re.compile(r'(?<=http-equiv="Content-Security-Policy" content=")[^"]*')
# Where names stand that may be long, and the text between their tags.
NAMES = re.compile(r'(?<=<td class="text">).+?(?=</td>)|(?<=<dt>).+?(?=</dt>)')
TEXT = re.compile(r"(?<![^>])[^<>]+")


def restyle(page: str) -> str:
    """The page with the present style, script, policy and breaks of long words."""
    page = _within("style", style(), page.replace("<wbr>", ""))
    page = _within("script", script(), page)
    page = POLICY.sub(str(escape(content_policy())), page)
    return NAMES.sub(lambda name: TEXT.sub(lambda text: part_words(text[0]), name[0]), page)


def _within(tag: str, new: str, page: str) -> str:
    return re.sub(rf"(?<=<{tag}>).*?(?=</{tag}>)", lambda _: str(new), page, flags=re.DOTALL)


if __name__ == "__main__":
    for file in RESULTS.glob("*/report.html"):
        file.write_text(restyle(file.read_text(encoding="utf-8")), encoding="utf-8")
