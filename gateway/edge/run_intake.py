"""A nearloop.v1.RunSpec and the call's metadata -> a RunOrder that is checked all through, or one error that says all that is wrong."""

from collections.abc import Iterable
from typing import cast

from gateway import subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.edge import convert
from gateway.edge.intake import Metadata, trace_context
from gateway.edge.run_programs import Known, Programs
from gateway.edge.schema import parse_json
from gateway.edge.tensor_checks import Problems
from gateway.errors import Expired, InvalidStep
from gateway.ports import StepService
from gateway.program.model import Json
from gateway.program.problems import nearest
from gateway.program.text import MOST_DEPTH, depth
from gateway.run_types import RunOrder
from gateway.types import Kind, Payload
from nearloop.v1 import gateway_pb2 as pb

MOST_SPECULATED = 16
MOST_ALLOWED = 1000  # as many as a program can name
_CALLED = tuple(kind.value for kind in Kind if kind is not Kind.RUN)
_NOT_AN_ID = f"is not an id: {subjects.ID_RULE}"


class RunIntake:
    """Turns requests into orders. Nothing is stored and no policy is asked before an order has passed here."""

    def __init__(self, config: Config, service: StepService, clock: Clock) -> None:
        self._section = config.gateway
        self._regions = config.region_names
        self._clock = clock
        self._programs = Programs(service)

    async def order(self, message: pb.RunSpec, tenant: str, metadata: Metadata, rpc_remaining_s: float | None) -> RunOrder:
        """The order of `tenant`. rpc_remaining_s: of the call, for a run that names no timeout; None when that is not its deadline.

        Raises InvalidStep with every problem, Expired.
        """
        accepted_s = self._clock.wall_s()  # reading a program can take a while, which is part of the run's time
        problems: Problems = []
        lane = convert.LANES.get(message.lane)
        if lane is None:
            problems.append(("run.lane", f"{message.lane} is not a lane"))
        ids = (("idempotency_key", message.idempotency_key), ("region", message.region))
        problems += [(f"run.{name}", _NOT_AN_ID) for name, text in ids if text and not subjects.is_id(text)]
        if message.speculate > MOST_SPECULATED:
            problems.append(("run.speculate", f"must be at most {MOST_SPECULATED}, not {message.speculate}"))
        timeout_s = self._timeout_s(message, rpc_remaining_s, problems)
        value = self._input(message.input, problems)
        known = await self._known(message, problems)
        allow = self._allow(message.allow, known, problems)
        regions = self._region_list(message.regions, known, problems)
        if known is not None and value is not None:
            problems += known.input_problems(value[1], "run.input")
        if problems or known is None or value is None or lane is None:
            raise InvalidStep(problems)
        if timeout_s <= 0:
            raise Expired("the deadline has passed already")
        traceparent, tracestate = trace_context(metadata)
        return RunOrder(
            id="",
            tenant=tenant,
            program=known.program,
            document=known.document,
            input=value[0],
            deadline_s=accepted_s + timeout_s,
            lane=lane,
            idempotency_key=message.idempotency_key,
            client_region=message.region,
            regions=regions,
            allow=allow,
            tokens=message.tokens,
            speculate=message.speculate,
            traceparent=traceparent,
            tracestate=tracestate,
        )

    async def _known(self, message: pb.RunSpec, problems: Problems) -> Known | None:
        try:
            known = await self._programs.known(message)
        except InvalidStep as error:
            problems += error.fields
            return None
        which = message.WhichOneof("definition")
        problems += [(f"run.{which}.regions[{i}]", self._unknown(name)) for i, name in self._unknown_of(known.program.regions)]
        return known

    def _timeout_s(self, message: pb.RunSpec, rpc_remaining_s: float | None, problems: Problems) -> float:
        limit_s = self._section.max_timeout_s
        if not message.HasField("timeout"):
            return limit_s if rpc_remaining_s is None else min(limit_s, rpc_remaining_s)
        timeout_s = message.timeout.seconds + message.timeout.nanos / 1e9
        if timeout_s <= 0:
            problems.append(("run.timeout", f"must be positive, not {timeout_s:g} s"))
        elif timeout_s > limit_s:
            problems.append(("run.timeout", f"must be at most {limit_s:g} s, not {timeout_s:g} s"))
        return timeout_s

    def _input(self, message: pb.JsonValue, problems: Problems) -> tuple[Json, Payload] | None:
        """The value, and its bytes in normal form."""
        which, limit_bytes = message.WhichOneof("form"), self._section.max_input_bytes
        if which == "text" and len(message.text) > limit_bytes:  # before it is read; characters are bytes or more
            problems.append(("run.input", f"has more than {limit_bytes} bytes (gateway.max_input_bytes)"))
            return None
        try:
            value: object = {}
            if which == "text":
                value = parse_json(message.text.encode())
            elif which == "value":
                value = convert.value_from_proto(message.value)
            if depth(value) > MOST_DEPTH:
                raise ValueError(f"nests more than {MOST_DEPTH} deep")
            data = convert.dump_json(value)
        except UnicodeEncodeError:
            problems.append(("run.input", "has text that is not Unicode"))
        except ValueError as error:
            problems.append(("run.input", str(error)))
        else:
            if len(data) <= limit_bytes:
                return cast(Json, value), Payload(data)
            problems.append(("run.input", f"has {len(data)} bytes; the limit is {limit_bytes} (gateway.max_input_bytes)"))
        return None

    def _allow(self, allow: Iterable[str], known: Known | None, problems: Problems) -> tuple[str, ...]:
        """Without repetitions. A program that can call what is not on the list is refused before it runs, instead of in the middle."""
        scopes = tuple(dict.fromkeys(allow))
        if len(scopes) > MOST_ALLOWED:
            problems.append(("run.allow", f"has {len(scopes)} entries; the limit is {MOST_ALLOWED}"))
            return ()
        for index, scope in enumerate(scopes):
            kind, _, name = scope.partition(".")
            if kind not in _CALLED or not subjects.is_id(name):
                problems.append((f"run.allow[{index}]", f"must be a kind and a target, such as tool.fetch; kinds are {', '.join(_CALLED)}"))
        if scopes and known is not None:
            missing = [scope for scope in known.scopes if scope not in scopes]
            problems += [("run.allow", f"the program calls {scope}, which is not on the list") for scope in missing]
        return scopes

    def _region_list(self, regions: Iterable[str], known: Known | None, problems: Problems) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(regions))
        wrong = [(f"run.regions[{index}]", self._unknown(name)) for index, name in self._unknown_of(names)]
        problems += wrong
        if names and not wrong and known is not None and known.program.regions and not set(names) & set(known.program.regions):
            problems.append(("run.regions", f"leave none to the program, which must not leave {', '.join(known.program.regions)}"))
        return names

    def _unknown_of(self, names: Iterable[str]) -> list[tuple[int, str]]:
        return [(index, name) for index, name in enumerate(names) if name not in self._regions]

    def _unknown(self, name: str) -> str:
        return f"there is no region {name!r}{nearest(name, self._regions)}"


def check_run_id(run_id: str) -> None:
    """Raises InvalidStep for what cannot be the id of a run."""
    if not subjects.is_id(run_id):
        raise InvalidStep([("run_id", _NOT_AN_ID if run_id else "missing")])
