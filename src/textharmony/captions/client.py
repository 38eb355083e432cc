"""Requests to OpenAI-compatible endpoints by openai's client, with the limits that it does not set itself."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import aclosing, suppress
from typing import Any

import httpx2
import openai

_LARGEST_ANSWER = 8 << 20  # bytes
_HEADERS = {"host", "content-type", "content-length", "authorization", "idempotency-key"}


class Client:
    """Sends requests from any thread; redirects, proxies and the environment variables of openai have no effect."""

    def __init__(self, url: str, key: str, timeout: float) -> None:
        self._url, self._timeout = _parse(url), timeout
        self.host = self._url.host
        self._certificates = ssl.create_default_context()
        self._authorization = f"Bearer {key}" if key else openai.Omit()

    def complete_chat(self, body: dict[str, Any], idempotency_key: str) -> httpx2.Response:
        """Return the response to one request, whatever its status, cut after 8 MiB; raise OSError if there is none."""
        try:
            # httpx2 limits the time of each read: only a cancelled task ends a request whose answer drips.
            return asyncio.run(asyncio.wait_for(self._post(body, idempotency_key), self._timeout))
        except asyncio.TimeoutError:
            raise TimeoutError(f"no whole answer within {self._timeout:g} s") from None
        except openai.APIConnectionError as error:
            cause: BaseException = error
            while deeper := cause.__cause__ or cause.__context__:
                cause = deeper
            raise ConnectionError(f"{type(cause).__name__}: {cause}") from None

    async def _post(self, body: dict[str, Any], idempotency_key: str) -> httpx2.Response:
        async with openai.AsyncOpenAI(
            api_key="unused",  # without one, openai takes OPENAI_API_KEY
            base_url=self._url.copy_with(query=None),
            timeout=None,
            max_retries=0,
            http_client=httpx2.AsyncClient(transport=_Transport(verify=self._certificates), trust_env=False),
        ) as client:
            try:
                path = f"chat/completions?{self._url.query.decode()}".rstrip("?")
                options = openai.RequestOptions(
                    headers={"Authorization": self._authorization, "Idempotency-Key": idempotency_key}
                )
                return await client.post(path, cast_to=httpx2.Response, body=body, options=options)
            except openai.APIStatusError as error:
                return error.response


class _Transport(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        for name in set(request.headers) - _HEADERS:  # some come from OPENAI_CUSTOM_HEADERS and other variables
            del request.headers[name]
        request.headers["Accept-Encoding"] = "identity"
        response, content = await super().handle_async_request(request), bytearray()
        async with aclosing(response):
            async for chunk in response.aiter_raw():  # openai and httpx2 would read a body of any length
                content += chunk
                if len(content) > _LARGEST_ANSWER:
                    break
        headers = {"Retry-After": response.headers.get("Retry-After", "")}
        return httpx2.Response(response.status_code, headers=headers, content=bytes(content))


def _parse(url: str) -> httpx2.URL:
    with suppress(httpx2.InvalidURL):
        parsed = httpx2.URL(url)
        valid = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 0) < 1 << 16
        if valid and not parsed.userinfo and is_visible(url):
            return parsed
    shown = "...@" + url.rpartition("@")[2] if "@" in url else url
    raise ValueError(f"endpoint is {shown!r}, expected http(s)://host/v1 in visible ASCII, and no login in it")


def is_visible(text: str) -> bool:
    """Tell whether a text is ASCII without spaces and control characters."""
    return all("!" <= character <= "~" for character in text)
