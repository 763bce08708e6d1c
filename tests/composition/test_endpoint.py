"""The judge behind an address against a server on loopback that is biased, busy or broken."""

import base64
import io
import json
import re
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lora_ws.composition import endpoint
from lora_ws.composition.endpoint import LONGEST, PAUSES, ChatJudge, data_url
from lora_ws.composition.judging import (
    ImageScores,
    PairScores,
    Rate,
    compare,
    position_bias,
    question,
    win_rate,
)
from lora_ws.errors import ConfigError, DataError, NotAvailableError

KEY = "sk-test-0123456789"
SCORES = "Picture 1: composition 7, image 8\nPicture 2: composition 6, image 9"


@dataclass(frozen=True)
class Thing:
    name: str
    triggers: tuple[str, ...]


ELEMENTS = (Thing("light", ("a bright light",)),)


class Reply(NamedTuple):
    """An answer that is no chat; without a status the connection is closed."""

    status: int | None
    body: Any = b""
    headers: dict[str, str] = {}  # noqa: RUF012


@dataclass
class ChatServer:
    """Speaks the chat protocol, scores brightness, and favours what it is shown first.

    Attributes:
        bias: points that the first picture gets on top.
        replies: given before anything else, one per request.
        requests: headers and body of each.
    """

    bias: float = 0.0
    replies: list[Reply] = field(default_factory=list)
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    url: str = ""

    def answer(self, body: Any) -> Reply:
        if self.replies:
            return self.replies.pop(0)
        levels = [float(pixels.mean()) / 255 for pixels in pictures(body)]
        scores = [
            round(8 * level) / 2 + bonus
            for level, bonus in zip(levels, (self.bias, 0), strict=True)
        ]
        return chat(
            "**Scores**\n\n"
            + "\n".join(
                f"- Picture {place}:\n  - composition quality = {score}\n  - image quality = 5"
                for place, score in enumerate(scores, 1)
            )
        )


def chat(text: str | None, finish: str = "stop") -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return Reply(200, {"id": "1", "object": "chat.completion", "created": 0, "choices": [choice]})


def pictures(body: Any) -> list[np.ndarray]:
    found = []
    for part in body["messages"][0]["content"]:
        if part["type"] == "image_url":
            head, _, data = part["image_url"]["url"].partition(",")
            assert head == "data:image/png;base64"
            found.append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))))
    return found


