"""Executes a program without doing anything: it is told what happened, and says what to do next.

A runner gives it events (journal.py) and performs the commands (commands.py) that it answers with:

    engine = Engine(program, input, evaluation)
    commands = engine.start()
    ...                                    for each event: append it to the journal, and then
    commands = engine.apply(event)         ... until engine.ended is set

State follows from program, input and events alone: there is no clock and no chance in it. A runner that takes a run over gives the
journal's events to a new engine with `replay` and performs what is `outstanding`: calls whose outcome nobody wrote down. They are asked
for again, so a target sees a call at least once; nothing that has an outcome is asked for again.

Keys. A call's key is its node's id and the index of each iteration that it is in, outermost first: `read`, `read/3`, `read/3.0`. An
agent is a loop: its model is asked as `think/2` (iteration 2) and calls tools as `think/2/search.1` (the second call of that answer).
Keys are unique in the run, the same whenever it is repeated, and made of `[A-Za-z0-9_./-]` where ids are. `<run>/<key>` is the
idempotency key that a tool is given, with every attempt the same.

Order. The calls that may run at the same time are started in the order of the program, at most `program.at_once` of them. Whichever ends
first, the output of a run that does not fail is the same. When several calls fail for good, the first one in the journal fails the run.

Steps. What counts against `most_steps` is calls, also to an agent's model and tools, but not their further attempts.

Work. All evaluations of a run together do no more than `most_work` units; the run fails with TOO_MUCH_WORK at the one that needs more, and
that is the same one when it is replayed.

Values are shared, not copied: inputs, outputs and events are not to be changed by anybody.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from gateway.program.allowance import MOST_RUN_WORK
from gateway.program.commands import Cancel, Command, Fail, Finish, StartCall, Wait
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Cancelled, Event, TimerFired
from gateway.program.lookahead import Ahead, Lookahead, ReadsOnly
from gateway.program.machine import Machine
from gateway.program.model import Json, Program
from gateway.program.problems import RunFailed

NO_SCHEMAS: Mapping[str, Json] = MappingProxyType({})


class Engine:
    """One run of a program that was checked.

    schemas: of targets' inputs, by scope such as `tool.docs`, for the models of agents to see. ended: None until the run has.
    """

    def __init__(
        self,
        program: Program,
        input: Json,
        evaluation: Evaluation,
        schemas: Mapping[str, Json] = NO_SCHEMAS,
        most_work: int = MOST_RUN_WORK,
    ) -> None:
        self._machine = Machine(program, input, evaluation, schemas, most_work)
        self._lookahead = Lookahead(self._machine, evaluation)
        self.ended: Finish | Fail | None = None

    def start(self) -> list[Command]:
        """Once, before anything else."""
        return self._advance(None)

    def apply(self, event: Event) -> list[Command]:
        """What to do now that this has happened; nothing when the run has ended before.

        Raises JournalMismatch for the outcome of a call (or an attempt) that is not under way; the engine is then as it was.
        """
        return [] if self.ended else self._advance(event)

    def replay(self, events: Iterable[Event]) -> None:
        """Start and apply all; then see `outstanding` and `ended`. Raises JournalMismatch when they are not of such a run."""
        self.start()
        for event in events:
            self.apply(event)

    def outstanding(self) -> list[StartCall | Wait]:
        """What has been asked of the runner and has no outcome yet."""
        return [*(wait for wait, _ in self._machine.waits.values()), *self._machine.calls.under_way()]

    def outputs(self) -> dict[str, Json]:
        """By key, what the nodes gave that have completed, in the blocks that are open; also after the run has failed. What finished
        iterations gave is forgotten here: `journal.completed_outputs` has it."""
        return dict(self._machine.outputs)

    def progress(self) -> dict[str, Json]:
        """For people: {"steps_done": n, "running": [keys], "queued": n, "iterations": {key of a loop or agent: index}}."""
        machine = self._machine
        running: list[Json] = [*machine.calls.running()]
        return {"steps_done": machine.steps_done, "running": running, "queued": machine.calls.queued, "iterations": {**machine.iterations}}

    def ahead(self, reads_only: ReadsOnly, most: int) -> list[Ahead]:
        """Calls that may come later and could be made now, those first that are sure to come: see `lookahead`. Each is told once.

        reads_only(kind, target): calling it changes nothing, by what is known now. The state of the run does not change, and its
        allowance of work is not used. Not while another thread takes a turn.
        """
        return self._lookahead.calls(reads_only, most)

    def may_come(self, ahead: Ahead) -> bool:
        """Can the call still be asked for? False as well once it has been."""
        return self._lookahead.may_come(ahead)

    def _advance(self, event: Event | None) -> list[Command]:
        machine = self._machine
        try:
            if isinstance(event, Cancelled):
                raise RunFailed("", event.reason, "CANCELLED")
            if isinstance(event, TimerFired):
                machine.fired(event.key)
            elif event is not None:
                machine.outcome(event)
            machine.go_on()
        except RunFailed as error:
            return self._fail(error)
        commands, machine.commands = machine.commands, []
        if commands and isinstance(commands[-1], Finish):
            self.ended = commands[-1]
        return commands

    def _fail(self, error: RunFailed) -> list[Command]:
        """What was asked for in this very turn has not reached the runner: it is taken back. The rest is cancelled."""
        machine = self._machine
        fresh = {command.key for command in machine.commands if isinstance(command, StartCall | Wait)}
        dropped = [command for command in machine.commands if isinstance(command, Cancel) and command.key not in fresh]
        keys = [asked.key for asked in self.outstanding() if asked.key not in fresh]
        machine.stop()
        self.ended = Fail(error)
        return [*dropped, *(Cancel(key) for key in keys), self.ended]
