"""What a request must get past before anything of it is read: the key, where it comes from, and its size."""

import hmac
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from launch.serve.schemas import failure

_OPEN, _PAGE = ("/", "/health"), "/page/"  # without a key: the page, which asks for it, and whether the service lives
_NAMES = ("localhost", "127.0.0.1", "::1")


class Guard:
    """Middleware. Without a key, requests of web pages from elsewhere are refused, whatever name they use."""

    def __init__(self, app: ASGIApp, *, key: str | None, most: int) -> None:
        self._app, self._most = app, most
        self._key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is not None:
            return await refusal(scope, receive, send)
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._most:
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, bounded, send)

    @property
    def _too_large(self) -> str:
        return f"the body has more than the {self._most:,} bytes that are taken: send a smaller file"

    def _refusal(self, path: str, headers: Headers) -> JSONResponse | None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self._most:
            return JSONResponse(failure(self._too_large, code="too_large"), 413)
        if self._key is None:
            host = urlsplit(f"//{headers.get('host', '')}").hostname
            origin = headers.get("origin")
            if host not in _NAMES or (origin is not None and urlsplit(origin).netloc != headers.get("host")):
                return JSONResponse(failure("requests of other sites are not answered", code="forbidden"), 403)
        elif path not in _OPEN and not path.startswith(_PAGE):
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, self._key):
                text = "the key is missing or wrong: send Authorization: Bearer KEY"
                body = failure(text, kind="authentication_error", code="invalid_api_key")
                return JSONResponse(body, 401, {"WWW-Authenticate": "Bearer"})
        return None
