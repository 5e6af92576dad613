"""Who may ask a viewer: programs on this machine that know its token, by GET.

Pages of other sites cannot: they do not know the token, and a name of theirs that leads to this machine (DNS
rebinding) is refused by the Host header. What the page may load is only what comes from here.
"""

from __future__ import annotations

import hmac

from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOSTS = ("127.0.0.1", "localhost")
_EMPTY = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='"  # of an inline style of nothing, see index.html
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' {empty}; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors {ancestors}"
)
_HEADERS = {
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # an address of the page holds the token
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """An application behind ``/TOKEN``, for GET and HEAD.

    Parameters
    ----------
    application
        What answers those who may ask.
    token
        The first part of every path.
    framed
        Whether pages on this machine, such as Jupyter's, may show the page in a frame.
    """

    def __init__(self, application: ASGIApp, token: str, *, framed: bool = False) -> None:
        self._application, self._token = application, token.encode()
        ancestors = " ".join(f"http://{host}:*" for host in HOSTS) if framed else "'none'"
        self._headers = {**_HEADERS, "Content-Security-Policy": _POLICY.format(empty=_EMPTY, ancestors=ancestors)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or refuse to."""
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
        if scope["type"] != "http":
            return  # there are no web sockets here

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self._headers)
            await send(message)

        await self._choose(scope)(scope, receive, send_with_headers)

    def _choose(self, scope: Scope) -> ASGIApp:
        token, slash, _ = scope["path"].removeprefix("/").partition("/")
        if not hmac.compare_digest(token.encode("utf-8", "surrogateescape"), self._token) or not slash:
            return PlainTextResponse("This address lacks the token: take the one that nested-ats view printed.", 403)
        if scope["method"] not in ("GET", "HEAD"):
            return PlainTextResponse("Nothing can be changed here.", 405, {"Allow": "GET, HEAD"})
        scope["root_path"] = f"/{token}"
        return self._application


def guarded(application: ASGIApp, token: str, *, framed: bool = False) -> ASGIApp:
    """Put a `Guard` before an application, and refuse requests by other host names."""
    return TrustedHostMiddleware(Guard(application, token, framed=framed), HOSTS, www_redirect=False)
