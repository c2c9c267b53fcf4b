"""The executor of kind `run`: one target, `program`, whose steps are whole programs.

Every inner call is a step of its own through the kernel in this process, so the same policies decide about it. A run that another runner
had before is taken over: its journal is read, fenced and replayed, and only what has no outcome in it is asked for again.
"""

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from gateway import run_record
from gateway.clock import Clock
from gateway.config import Config
from gateway.errors import InvalidStep
from gateway.placing import NO_SAVINGS, Savings
from gateway.ports import GatewayBus, NotHere, RunJournal, RunStore, Work
from gateway.program import expressions
from gateway.program.bounds import scopes
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.model import Json, Program
from gateway.program.parse import parse_program
from gateway.program.problems import ProgramInvalid
from gateway.run_types import RUN_TARGET, RunOrder
from gateway.types import Kind, Payload, Target
from workers.run_calls import CallService, RunCalls, mark_of
from workers.run_execution import RunExecution
from workers.run_guesses import GuessBudget, Guesses, GuessService
from workers.run_writer import JournalWriter

log = logging.getLogger("nearloop.runner")

KNOWN_PROGRAMS = 256
MAX_DELIVER = 50  # a run outlives many runners: its progress is in the journal
Check = Callable[[Target, Payload], list[tuple[str, str]]]


class Programs:
    """Programs that were seen lately, with their expressions compiled: the same one comes again and again."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Program] = OrderedDict()
        self._evaluations: dict[int, Evaluation] = {}  # by the identity of a known program

    def parse(self, document: object) -> Program:
        """Raises ProgramInvalid."""
        key = json.dumps(document, sort_keys=True)
        program = self._known.get(key)
        if program is None:
            program = self._known[key] = parse_program(document)
            self._evaluations[id(program)] = Evaluation(expressions)
            if len(self._known) > KNOWN_PROGRAMS:
                _, forgotten = self._known.popitem(last=False)
                del self._evaluations[id(forgotten)]
        self._known.move_to_end(key)
        return program

    def evaluation(self, program: Program) -> Evaluation:
        return self._evaluations.get(id(program)) or Evaluation(expressions)


class ProgramExecutor:
    """`region`: of this runner. may_run(order): it may be executed in this region.
    is_strained(): its calls wait for permits or are refused, so there is no room for guesses."""

    def __init__(
        self,
        config: Config,
        name: str,
        region: str,
        service: CallService,
        bus: GatewayBus,
        store: RunStore,
        clock: Clock,
        random: Callable[[], float],
        check: Check,
        savings: Callable[[RunOrder], Savings] = lambda order: NO_SAVINGS,
        *,
        is_strained: Callable[[], bool] = lambda: False,
        may_run: Callable[[RunOrder], bool] = lambda order: True,
    ) -> None:
        self._config = config
        self._name = name
        self._region = region
        self._service = service
        self._bus = bus
        self._store = store
        self._clock = clock
        self._random = random
        self._check = check
        self._savings = savings
        self._may_run = may_run
        self._programs = Programs()
        self._guess_budget = GuessBudget(is_strained)

    async def start(self) -> None:
        """Nothing to connect: the kernel's bus is started with the worker."""

    async def close(self) -> None: ...

    def targets(self) -> Sequence[Target]:
        return [
            Target(
                Kind.RUN,
                RUN_TARGET,
                "executes programs",
                home_region=self._config.region_names[0],
                slots=self._config.worker.runs,
                timeout_s=self._config.gateway.max_timeout_s,
                idempotent=True,
                max_deliver=MAX_DELIVER,
            )
        ]

    def ready(self, target: str) -> bool:
        return True

    async def execute(self, work: Work) -> Payload:
        """Raises InvalidStep for what no gateway wrote, LeaseLost, NotHere, and what RunExecution.go raises."""
        step = work.step
        order = self._order(work)
        if not self._may_run(order):  # its own region's runners are gone, and it must not leave
            raise NotHere
        keep_s = max(0.0, step.deadline_s - self._clock.wall_s()) + self._config.nats.result_keep_s
        journal = self._store.journal(work.queue_region, step.tenant, step.id, keep_s)
        hearing = asyncio.create_task(self._bus.hear(mark_of(step.id)), name="hear of a run's steps")
        try:
            entries = await journal.read() if work.again else ()
            execution, writer = self._execution(work, order, journal, keep_s)
            if work.again:
                if entries:
                    log.info("run %s: taken over with %d entries", step.id, len(entries))
                await writer.fence()
            return await execution.go(entries)  # what is sent before it is heard of is answered by its worker
        finally:
            hearing.cancel()
            heard = (await asyncio.gather(hearing, return_exceptions=True))[0]
            if not isinstance(heard, BaseException):
                await heard.close()

    def _order(self, work: Work) -> RunOrder:
        step = work.step
        try:
            return run_record.read(
                step.input.data, id=step.id, tenant=step.tenant, deadline_s=step.deadline_s, lane=step.lane, parse=self._programs.parse
            )
        except (ValueError, KeyError, TypeError, ProgramInvalid) as error:
            raise InvalidStep([("step.input", f"is not a run: {type(error).__name__}")]) from None

    def _execution(self, work: Work, order: RunOrder, journal: RunJournal, keep_s: float) -> tuple[RunExecution, JournalWriter]:
        writer = JournalWriter(work.step, self._name, journal, self._store, keep_s, self._clock, self._random)
        engine = Engine(order.program, order.input, self._programs.evaluation(order.program), self._schemas(order.program))
        calls = RunCalls(order, self._region, self._name, self._service, self._clock, self._random, self._check)
        execution = RunExecution(
            work,
            engine,
            calls,
            writer,
            self._store,
            self._name,
            self._region,
            self._clock,
            self._random,
            tokens=order.tokens,
            savings=self._savings(order),
            guesses=self._guesses(work, order, engine) if order.speculate else None,
        )
        return execution, writer

    def _guesses(self, work: Work, order: RunOrder, engine: Engine) -> Guesses:
        calls = RunCalls(order, self._region, self._name, GuessService(self._service), self._clock, self._random, self._check)
        return Guesses(order.speculate, engine, calls, self._service, self._guess_budget, tokens=order.tokens, again=work.again)

    def _schemas(self, program: Program) -> dict[str, Json]:
        """Of what agents may call, for their models to see."""
        found: dict[str, Json] = {}
        for scope in scopes(program):
            kind, _, name = scope.partition(".")
            target = self._service.target(Kind(kind), name)
            if target is not None and target.input_schema is not None:
                found[scope] = json.loads(json.dumps(target.input_schema))
        return found
