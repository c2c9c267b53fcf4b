"""The sessions of a gateway: how many there may be, and the pool of credits that they share."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable

from gateway.config import GatewaySection
from gateway.edge.intake import Intake
from gateway.edge.refusals import OVERLOADED_RETRY_S, Load
from gateway.edge.session import Context, Session
from gateway.errors import Rejected, Unavailable
from gateway.ports import StepService

LOOK_EVERY_S = 1.0
END_TIMEOUT_S = 5.0  # for sessions that were cancelled
IDLE_S = 5.0  # the unused credits of a session that has done nothing for so long do not count: others may have them as well


class Sessions:
    """Implements `session.Pool`."""

    def __init__(self, section: GatewaySection, service: StepService, intake: Intake, load: Load) -> None:
        self._limit, self._stall_s = section.max_sessions, section.session_stall_s
        self._service, self._intake, self._load = service, intake, load
        self._open: set[Session] = set()
        self._by_tenant: Counter[str] = Counter()
        self._granted = 0  # credits that sessions hold, idle ones left out
        self._draining = False
        self._looking: asyncio.Task[None] | None = None
        self._none_open = asyncio.Event()
        self._none_open.set()

    async def serve(self, tenant: str, metadata: Iterable[tuple[str, str | bytes]], context: Context) -> None:
        """Returns when the client is done. Raises Rejected (too many sessions), Unavailable, and what ended the session."""
        if self._draining:
            raise _draining()
        self._check(tenant)
        session = Session(tenant, context, metadata, self._service, self._intake, self._load, self)
        session.active_s = asyncio.get_running_loop().time()
        self._open.add(session)
        self._none_open.clear()
        self._by_tenant[tenant] += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look_forever(), name="look after sessions")
        try:
            await session.run()
        finally:
            self._open.discard(session)
            self._by_tenant[tenant] -= 1
            if not self._by_tenant[tenant]:
                del self._by_tenant[tenant]
            if session.counts:
                self._granted -= session.held
            if not self._open:
                self._none_open.set()
                if self._looking is not None:
                    self._looking.cancel()
                    self._looking = None

    def drain(self) -> None:
        self._draining = True
        for session in list(self._open):
            session.close(_draining())

    async def wait_ended(self) -> None:
        """Returns when no session is open, so that what their end has to do has been done."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT_S):
                await self._none_open.wait()

    # ---- what sessions ask -----------------------------------------------------------------------------------------------------

    def window(self, session: Session) -> int:
        tenant_sessions = self._by_tenant[session.tenant]
        return self._service.window(session.tenant, len(self._open), tenant_sessions, self._granted, session.outstanding)

    def hold(self, session: Session, change: int) -> None:
        if session.counts:
            self._granted += change

    def active(self, session: Session) -> None:
        session.active_s = asyncio.get_running_loop().time()
        if not session.counts:
            session.counts = True
            self._granted += session.held

    # ---- inside ----------------------------------------------------------------------------------------------------------------

    def _check(self, tenant: str) -> None:
        of_tenant = max(1, self._limit // 2)
        if len(self._open) >= self._limit:
            raise _too_many(f"{self._limit} sessions are open, as many as this gateway takes (gateway.max_sessions)", "gateway")
        if self._by_tenant[tenant] >= of_tenant:
            raise _too_many(f"the tenant has {of_tenant} sessions open, half of gateway.max_sessions", f"tenant:{tenant}")

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._look(asyncio.get_running_loop().time())

    def _look(self, now_s: float) -> None:
        for session in list(self._open):
            if session.write_began_s is not None and now_s - session.write_began_s > self._stall_s:
                session.stalled(self._stall_s)
            elif session.counts and not session.outstanding and now_s - session.active_s > IDLE_S:
                session.counts = False
                self._granted -= session.held
            if not session.left:  # whoever still has credits can wait for its next answer
                session.renew()


def _draining() -> Unavailable:
    return Unavailable("this gateway drains: open a session on another one", reason="GATEWAY_DRAINS", retry_after_s=0.0)


def _too_many(message: str, scope: str) -> Rejected:
    return Rejected(message, reason="TOO_MANY_SESSIONS", scope=scope, retry_after_s=OVERLOADED_RETRY_S)
