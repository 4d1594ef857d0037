"""A small client of the OpenAI API: what `penstock chat` needs, on the standard library alone."""

import json
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from penstock.core.errors import BadRequest, PenstockError, WorkersUnavailable

TIMEOUT_S = 600.0


@dataclass
class Answer:
    """One streamed answer, complete once its text has been iterated. Times are in seconds."""

    text: str = ""
    finish_reason: str | None = None
    num_tokens: int = 0
    ttft_s: float = 0.0
    decode_s: float = 0.0
    _started_s: float = field(default_factory=time.monotonic)

    def take(self, event: dict[str, Any]) -> str:
        """Book one event of the stream; return its text."""
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]
        text = ""
        for choice in event.get("choices", ()):
            text = choice["delta"].get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        now_s = time.monotonic()
        if text and not self.ttft_s:
            self.ttft_s = now_s - self._started_s
        elif text:
            self.decode_s = now_s - self._started_s - self.ttft_s
        self.text += text
        return text


class ChatClient:
    """Talks to one server, one request at a time."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadRequest(f"{url} is not an address such as http://127.0.0.1:8000", "--url")
        self.url = url
        self._kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        """Return the name of the first model that is served.

        Raises: `WorkersUnavailable` when no server answers there, `BadRequest` when it refuses.
        """
        return str(self.get("/v1/models")["data"][0]["id"])

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object that is at a path.

        Raises: `WorkersUnavailable` when no server answers there, `BadRequest` when it refuses.
        """
        return self._object("GET", path, None)

    def post(self, path: str, body: dict[str, object]) -> dict[str, Any]:
        """Return the JSON object with which a path answers a body. Raises: as `get`."""
        return self._object("POST", path, body)

    def _object(self, method: str, path: str, body: dict[str, object] | None) -> dict[str, Any]:
        connection, response = self._call(method, path, body)
        try:
            answer: dict[str, Any] = json.load(response)
        finally:
            connection.close()
        return answer

    def chat(self, body: dict[str, object], answer: Answer) -> Generator[str]:
        """Yield the text of an answer as it comes; closing the iterator cancels it.

        Raises: `WorkersUnavailable` when the server is not there or goes away, `BadRequest` when it
        refuses.
        """
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        connection, response = self._call("POST", "/v1/chat/completions", body)
        try:
            for line in response:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                if "error" in event:
                    raise BadRequest(event["error"]["message"])
                if text := answer.take(event):
                    yield text
        except (OSError, HTTPException) as error:
            raise WorkersUnavailable(f"the server at {self.url} went away: {error}") from error
        finally:
            connection.close()

    def _call(
        self, method: str, path: str, body: dict[str, object] | None
    ) -> tuple[HTTPConnection, HTTPResponse]:
        connection = self._kind(self._host, self._port, timeout=TIMEOUT_S)
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._prefix + path, data, self._headers)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise WorkersUnavailable(
                f"no server answers at {self.url} ({error}); start one with: penstock serve"
            ) from error
        if response.status != 200:
            with closing(connection):
                raise _refusal(response)
        return connection, response


def _refusal(response: HTTPResponse) -> PenstockError:
    try:
        message = str(json.load(response)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {response.status} {response.reason}"
    return WorkersUnavailable(message) if response.status >= 500 else BadRequest(message)
