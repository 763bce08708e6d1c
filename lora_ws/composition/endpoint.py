"""A judge behind an address: any vision model that speaks OpenAI's chat protocol."""

import base64
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from time import sleep
from typing import Any
from urllib.parse import urlsplit

from jaxtyping import Float
from torch import Tensor

from lora_ws.errors import ConfigError, NotAvailableError

# Seconds before each further try, a minute in all, and the longest that a server may ask for.
PAUSES = (1, 2, 4, 8, 16, 32)
LONGEST = 120
BROKEN = {"ReadError", "WriteError", "RemoteProtocolError"}


@dataclass(frozen=True)
class ChatJudge:
    """A vision model that is asked over HTTP; it is a `lora_ws.composition.judging.Judge`.

    Attributes:
        url: base address as OpenAI's clients take it, or all of it, up to ``/chat/completions``.
            ``/v1`` is added to a base that does not end in it.
        model: its name there.
        key_env: environment variable that holds the key, which is read for each request and kept
            nowhere; None for a server that wants none.
        temperature: of its answers.
        max_tokens: of an answer; None leaves it to the server.
        timeout: seconds without a sign of the server until it is given up.
    """

    url: str
    model: str
    key_env: str | None = None
    temperature: float = 1.0
    max_tokens: int | None = 2048
    timeout: float = 120.0

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
            # Not shown, as it may hold a password.
            raise ConfigError(
                "url: expected http://host/v1 or https://host/v1 without a user or password, got "
                "none; the key goes into the environment variable that key_env names"
            )

    def __call__(
        self,
        prompt: str,
        first: Float[Tensor, "3 height width"],
        second: Float[Tensor, "3 height width"],
    ) -> str:
        """Ask about two pictures; a busy server is asked again, when it says or ever later.

        Args:
            prompt: the question.
            first: from -1 to 1.
            second: likewise.

        Returns:
            What the model says; empty where it refuses to say anything.

        Raises:
            NotAvailableError: no key, no server, or none that answers; the message has its address.
        """
        from huggingface_hub import InferenceClient

        key = self._key()
        # Without a key the client would send the Hub's token, to whomever the address belongs.
        client = InferenceClient(base_url=self.url, api_key=key or "none", timeout=self.timeout)
        for pause in (*PAUSES, None):
            try:
                answer = client.chat_completion(
                    _messages(prompt, first, second),
                    model=self.model,
                    temperature=self.temperature,
                    max_tokens=self.max_tokens,
                )
                return self._text(answer)
            except NotAvailableError:
                raise
            except Exception as error:
                wait = _wait(error, pause)
                if wait is None:
                    # Not chained: a server's words can repeat the key.
                    raise NotAvailableError(f"{self._where}: {self._why(error, key)}") from None
            sleep(wait)
        raise AssertionError

    @property
    def _where(self) -> str:
        return self.url.partition("?")[0]

    def _key(self) -> str | None:
        if self.key_env is None:
            return None
        key = os.environ.get(self.key_env, "").strip()
        # The client's own complaint would print what it cannot send.
        if not key or not all("!" <= letter <= "~" for letter in key):
            raise NotAvailableError(
                f"{self._where}: expected a key in the environment variable `{self.key_env}`, "
                f"{'got letters that no key has' if key else 'it is not set'}; export it"
            )
        return key

    def _text(self, answer: Any) -> str:
        choice = answer.choices[0]
        text = choice.message.content
        if not text and choice.finish_reason == "length":
            raise NotAvailableError(
                f"{self._where}: `{self.model}` spent all of max_tokens={self.max_tokens} before "
                "its answer; raise it"
            )
        return text if isinstance(text, str) else ""

    def _why(self, error: Exception, key: str | None) -> str:
        kinds = _kinds(error)
        if (response := _response(error)) is not None:
            return self._refusal(response.status_code, response.headers) + _said(response, key)
        if "OfflineModeIsEnabled" in kinds:
            return "HF_HUB_OFFLINE is set, which the client takes for every address; unset it"
        if kinds & {"InferenceTimeoutError", "TimeoutException"}:
            return f"no answer within {self.timeout:g} s; raise timeout"
        if "TransportError" in kinds:
            return f"cannot be reached ({type(error).__name__}); is a server running there?"
        return (
            f"expected an answer of OpenAI's chat protocol, got another ({type(error).__name__}); "
            "check the address"
        )

    def _refusal(self, status: int, headers: Mapping[str, str]) -> str:
        if status in (401, 403):
            return f"refuses the key (status {status}); " + (
                f"check `{self.key_env}`" if self.key_env else "name its variable: key_env"
            )
        if status == 404:
            return f"has no chat here or no model `{self.model}` (status 404); check both"
        if _is_busy(status):
            told = _retry_after(headers) or 0
            later = f"in {told:.0f} s" if told > LONGEST else "later"
            state = "is too busy" if status in (429, 503, 529) else "fails"
            return f"{state} (status {status}); try again {later}"
        return f"does not take the request (status {status})"


def data_url(picture: Float[Tensor, "3 height width"]) -> str:
    """A picture from -1 to 1 as a PNG in a ``data:`` address."""
    from PIL import Image

    pixels = ((picture.detach().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _messages(prompt: str, first: Tensor, second: Tensor) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": prompt}]
    for place, picture in enumerate((first, second), 1):
        content.append({"type": "text", "text": f"Picture {place}:"})
        content.append({"type": "image_url", "image_url": {"url": data_url(picture)}})
    return [{"role": "user", "content": content}]


def _wait(error: Exception, pause: float | None) -> float | None:
    """Seconds until another try; None where none is worth it."""
    if pause is None:
        return None
    response = _response(error)
    if response is None:
        return pause if _kinds(error) & BROKEN else None
    if not _is_busy(response.status_code):
        return None
    told = max(_retry_after(response.headers) or 0, pause)
    return told if told <= LONGEST else None


def _is_busy(status: int) -> bool:
    return status == 429 or status >= 500


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds, or a date, as RFC 9110 has them; None where there is neither."""
    said = headers.get("retry-after", "").strip()
    try:
        seconds = float(said)
    except ValueError:
        try:
            then = parsedate_to_datetime(said)
        except ValueError:
            return None
        then = then if then.tzinfo else then.replace(tzinfo=UTC)
        seconds = (then - datetime.now(UTC)).total_seconds()
    return max(seconds, 0) if math.isfinite(seconds) else None


def _response(error: Exception) -> Any:
    # The client trips over bodies that are lists, so that its own error hides the one with status.
    hidden = error.__context__ if isinstance(error, AttributeError) else None
    found = [getattr(e, "response", None) for e in (error, hidden)]
    return next((response for response in found if hasattr(response, "status_code")), None)


def _kinds(error: Exception) -> set[str]:
    # By name: the client changed its HTTP library between versions; the names of the base stayed.
    return {kind.__name__ for kind in type(error).__mro__}


def _said(response: Any, key: str | None) -> str:
    try:
        words = " ".join(response.text.split())
    except Exception:  # the connection broke in the middle of the body
        return ""
    words = words.replace(key, "…") if key else words
    return f": {words[:200]}" if words and not words.startswith("<") else ""
