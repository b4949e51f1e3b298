"""`alpro search --serve`: a page with a search box.

Everything that touches the model or the shards is done by one thread, one request after the other. What a browser can
ask for is a query, or a frame by the number of its clip in the index: no path is ever made of what it sends.
"""

import asyncio
import errno
import functools
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from alpro_launch.search_view import hit_values, search_page, served
from alpro_stream.errors import AlproError, ConfigError
from alpro_stream.evaluate.search import Searcher, check_query
from alpro_stream.pages import render_search

T = TypeVar("T")

MAX_TOP = 100
_KEPT_CLIPS = 128
_SHUTDOWN_S = 2.0
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Another index on the same port has other clips under these addresses.
    "Cache-Control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, before anything slow is begun.

    Raises:
        ConfigError: the port is taken or none, or this machine has no such address.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port}: expected 0 to 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {port} of {host} is taken by another program; give another one by --port"
            ) from error
        raise ConfigError(f"cannot listen at {host}, port {port} ({error}); correct --host and --port") from error


def serve(listener: socket.socket, host: str, open_searcher: Callable[[], Searcher], top: int, rerank: int) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Args:
        listener: from `listen`.
        host: as it was named.
        open_searcher: called in the thread that searches.
        top: hits of a page.
        rerank: as in `Searcher.search`.

    Raises:
        AlproError: index or model cannot be opened.
    """
    # What is no HTTP is answered with 400; that is no error of this program, with a traceback.
    logging.getLogger("aiohttp.server").addFilter(_is_own_error)
    with ThreadPoolExecutor(1, "search") as thread:
        searcher = thread.submit(open_searcher).result()
        try:
            port = listener.getsockname()[1]
            shown = f"[{host}]" if ":" in host else host
            print(f"{len(searcher.index)} clips at http://{shown}:{port}/ (Ctrl-C ends it)", flush=True)
            app = SearchServer(searcher, thread, host, top, rerank).app()
            web.run_app(app, sock=listener, print=None, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        finally:
            thread.submit(searcher.close).result()
    print("stopped", flush=True)


def _is_own_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


class SearchServer:
    """The pages of a search.

    Args:
        searcher: with clips; used by `thread` alone.
        thread: of one worker.
        host: as it was named.
        top: hits of a page.
        rerank: as in `Searcher.search`.
    """

    def __init__(self, searcher: Searcher, thread: ThreadPoolExecutor, host: str, top: int, rerank: int) -> None:
        self._searcher = searcher
        self._thread = thread
        self._host = host
        self._top = min(top, MAX_TOP)
        self._rerank = rerank
        # A page asks for the frames of a clip one by one, and they are decoded together.
        assert searcher.clips is not None
        self._pictures = functools.lru_cache(_KEPT_CLIPS)(searcher.clips.pictures)
        self._look_up = functools.partial(served, searcher.clips)

    def app(self) -> web.Application:
        """The application, for `aiohttp.web.run_app`."""
        app = web.Application(middlewares=[self._guard])
        app.router.add_get("/", self._page)
        app.router.add_get("/api/search", self._api)
        app.router.add_get("/clip/{number:[0-9]{1,12}}/{frame:[0-9]{1,3}}.jpg", self._frame)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Refuses what was meant for another site, and gives every answer its headers."""
        try:
            # A page elsewhere may have its own name point here (DNS rebinding); it cannot change what is asked for.
            if is_loopback(self._host) and not is_loopback(_name_of(request.host)):
                raise web.HTTPForbidden(text="this server is for this machine: ask for it as localhost")
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(_HEADERS)
            raise
        response.headers.update(_HEADERS)
        return response

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, functools.partial(function, *arguments))

    async def _page(self, request: web.Request) -> web.Response:
        query = request.query.get("q", "")
        html, status = await self._in_thread(self._render, query)
        return web.Response(text=html, content_type="text/html", status=status)

    async def _api(self, request: web.Request) -> web.Response:
        try:
            query = check_query(request.query.get("q", ""))
            hits = await self._in_thread(self._values, query, _top_of(request.query.get("top"), self._top))
        except AlproError as error:
            return web.json_response({"error": str(error)}, status=_status_of(error))
        return web.json_response({"query": query, "num_clips": len(self._searcher.index), "hits": hits})

    async def _frame(self, request: web.Request) -> web.Response:
        number, frame = int(request.match_info["number"]), int(request.match_info["frame"])
        if number >= len(self._searcher.index):
            raise web.HTTPNotFound(text=f"no clip {number}: there are {len(self._searcher.index)}, from 0")
        try:
            pictures = await self._in_thread(self._pictures, number)
        except AlproError as error:
            raise web.HTTPNotFound(text=f"the clip cannot be read: {error}") from error
        if frame >= len(pictures):
            raise web.HTTPNotFound(text=f"no frame {frame}: the clip has {len(pictures)}, from 0")
        return web.Response(body=pictures[frame].jpeg, content_type="image/jpeg")

    def _values(self, query: str, top: int) -> list[dict[str, Any]]:
        hits = self._searcher.search(query, top, self._rerank)
        return [hit_values(rank, hit, self._look_up) for rank, hit in enumerate(hits, start=1)]

    def _render(self, query: str) -> tuple[str, int]:
        hits, error, status = [], "", 200
        if query:
            try:
                hits = self._searcher.search(query, self._top, self._rerank)
            except AlproError as problem:
                error, status = str(problem), _status_of(problem)
        page = search_page(self._searcher, query, hits, self._look_up, error=error, is_served=True)
        return render_search(page), status


def _top_of(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_TOP):
        raise ConfigError(f"top={text[:20]!r}: expected a number from 1 to {MAX_TOP}")
    return int(text)


def _status_of(error: AlproError) -> int:
    """Whether the question was at fault, or the data."""
    return 400 if isinstance(error, ConfigError) else 500


def _name_of(host: str) -> str:
    """The host of a ``Host`` header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
