"""Who may talk to the server: those who hold the token, from a page of its own, by a name that is its own."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Middleware. The token comes as ?token= when the page is opened, then as a cookie; programs send it as a bearer.

    once: a second token, with which the page can be opened one time; "" for none.

    A name that is neither an address nor this machine's own is refused, since a page elsewhere may have its name point here;
    so is a change that a page of another origin asks for.
    """

    def __init__(self, app: ASGIApp, token: str, port: int, once: str = ""):
        self.app, self.token, self.once, self.cookie = app, token, once, f"dmm_fast_{port}"
        self.names = {"localhost", socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        told = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        enters = request.url.path == "/" and self._enters(told)

        async def add_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
                if enters:
                    headers.append("Set-Cookie", f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict")
            await send(message)

        if refusal := self._refusal(request, enters):
            await JSONResponse({"error": refusal[1]}, refusal[0])(scope, receive, add_headers)
        else:
            await self.app(scope, receive, add_headers)

    def _refusal(self, request: Request, enters: bool) -> tuple[int, str] | None:
        host = request.headers.get("host", "")
        if not self._own(host):
            return 421, f"the Host {host!r} is not this server's"
        bearer = request.headers.get("authorization", "").removeprefix("Bearer ")
        cookie = SimpleCookie()
        try:
            cookie.load(request.headers.get("cookie", ""))
        except CookieError:
            cookie.clear()
        held = cookie[self.cookie].value if self.cookie in cookie else ""
        if not (enters or self._same(bearer) or self._same(held)):
            return 403, "the token is missing or wrong: open the address that dmm-fast app has printed"
        origin = request.headers.get("origin")
        foreign = origin is not None and origin != f"http://{host}"
        if foreign or request.headers.get("sec-fetch-site", "same-origin") in ("cross-site", "same-site") and not enters:
            return 403, f"a page of another origin ({origin}) may not talk to this server"
        if request.method not in ("GET", "HEAD") and origin is None and not self._same(bearer):
            return 403, "a change needs an Origin, or the token as a bearer"
        return None

    def _enters(self, token: str) -> bool:
        if self.once and secrets.compare_digest(token.encode(), self.once.encode()):
            self.once = ""
            return True
        return self._same(token)

    def _same(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())

    def _own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in self.names
