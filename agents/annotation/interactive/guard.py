"""Who may talk to the app: this machine, or those who have the token; and how much they send."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

#: Names of this machine.
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_COOKIE = "sam_gym_token"


class Guard:
    """ASGI middleware that refuses requests of strangers, of other pages, and of large bodies.

    A page of another site that is open in the same browser could reach a loopback address: the
    `Host` has to be one of `hosts`, an `Origin` the app itself, and no other site may embed it.

    Args:
        app: the application.
        token: secret that each request has to bring, once as ?token= and then as a cookie; None:
            no secret.
        hosts: names under which the app may be addressed; None: any.
        max_body: bound on the bytes of a request.
    """

    def __init__(
        self, app: Application, token: str | None, hosts: frozenset[str] | None, max_body: int
    ) -> None:
        self.app, self.token, self.hosts, self.max_body = app, token, hosts, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        status = self._refusal(headers, query)
        if status is not None:
            await _refuse(scope, send, status)
        elif self.token is not None and "token" in query and scope["type"] == "http":
            await self._remember(send)
        else:
            await self.app(scope, self._bounded(receive), send)

    def _refusal(self, headers: dict[str, str], query: dict[str, list[str]]) -> HTTPStatus | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname
            same = origin is None or urlsplit(origin).netloc == host
        except ValueError:
            return HTTPStatus.BAD_REQUEST
        # Requests without an `Origin`: frames, images and scripts of other sites, but no links.
        site, kind = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-dest")
        embedded = site not in ("none", "same-origin") and kind != "document"
        if not same or embedded or (self.hosts is not None and name not in self.hosts):
            return HTTPStatus.FORBIDDEN
        if self.token is not None:
            brought = [*query.get("token", []), *_tokens(headers.get("cookie", ""))]
            if not any(
                secrets.compare_digest(own.encode(), self.token.encode()) for own in brought
            ):
                return HTTPStatus.UNAUTHORIZED
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        return None

    async def _remember(self, send: Send) -> None:
        """Answer with the token as a cookie, and send the browser to the address without it."""
        cookie = f"{_COOKIE}={quote(self.token or '', safe='')}; Path=/; HttpOnly; SameSite=Strict"
        headers = [(b"location", b"/"), (b"set-cookie", cookie.encode())]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body"})

    def _bounded(self, receive: Receive) -> Receive:
        """Hang up on a body that is longer than it said."""
        left = self.max_body

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            if message["type"] == "http.request":
                left -= len(message.get("body", b""))
                if left < 0:
                    return {"type": "http.disconnect"}
            return message

        return bounded


def _tokens(header: str) -> list[str]:
    """Return the tokens in a `Cookie` header; other servers of this host may add what they like."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return [unquote(value) for name, _, value in pairs if name == _COOKIE and value]


async def _refuse(scope: Scope, send: Send, status: HTTPStatus) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    text = {
        HTTPStatus.UNAUTHORIZED: "Open the address that the app printed: it holds the token.",
        HTTPStatus.FORBIDDEN: "Open the address that the app printed.",
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "The file is too large (--max-upload-mib).",
    }.get(status, status.phrase)
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": int(status), "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
