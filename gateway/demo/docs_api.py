"""The demo's external API: an HTTP service on the loopback that knows the standard library's documentation.

GET /v1/names/{name}   {"name", "kind", "module", "signature", "doc"}, or 404 with {"error"}
GET /healthz           {"status": "ok", "names": N}
POST /v1/ledger        needs the header Idempotency-Key; answers {"key", "calls": of this key}, ?delay_ms=N later than it counted
GET /v1/ledger         {"keys": distinct keys, "calls": all calls, "repeated": {key: calls}}

The ledger lets a test count effects: a step that ran twice shows as a repeated key.
"""

import argparse
import asyncio
import signal
from collections import Counter
from pathlib import Path

from aiohttp import web

from gateway.demo.corpus import Entry, build

MAX_KEY_CHARS = 200
MAX_DELAY_MS = 60_000
_ENTRIES = web.AppKey("entries", dict[str, Entry])


class Ledger:
    """How often each idempotency key was seen; kept in `path`, a line a call, when one is given."""

    def __init__(self, path: Path | None = None) -> None:
        self._calls: Counter[str] = Counter()
        if path and path.exists():
            self._calls.update(path.read_text(encoding="utf-8").splitlines())
        self._file = path.open("a", encoding="utf-8", buffering=1) if path else None  # a line at a time: survives kill -9

    def record(self, key: str) -> int:
        """Count one call; returns how many this key has now."""
        self._calls[key] += 1
        if self._file:
            self._file.write(f"{key}\n")
        return self._calls[key]

    def report(self) -> dict[str, object]:
        repeated = {key: calls for key, calls in sorted(self._calls.items()) if calls > 1}
        return {"keys": len(self._calls), "calls": self._calls.total(), "repeated": repeated}

    def close(self) -> None:
        if self._file:
            self._file.close()


_LEDGER = web.AppKey("ledger", Ledger)


def make_app(entries: list[Entry], ledger: Ledger) -> web.Application:
    """The service over these entries; the ledger is closed with it."""
    app = web.Application()
    app[_ENTRIES] = {entry.name: entry for entry in entries}
    app[_LEDGER] = ledger
    app.router.add_get("/v1/names/{name}", _get_name)
    app.router.add_get("/healthz", _get_health)
    app.router.add_post("/v1/ledger", _post_ledger)
    app.router.add_get("/v1/ledger", _get_ledger)
    app.on_cleanup.append(_close)
    return app


async def _get_name(request: web.Request) -> web.Response:
    entry = request.app[_ENTRIES].get(request.match_info["name"])
    if entry is None:
        return web.json_response({"error": "no such name in the standard library"}, status=404)
    return web.json_response({key: getattr(entry, key) for key in ("name", "kind", "module", "signature", "doc")})


async def _get_health(request: web.Request) -> web.Response:
    return web.json_response({"status": "ok", "names": len(request.app[_ENTRIES])})


async def _post_ledger(request: web.Request) -> web.Response:
    key = request.headers.get("Idempotency-Key", "")
    if not key or len(key) > MAX_KEY_CHARS or not key.isprintable():
        return web.json_response({"error": f"Idempotency-Key: 1 to {MAX_KEY_CHARS} printable characters"}, status=400)
    delay_ms = request.query.get("delay_ms", "0")
    if not delay_ms.isdecimal() or int(delay_ms) > MAX_DELAY_MS:
        return web.json_response({"error": f"delay_ms: 0 to {MAX_DELAY_MS}"}, status=400)
    calls = request.app[_LEDGER].record(key)
    await asyncio.sleep(int(delay_ms) / 1000)  # the effect is there, its answer is not: the moment in which a caller must not die
    return web.json_response({"key": key, "calls": calls})


async def _get_ledger(request: web.Request) -> web.Response:
    return web.json_response(request.app[_LEDGER].report())


async def _close(app: web.Application) -> None:
    app[_LEDGER].close()


async def serve(port: int, port_file: Path | None, ledger_path: Path | None) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT; port 0 takes a free one. `port_file` appears when all is ready."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    entries = await asyncio.to_thread(build)
    runner = web.AppRunner(make_app(entries, Ledger(ledger_path)), access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        bound = runner.addresses[0][1]
        if port_file:
            fresh = port_file.with_name(f"{port_file.name}.new")
            fresh.write_text(f"{bound}\n")
            fresh.replace(port_file)  # a reader never sees half a number
        print(bound, flush=True)  # noqa: T201  (this is the command's answer)
        await stop.wait()
    finally:
        await runner.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -P -m gateway.demo.docs_api", description="The demo's external API.")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free port")
    parser.add_argument("--port-file", type=Path, help="written with the bound port when the service is ready")
    parser.add_argument("--ledger-file", type=Path, help="keeps the ledger over restarts")
    arguments = parser.parse_args()
    try:
        asyncio.run(serve(arguments.port, arguments.port_file, arguments.ledger_file))
    except OSError as error:
        parser.exit(1, f"docs_api could not listen on 127.0.0.1:{arguments.port}: {error.strerror}; choose another port\n")


if __name__ == "__main__":
    main()