@pytest.fixture
def server() -> Iterator[ChatServer]:
    state = ChatServer()

    class Connection(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.requests.append((self.path, dict(self.headers), body))
            reply = state.answer(body)
            if reply.status is None:
                return
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            self.send_response(reply.status)
            for name, value in ({"Content-Length": str(len(data))} | reply.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Connection) as http:
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}/v1"
        yield state
        http.shutdown()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it was waited, without waiting."""
    found: list[float] = []
    monkeypatch.setattr(endpoint, "sleep", found.append)
    return found


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    # What must not be sent to anybody.
    monkeypatch.setenv("HF_TOKEN", "hf_secret")


@pytest.fixture
def judge(server: ChatServer) -> ChatJudge:
    return ChatJudge(server.url, "eyes", "JUDGE_KEY", timeout=5)


def grey(level: float) -> Tensor:
    return torch.full((3, 8, 6), level)


def ask(judge: ChatJudge) -> str:
    return judge("which?", grey(-1), grey(1))


def test_a_request_is_what_the_protocol_has(server: ChatServer, judge: ChatJudge) -> None:
    picture = torch.linspace(-1, 1, 3 * 5 * 7).reshape(3, 5, 7)
    text = judge("which?", picture, grey(0.2))
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert {k.lower(): v for k, v in headers.items()}["authorization"] == f"Bearer {KEY}"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("eyes", 1.0, 2048)
    parts = body["messages"][0]["content"]
    assert [part.get("text") for part in parts] == [
        *("which?", "Picture 1:", None),
        *("Picture 2:", None),
    ]
    sent = pictures(body)[0]
    assert sent.shape == (5, 7, 3)
    exact = (picture.numpy().transpose(1, 2, 0).astype(np.float64) + 1) / 2 * 255
    assert np.abs(sent - exact).max() <= 0.5 + 1e-4
    assert "composition quality" in text
    server.requests.clear()
    ChatJudge(server.url, "eyes", temperature=0.0, max_tokens=None)("?", picture, picture)
    assert server.requests[0][2]["temperature"] == 0
    assert "max_tokens" not in server.requests[0][2]


def test_without_a_key_nobodys_token_is_sent(server: ChatServer) -> None:
    ask(ChatJudge(server.url, "eyes"))
    (_, headers, _) = server.requests[0]
    assert "hf_secret" not in str(headers)


def test_a_planted_bias_is_corrected(server: ChatServer, judge: ChatJudge) -> None:
    server.bias = 1.5
    equal = [compare(judge, ELEMENTS, grey(x), grey(x)) for x in (-0.5, 0.0, 0.5)]
    assert equal[0].shown == PairScores(ImageScores(2.5, 5), ImageScores(1, 5))
    assert win_rate(equal).composition.even == 0.5
    assert win_rate([c.shown for c in equal]).composition == Rate(0, 0, 1, 3)
    assert position_bias(equal).composition == Rate(1, 0, 0, 6)
    # True differences of a point either way are less than the bias.
    levels = ((-0.5, 0.0), (0.0, 0.5), (0.5, 1.0), (0.5, 0.0))
    unequal = [compare(judge, ELEMENTS, grey(a), grey(b)) for a, b in levels]
    assert win_rate(unequal).composition == Rate(0.75, 0, 0.25, 4)
    assert win_rate([c.shown for c in unequal]).composition == Rate(0, 0, 1, 4)
    assert win_rate([c.swapped for c in unequal]).composition == Rate(1, 0, 0, 4)
    assert win_rate(unequal).image == Rate(0, 1, 0, 4)
    asked = {body["messages"][0]["content"][0]["text"] for _, _, body in server.requests}
    assert asked == {question(ELEMENTS)}


def test_equal_methods_win_half_of_unequal_pairs(server: ChatServer, judge: ChatJudge) -> None:
    server.bias = 2.5
    levels = np.random.default_rng(0).permutation(np.linspace(-1, 1, 8))
    pairs = [(a, b) for a, b in zip(levels[::2], levels[1::2], strict=True)]
    both = [*pairs, *((b, a) for a, b in pairs)]
    found = [compare(judge, ELEMENTS, grey(float(a)), grey(float(b))) for a, b in both]
    rate = win_rate(found).composition
    assert rate.wins == rate.losses
    assert rate.even == 0.5
    assert win_rate([c.shown for c in found]).composition.even < 0.5


def test_it_comes_back_when_a_busy_server_says(
    server: ChatServer, judge: ChatJudge, waits: list[float]
) -> None:
    server.replies = [
        Reply(429, {"error": "slow down"}, {"Retry-After": "7"}),
        Reply(429, {}, {"Retry-After": formatdate(time.time() + 60, usegmt=True)}),
        Reply(429, {}, {"Retry-After": "soon"}),
        Reply(503, b"<html>", {"Retry-After": "0"}),
        chat(SCORES),
    ]
    assert ask(judge) == SCORES
    assert waits == [7, pytest.approx(60, abs=3), PAUSES[2], PAUSES[3]]
    assert len(server.requests) == 5


@pytest.mark.slow
def test_it_really_waits(server: ChatServer, judge: ChatJudge) -> None:
    server.replies = [Reply(429, {}, {"Retry-After": "1"}), chat(SCORES)]
    start = time.monotonic()
    assert ask(judge) == SCORES
    assert 1 <= time.monotonic() - start < 4


def test_what_passes_is_waited_for(
    server: ChatServer, judge: ChatJudge, waits: list[float]
) -> None:
    server.replies = [Reply(500), Reply(None), Reply(502, b"bad gateway"), chat(SCORES)]
    assert ask(judge) == SCORES
    assert waits == list(PAUSES[:3])


def test_a_list_of_errors_has_a_status_too(
    server: ChatServer, judge: ChatJudge, waits: list[float]
) -> None:
    errors = [{"error": {"code": 0, "message": "quota"}}]
    server.replies = [Reply(429, errors), Reply(400, errors)]
    with pytest.raises(NotAvailableError, match=r"status 400\): .*quota"):
        ask(judge)
    assert waits == [PAUSES[0]]


def test_a_server_that_stays_broken_is_given_up(
    server: ChatServer, judge: ChatJudge, waits: list[float]
) -> None:
    server.replies = [Reply(500, {"error": {"message": "no memory"}})] * 50
    with pytest.raises(NotAvailableError, match=r"fails \(status 500\); try .*no memory") as caught:
        ask(judge)
    assert server.url in str(caught.value)
    assert (waits, len(server.requests)) == (list(PAUSES), len(PAUSES) + 1)


def test_nobody_waits_for_an_hour(server: ChatServer, judge: ChatJudge, waits: list[float]) -> None:
    server.replies = [Reply(429, {}, {"Retry-After": str(LONGEST + 1)})]
    with pytest.raises(NotAvailableError, match=f"too busy .* try again in {LONGEST + 1} s"):
        ask(judge)
    assert waits == []


DEFINITE: dict[str, tuple[Reply, str]] = {
    "bad key": (Reply(401, {"error": f"Incorrect key: {KEY}"}), r"check `JUDGE_KEY`: .*key: …"),
    "no model": (Reply(404, {"error": "no such model"}), r"no model `eyes` .*no such model"),
    "bad request": (Reply(400, {"error": {"message": "no pictures"}}), r"400\): .*no pictures"),
    "long story": (Reply(422, b"very " * 500), r"status 422\): very"),
    "web page": (Reply(200, b"<html>Welcome</html>"), r"expected an answer of OpenAI's .* address"),
    "no JSON": (Reply(200, b"\xff\xfe"), "expected an answer of OpenAI's chat protocol"),
    "no choices": (Reply(200, {"object": "error", "message": "oops"}), "got another"),
    "empty choices": (Reply(200, {"choices": []}), "got another"),
    "odd choices": (Reply(200, {"choices": [{"index": 0}]}), "got another"),
    "a list": (Reply(200, [1]), "got another"),
    "thinks too long": (chat(None, "length"), "spent all of max_tokens=2048"),
}


@pytest.mark.parametrize("case", DEFINITE)
def test_a_definite_no_is_said_at_once(
    case: str, server: ChatServer, judge: ChatJudge, waits: list[float]
) -> None:
    reply, expected = DEFINITE[case]
    server.replies = [reply]
    with pytest.raises(NotAvailableError, match=expected) as caught:
        ask(judge)
    assert str(caught.value).startswith(server.url)
    assert len(str(caught.value)) < 400
    assert waits == []
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_garbage_is_asked_again_and_then_named(
    server: ChatServer, judge: ChatJudge, waits: list[float]
) -> None:
    server.replies = [chat("???"), chat(None), chat("Picture 1: composition 3"), chat(SCORES)]
    found = compare(judge, ELEMENTS, grey(0), grey(0))
    assert found.shown == PairScores(ImageScores(7, 8), ImageScores(6, 9))
    server.replies = [chat("no comment")] * 10
    with pytest.raises(DataError, match=r"no scores in 3 attempts.*`no comment`"):
        compare(judge, ELEMENTS, grey(0), grey(0), attempts=3)


WRONG_KEYS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "missing": (lambda m: m.delenv("JUDGE_KEY"), "`JUDGE_KEY`, it is not set; export it"),
    "empty": (lambda m: m.setenv("JUDGE_KEY", " "), "it is not set"),
    "not ASCII": (lambda m: m.setenv("JUDGE_KEY", "sk-kläng"), "letters that no key has"),
    "two lines": (lambda m: m.setenv("JUDGE_KEY", "sk-one\nsk-two"), "letters that no key has"),
}


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_a_key_that_is_none_is_named_and_not_shown(
    case: str, server: ChatServer, judge: ChatJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, expected = WRONG_KEYS[case]
    change(monkeypatch)
    with pytest.raises(NotAvailableError, match=expected) as caught:
        ask(judge)
    assert server.url in str(caught.value)
    assert "sk-" not in str(caught.value)
    assert server.requests == []


def test_a_key_with_a_line_end_is_a_key(
    server: ChatServer, judge: ChatJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    ask(judge)
    assert f"Bearer {KEY}" in server.requests[0][1].values()


def test_the_key_is_kept_nowhere(judge: ChatJudge, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(0):
        ask(judge)
    assert KEY not in repr(judge) + str(vars(judge)) + caplog.text


def test_no_server_is_said_at_once(waits: list[float]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    with pytest.raises(NotAvailableError, match=rf"^{re.escape(url)}: cannot be reached \(Conn"):
        ask(ChatJudge(f"{url}?secret=1", "eyes"))
    assert waits == []


def test_a_silent_server_is_given_up(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(NotAvailableError, match=r"no answer within 0\.2 s; raise timeout"):
            ask(ChatJudge(url, "eyes", timeout=0.2))
    assert waits == []


def test_offline_means_offline(judge: ChatJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(NotAvailableError, match="HF_HUB_OFFLINE is set"):
        ask(judge)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host", "http://me:pass@host/v1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="url: expected http://host/v1") as caught:
        ChatJudge(url, "eyes")
    assert "pass@" not in str(caught.value)


def test_pictures_beyond_the_range_are_clipped() -> None:
    data = base64.b64decode(data_url(grey(7).to(torch.float16)).partition(",")[2])
    assert (np.asarray(Image.open(io.BytesIO(data))) == 255).all()
