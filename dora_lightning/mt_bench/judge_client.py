"""A chat completion from any address that speaks OpenAI's protocol."""

from __future__ import annotations

import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import SplitResult, urlsplit

from dora_lightning.messages import check_real, check_whole

Ask = Callable[[str, str], str]
"""``ask(system, user)`` -> what the judge says."""


OPENAI_HOST, OPENAI_VARIABLE = "api.openai.com", "OPENAI_API_KEY"


_RETRIED = (408, 409, 429)
_LONGEST_REPLY = 2**24


def key_for(api: str, variable: str | None) -> str | None:
    """The key to send to an address, from the environment.

    Args:
        api: the address.
        variable: environment variable that holds the key of this very address; None for ``OPENAI_API_KEY`` if the
            address is OpenAI's, and no key anywhere else.

    Raises:
        ValueError: the variable is not set, or holds what cannot be a key. The message does not show it.
    """
    where = _parts(api)
    if variable is None:
        if where.hostname != OPENAI_HOST:
            return None
        variable = OPENAI_VARIABLE
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"the key of {api} is read from the environment variable {variable}, which is not set")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"the environment variable {variable} holds no key: expected printable ASCII without spaces")
    return key


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
        key: sent as bearer token, if given, to this address and nowhere else: redirects are not followed. It is taken
            out of whatever the address replies.
        request: fields of the request to change or add; null leaves one out, as
            ``{"max_tokens": null, "max_completion_tokens": 2048}`` does for models that want the newer name.
        timeout: seconds to wait for an answer.
        attempts: how often to ask where the address is busy or out of reach.
        wait: seconds before the second attempt, doubled with each one more.

    Raises:
        ValueError: the address is no http(s) address, or would get the key unencrypted over a network.
    """
    check_real(above=0, timeout=timeout)
    check_real(0, wait=wait)
    check_whole(1, attempts=attempts)
    where = _parts(api)
    loopback = _is_loopback(where.hostname or "")
    if key and where.scheme != "https" and not loopback:
        raise ValueError(
            f"api {api} is not encrypted, and a key is sent over https alone, or to this machine; use an https "
            "address, or leave the key out"
        )
    url = api.rstrip("/") + "/chat/completions"
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    fields = {"model": model, "temperature": 0, "max_tokens": 2048} | dict(request or {})
    fields = {name: value for name, value in fields.items() if value is not None}
    # what is meant for this machine goes through no proxy
    opener = urllib.request.build_opener(_NoRedirects, *([urllib.request.ProxyHandler({})] if loopback else []))

    def shown(text: str) -> str:
        return text.replace(key, "(key)") if key else text

    def ask(system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = json.dumps(fields | {"messages": messages}).encode()
        for attempt in range(attempts):
            if attempt:
                time.sleep(wait * 2 ** (attempt - 1))
            try:
                with opener.open(urllib.request.Request(url, body, headers), timeout=timeout) as reply:
                    return _content(shown(reply.read(_LONGEST_REPLY).decode(errors="replace")), url)
            except urllib.error.HTTPError as error:
                text = error.read(_LONGEST_REPLY).decode(errors="replace")
                reason = f"{error.code} {shown(error.reason)}: {shown(text)[:300]}"
                if 300 <= error.code < 400:
                    raise OSError(f"{url} sends the request elsewhere, which is not followed: {reason}") from None
                if error.code not in _RETRIED and error.code < 500:
                    raise OSError(f"{url} refused the request: {reason}") from None
            except (OSError, HTTPException) as error:  # out of reach, too slow, or cut short
                reason = shown(str(error))
        raise OSError(f"{url} gave no answer in {attempts} attempts; the last: {reason}")

    return ask


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would send the key along to wherever a redirect points."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none."""
        return


def _parts(api: str) -> SplitResult:
    try:
        parts = urlsplit(api)
        usable = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        )  # a port may be no number
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(f"api must be an http(s) address, such as http://localhost:8000/v1, got {api!r}")
    if "@" in parts.netloc:
        raise ValueError("api holds a user's name or password; give the key by key_variable")
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _content(reply: str, url: str) -> str:
    try:
        content = json.loads(reply)["choices"][0]["message"]["content"]
        if not isinstance(content, str):
            raise TypeError(f"the content is {content!r:.80}")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise ValueError(f"{url} answered with no chat completion: {reply[:300]!r}") from error
    return content.encode("utf-8", "replace").decode()  # half of a surrogate pair could be written to no file
