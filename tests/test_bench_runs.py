"""The benches of runs: that they ask for what they say, without their minutes of measuring."""

import argparse
import asyncio
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from gateway.program import agent
from gateway.program.model import Agent, Call
from gateway.program.parse import parse_program
from tests.bench import api_server, durable, loop, regions, run_client

OPTIONS = argparse.Namespace(calls=2, tool_ms=5.0)
MODEL = Path(loop.__file__).parent / "models/agent/1/model.py"


@pytest.mark.parametrize("text", [durable.program(1), durable.program(durable.STEPS), regions.program()])
def test_each_call_takes_the_output_of_the_one_before(text: str) -> None:
    program = parse_program(json.loads(text))
    for before, call in zip(program.steps, program.steps[1:], strict=False):
        assert isinstance(call, Call)
        assert f"steps.{before.id}.output" in json.dumps(json.loads(text)["steps"][program.steps.index(call)]["input"])


def test_the_agents_model_asks_for_its_tool_and_then_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    spec = importlib.util.spec_from_file_location("bench_agent_model", MODEL)
    assert spec is not None
    assert spec.loader is not None
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    (node,) = parse_program(json.loads(loop.program(OPTIONS))).steps
    assert isinstance(node, Agent)
    messages = [loop.first_message(OPTIONS)]
    for number in range(OPTIONS.calls):
        wanted = agent.understand(json.loads(model.think(agent.request(messages, [], 9, 9, 9.0))), node.tools)
        assert isinstance(wanted, agent.ToolCalls)
        (call,) = wanted.calls
        assert call.input == {"number": number, "seconds": 0.005}
        messages += [wanted.message, {"role": "tool", "call": call.id, "tool": call.tool, "output": {"number": number}}]
    last = agent.understand(json.loads(model.think(agent.request(messages, [], 9, 9, 9.0))), node.tools)
    assert last == agent.Answer(list(range(OPTIONS.calls)))


def test_the_models_costs_are_those_that_the_bench_compares_with() -> None:
    text = (MODEL.parents[1] / "config.pbtxt").read_text()
    assert f"max_batch_size: {loop.ROWS}\n" in text
    assert f'"fixed_ms" value: {{ string_value: "{loop.FIXED_MS:g}" }}' in text
    assert f'"each_ms" value: {{ string_value: "{loop.EACH_MS:g}" }}' in text
    assert f"count: {loop.INSTANCES} " in text


async def test_the_api_answers_requests_that_come_in_pieces_or_together() -> None:
    server = await asyncio.get_running_loop().create_server(api_server.Connection, "127.0.0.1", 0)
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        request = b'POST /next HTTP/1.1\r\nHost: a\r\nContent-Length: 8\r\n\r\n{"n": 3}'
        writer.write(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n" + request + request[:60])
        writer.write(request[60:])
        bodies = []
        for _ in range(3):
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.partition(b"Content-Length: ")[2].split(b"\r\n")[0])
            bodies.append(await reader.readexactly(size))
        writer.close()
        await writer.wait_closed()
    assert bodies == [b"", b'{"n": 4}', b'{"n": 4}']


async def test_a_closed_loop_counts_what_failed_apart() -> None:
    outcomes = iter([True, False] * 100_000)

    async def once() -> bool:
        await asyncio.sleep(0.001)
        if next(outcomes):
            return True
        raise run_client.NearloopError("not 5 but 6")

    found = await run_client.closed(once, 2, 0.0, 0.2)
    assert len(found.latencies_s) == len(found.results) > 0
    assert list(found.failed) == [f"{run_client.NearloopError.code}: not # but #"]
