"""Compares things: an agent researches each of them, a model judges until it is sure, and a record of a sure verdict is written."""

from gateway.program.build import Budget, Kind, Program, Retry, Tool, null

p = Program("compare", regions=["home", "iad"], description="Researches several things at a time and compares what was found.")

with p.map("research", p.input.things, item="thing", at_once=4, most=10) as research:
    asked = f"What is known about {research.item}? {p.input.question}"
    found = p.agent(
        "find",
        "plan",
        messages=[{"role": "system", "content": "Answer with the tools. Cite pages by id."}, {"role": "user", "content": asked}],
        tools={
            "search": Tool(Kind.RETRIEVE, "docs", 'Pages about a text: {"text": ...}'),
            "fetch": Tool(Kind.TOOL, "fetch", 'A page: {"id": ...}'),
        },
        budget=Budget(iterations=6, cost=40, tokens=20_000, wall_s=60),
    )
    p.tool("note", "note", thing=research.item, text=found.answer, retry=Retry(3, first_s=0.05), fallback=None)

notes = research.output.filter(lambda note: note != null)

with p.loop("judge", lambda loop: (loop.last == null) | (loop.last.confidence < 0.8), maximum=3, stop_quietly=True) as judge:
    p.infer("verdict", "judge", notes=notes, before=judge.last, lane="interactive", timeout_s=20)

verdict = judge.output
with p.when("sure", verdict.confidence >= 0.8) as sure:
    p.tool("record", "record", text=f"{p.input.question} {verdict.best}, after {research.output.size()} searches")

p.output(best=verdict.best, is_recorded=sure.output != null, notes=notes.map(lambda note: note.id))
program = p.build()
