"""A chat completion from any address that speaks OpenAI's protocol."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

Ask = Callable[[str, str], str]
"""``ask(system, user)`` -> what the judge says."""

_RETRIED = (408, 409, 429)


def chat_client(
    api: str,
    model: str,
    key: str | None = None,
    request: Mapping[str, Any] | None = None,
    timeout: float = 300.0,
    attempts: int = 6,
    wait: float = 2.0,
) -> Ask:
    """What asks a model at an address, at temperature 0 for up to 2,048 tokens, as FastChat asks its judge.

    Args:
        api: the address that ``/chat/completions`` stands behind, such as ``http://localhost:8000/v1``.
        model: name of the model there.
        key: sent as bearer token, if given.
        request: fields of the request to change or add; null leaves one out, as
            ``{"max_tokens": null, "max_completion_tokens": 2048}`` does for models that want the newer name.
        timeout: seconds to wait for an answer.
        attempts: how often to ask where the address is busy or out of reach.
        wait: seconds before the second attempt, doubled with each one more.

    Raises:
        ValueError: the address is no http(s) address.
    """
    if not api.startswith(("http://", "https://")):
        raise ValueError(f"api must be an http(s) address, such as http://localhost:8000/v1, got {api!r}")
    url = api.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    fields = {"model": model, "temperature": 0, "max_tokens": 2048} | dict(request or {})
    fields = {name: value for name, value in fields.items() if value is not None}

    def ask(system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = json.dumps(fields | {"messages": messages}).encode()
        for attempt in range(attempts):
            if attempt:
                time.sleep(wait * 2 ** (attempt - 1))
            try:
                with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=timeout) as reply:
                    return _content(reply.read(), url)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.reason}: {error.read().decode(errors='replace')[:300]}"
                if error.code not in _RETRIED and error.code < 500:
                    raise OSError(f"{url} refused the request: {reason}") from error
            except OSError as error:  # out of reach, or too slow
                reason = str(error)
        raise OSError(f"{url} gave no answer in {attempts} attempts; the last: {reason}")

    return ask


def _content(reply: bytes, url: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError(f"the content is {content!r:.80}")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{url} answered with no chat completion: {reply[:300].decode(errors='replace')!r}") from error
    return content
