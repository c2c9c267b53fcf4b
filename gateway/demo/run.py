"""`nearloop demo`: the whole stack, agents that answer questions through it, and a clean stop.

The corpus is the standard library of the running interpreter, embedded by the `embed` model and indexed through the `stdlib` target;
the external API is an HTTP service. `plan` decides, `judge` evaluates, nothing is looked up beforehand. Clients and gateway are in the
region home, everything that is called is in iad: two nats-servers with a relay between them that delays what crosses.
"""

import asyncio
import importlib.resources
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import Progress

from gateway import addresses, config, parts
from gateway.client import NearloopClient
from gateway.config import Config
from gateway.demo import agent, corpus, loop, view
from gateway.demo.backend import Backend, Ledger, index
from gateway.demo.questions import QUESTIONS
from gateway.edge import probes
from gateway.errors import NearloopError
from gateway.supervisor import Part
from gateway.up import Stack, interrupts

REGIONS = ("home", "iad")
WAN_S = {"iad": 0.08}
AGENTS = "{} agents think, search, call the API and judge, all at once"
WORKERS = (("infer", "iad"), ("tool", "iad"), ("retrieve", "iad"), ("run", "home"), ("run", "iad"))


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """ask replaces the built-in questions; keep leaves the stack running until Ctrl-C."""

    ask: tuple[str, ...] = ()
    keep: bool = False


def demo_config(docs_port: int) -> Config:
    """The demo's configuration with the address of its documentation API."""
    text = importlib.resources.files("gateway.demo").joinpath("demo.toml").read_text()
    return config.loads(text.replace("127.0.0.1:8099", f"127.0.0.1:{docs_port}"), "demo.toml")


def docs_part(port: int) -> Part:
    """The external API of the demo, as a part of the stack."""
    url = f"http://127.0.0.1:{port}"
    return parts.python_part(
        "docs-api",
        *("gateway.demo.docs_api", "--port", str(port)),
        probe=lambda: probes.http_ready(f"{url}/healthz"),
        address=f"{url}, the external API",
    )


async def run_demo(options: DemoOptions, console: Console | None = None) -> int:
    """Returns the exit code: 0 when every agent came to an end, 1 when one failed."""
    console = console or view.make_console()
    docs_port = addresses.free_port()

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    say("Two regions: home has the agents and their gateway; iad has the models, the vector store and an API to call.")
    say(f"The distance is simulated: a relay between their nats-servers delays what crosses, {WAN_S['iad'] * 1000:g} ms to and fro.\n")
    stack = Stack(demo_config(docs_port), on_line=say, workers=WORKERS, extra=[docs_part(docs_port)], regions=REGIONS, wan=WAN_S)
    with interrupts(stack.kill_now) as stop:  # around everything: while the stack stops, Ctrl-C must not break it off half-way
        if not await _unless(stop, stack.__aenter__()):
            say("Stopped.")
            return 130
        try:
            shown = asyncio.create_task(_show(options, stack, console))
            if not await _unless(stop, shown):
                say("Stopped.")
                return 130
            if options.keep:
                say("\nStill running; Ctrl-C stops.")
                await stop.wait()
            say("\nStopping everything ...")
        finally:
            await stack.__aexit__(None, None, None)
    say("Stopped: no process, port or file is left.")
    return shown.result()


async def _unless(stop: asyncio.Event, work: Awaitable[object]) -> bool:
    """Waits until the work is done, or until a stop was asked for: then cancels the work and answers False. Raises what the work raises."""
    working = asyncio.ensure_future(work)
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
    if not working.done():
        working.cancel()
        await asyncio.wait({working})
        return False
    stopped.cancel()
    working.result()
    return True


async def _show(options: DemoOptions, stack: Stack, console: Console) -> int:
    questions = options.ask or QUESTIONS
    async with NearloopClient(stack.gateway_address, region=loop.ORIGIN) as client:
        await build_index(client, console)
        who = "1 agent thinks, searches, calls the API and judges" if len(questions) == 1 else AGENTS.format(len(questions))
        console.print(f"\n{who}; each call is an Execute of its client at home:")
        ledger = Ledger()
        began_s = time.perf_counter()
        with view.View(console, questions) as live:
            outcomes = await ask_all(client, questions, ledger, live)
        wall_s = time.perf_counter() - began_s
        view.show_answers(console, [outcome for outcome in outcomes if isinstance(outcome, agent.Answer)])
        failures = [(question, outcome) for question, outcome in zip(questions, outcomes, strict=True) if isinstance(outcome, Exception)]
        for question, error in failures:
            console.print(f"{question}: {type(error).__name__}: {error}", style="red", markup=False)
        view.show_times(console, ledger, wall_s, len(questions))
        compared = not failures and await _compare(client, questions[0], console)
        view.show_further(console, stack.nats_url_file, stack.gateway_address, loop.PROGRAM)
    return 0 if compared else 1


async def _compare(client: NearloopClient, question: str, console: Console) -> bool:
    """Shows one question's loop driven in both ways; False when one of them failed."""
    console.print(f"\nThe same loop, driven by its client and as one run: {question}", style="bold", markup=False)
    try:
        view.show_both(console, await loop.compare(client, question))
    except (NearloopError, agent.AgentError) as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return False
    return True


async def build_index(client: NearloopClient, console: Console) -> None:
    """Embeds the corpus through the gateway."""
    began_s = time.perf_counter()
    entries = await asyncio.to_thread(corpus.build)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"Indexing {len(entries)} docstrings of this Python", total=len(entries))
        await index(client, entries, lambda done: progress.update(task, completed=done))
    took_s = time.perf_counter() - began_s
    console.print(f"Indexed {len(entries)} docstrings of this Python's standard library in {took_s:.1f} s.", highlight=False)


async def ask_all(
    client: NearloopClient, questions: Sequence[str], ledger: Ledger, live: view.View | None = None
) -> list[agent.Answer | BaseException]:
    """One agent for each question, all at once."""

    async def one(number: int, question: str) -> agent.Answer:
        backend = Backend(client, ledger, run=f"agent-{number + 1}")
        return await agent.answer(
            question,
            plan=backend.plan,
            search=backend.search,
            lookup=backend.lookup,
            judge=backend.judge,
            on_event=(lambda kind, detail: live.event(number, kind, detail)) if live else None,
        )

    outcomes = await asyncio.gather(*(one(number, question) for number, question in enumerate(questions)), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, NearloopError | agent.AgentError):
            raise outcome
    return outcomes
