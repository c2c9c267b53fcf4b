"""Does a policy keep the contract? For authors of policies; Nearloop's own are checked by it too.

In a test:

    from gateway.conformance import PolicyConformance

    class TestMine(PolicyConformance):
        policy_type = my_policy.TYPE

or `for finding in check_policy(TYPE): ...`, or `nearloop plugins check my_policy`.
"""

import ast
import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway import loader
from gateway.conformance_play import Broken, Play
from gateway.conformance_size import Cost, measure, sizes
from gateway.policy import Admit, PolicyType, ScopeView, Slot

__all__ = ["RULES", "Cost", "Finding", "PolicyConformance", "check_policy", "check_rule", "measure"]

IMPURE = {"time", "random", "secrets", "asyncio", "threading", "socket", "logging", "datetime", "os", "uuid", "subprocess"}
STEPS, SEEDS = 300, (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Finding:
    """rule is one of RULES or "cost"; message is a sentence that names the policy."""

    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.message}"


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy type with a configuration, as the rules see it. keys: distinct tenants after which its size is looked at; far_keys: where it
    is looked at again when it grew between the first two, since its bound may lie above them."""

    type: PolicyType
    config: Any
    keys: tuple[int, int] = (20_000, 100_000)
    far_keys: tuple[int, int] = (100_000, 250_000)

    def build(self) -> Any:
        return self.type.build(self.config)

    def play(self, seed: int = 1, **how: Any) -> Play:
        return Play(self.type.slot, self.build(), seed, **how)


# ---- rules: each gives sentences about what is wrong ---------------------------------------------------------------------------


def _documented(subject: Subject) -> list[str]:
    """The configuration is frozen, has defaults and says what its parameters are; the type says in a few words what it does."""
    kind, found = subject.type.config, []
    if not subject.type.summary:
        found.append("it has no summary: say in a few words what it does")
    doc = inspect.cleandoc(kind.__doc__ or "")
    if not doc or doc.startswith(f"{kind.__name__}("):  # what dataclass makes up
        found.append(f"{kind.__name__} has no docstring: say what its parameters are, with units")
    if not kind.__dataclass_params__.frozen:
        found.append(f"{kind.__name__} is not frozen: use @dataclass(frozen=True)")
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if needed:
        found.append(f"{', '.join(needed)} of {kind.__name__} has no default: a policy must work when it is only named")
    return found


def _signatures(subject: Subject) -> list[str]:
    """It has every method of its slot, with the right parameters."""
    return loader.method_problems(subject.type.slot, subject.build())


def _pure(subject: Subject) -> list[str]:
    """Its module imports nothing that reads clocks, rolls dice, waits or writes: time and randomness are arguments."""
    module = sys.modules.get(type(subject.build()).__module__)
    try:
        tree = ast.parse(inspect.getsource(module)) if module else ast.Module([], [])
    except (OSError, TypeError):
        return []
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return [f"its module imports {name}: time and randomness are arguments, and a policy does no I/O" for name in sorted(names & IMPURE)]


def _deterministic(subject: Subject) -> list[str]:
    """The same calls are answered in the same way."""
    for seed in SEEDS:
        one, two = (subject.play(seed).run(STEPS).answers for _ in range(2))
        for number, (first, second) in enumerate(zip(one, two, strict=True)):
            if first != second:
                return [f"answer {number} to the same calls was {first!r} by one object and {second!r} by another"]
    return []


def _answers_in_range(subject: Subject) -> list[str]:
    """It raises nothing and answers no nonsense, whatever it is asked."""
    for seed in SEEDS:
        subject.play(seed).run(STEPS)
        subject.play(seed, fresh=True).run(STEPS)
    return []


def _leaves_input_alone(subject: Subject) -> list[str]:
    """It does not change what it is given."""
    subject.play(watch=True).run(STEPS)
    return []


def _survives_still_time(subject: Subject) -> list[str]:
    """It works while time stands still, from 0 on."""
    subject.play(still=True).run(STEPS)
    return []


def _bounded_state(subject: Subject) -> list[str]:
    """It does not remember every tenant and run that it ever saw."""
    few, many, small, large = 0, 0, 0, 0
    for (few, many), growth in ((subject.keys, 1.25), (subject.far_keys, 1.6)):
        small, large = sizes(subject.type.slot, subject.build(), (few, many))
        if large <= small * growth + 4096:
            return []
    return [f"it holds {small // 1024} KiB after {few} tenants and {large // 1024} KiB after {many}: drop the least recently used ones"]


def _releases(subject: Subject) -> list[str]:
    """What was reserved and released can be reserved again."""
    if subject.type.slot is not Slot.ADMISSION:
        return []
    play = subject.play().run(20)
    untouched = play._policy
    released = copy.deepcopy(untouched)
    flow, view = dataclasses.replace(play.flow(), cost=1.0), ScopeView("tool.x", 1, 8, 0, 0.0, 10.0, 0.1, 0.1)
    for _ in range(200):
        decision = released.decide(flow, view, play.now_s, 0.5)
        if not isinstance(decision, Admit):
            break
        released.release(flow, decision.state, play.now_s)

    def admits(policy: Any) -> int:
        return sum(isinstance(policy.decide(flow, view, play.now_s, 0.5), Admit) for _ in range(100))

    after, before = admits(released), admits(untouched)
    if after < before - max(1, before // 10):
        return [f"it admits {after} of 100 steps after 200 that were reserved and released, and {before} without them"]
    return []


def _reconfigures(subject: Subject) -> list[str]:
    """reconfigure() with the same parameters changes nothing, with others it goes on working. A policy need not have it."""
    if not hasattr(subject.build(), "reconfigure"):
        return []
    same, other = subject.play(), subject.play()
    for _ in range(3):
        same.run(STEPS // 3)
        other.run(STEPS // 3)
        other._policy.reconfigure(subject.config)
    if same.run(STEPS).answers != other.run(STEPS).answers:
        return ["reconfigure() with the parameters that it has already changed its answers: its state must stay"]
    for config in _others(subject.config):
        play = subject.play().run(STEPS // 3)
        play._policy.reconfigure(config)
        try:
            play.run(STEPS // 3)
        except Broken as error:
            return [f"after reconfigure({config}): {error}"]
    return []


def _others(config: Any) -> list[Any]:
    """The configuration with one number halved or doubled, where that is allowed."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        for factor in (0.5, 2):
            try:
                found.append(dataclasses.replace(config, **{field.name: type(value)(value * factor)}))
            except (ValueError, OverflowError):
                continue
    return found


RULES: Mapping[str, Callable[[Subject], list[str]]] = {
    "documented": _documented,
    "signatures": _signatures,
    "pure": _pure,
    "deterministic": _deterministic,
    "answers_in_range": _answers_in_range,
    "leaves_input_alone": _leaves_input_alone,
    "survives_still_time": _survives_still_time,
    "bounded_state": _bounded_state,
    "releases": _releases,
    "reconfigures": _reconfigures,
}


# ---- entries -------------------------------------------------------------------------------------------------------------------


def check_rule(rule: str, policy_type: PolicyType, config: Any = None, **more: Any) -> list[Finding]:
    """What one of RULES finds; nothing when the policy keeps to it. config: default, the type's defaults."""
    try:
        subject = Subject(policy_type, policy_type.config() if config is None else config, **more)
        found = RULES[rule](subject)
    except Broken as error:
        found = [str(error)]
    except Exception as error:
        found = [f"{type(error).__name__}: {error}"]
    return [Finding(rule, f"policy {policy_type.name}: {one}") for one in found]


def check_policy(policy_type: PolicyType, config: Any = None) -> list[Finding]:
    """What is wrong with a policy, all rules; a policy that lacks methods or defaults is not tried any further. Takes some seconds."""
    found = [finding for rule in ("documented", "signatures", "pure") for finding in check_rule(rule, policy_type, config)]
    if check_rule("signatures", policy_type, config):
        return found
    return found + [finding for rule in list(RULES)[3:] for finding in check_rule(rule, policy_type, config)]


class PolicyConformance:
    """For pytest: a subclass whose name begins with Test sets policy_type, and config when the defaults are not what matters."""

    policy_type: PolicyType
    config: Any = None

    def _check(self, rule: str) -> None:
        found = check_rule(rule, self.policy_type, self.config)
        assert not found, "\n".join(map(str, found))

    def test_is_documented(self) -> None:
        self._check("documented")

    def test_has_the_methods_of_its_slot(self) -> None:
        self._check("signatures")

    def test_is_pure(self) -> None:
        self._check("pure")

    def test_is_deterministic(self) -> None:
        self._check("deterministic")

    def test_answers_in_range(self) -> None:
        self._check("answers_in_range")

    def test_leaves_its_input_alone(self) -> None:
        self._check("leaves_input_alone")

    def test_survives_still_time(self) -> None:
        self._check("survives_still_time")

    def test_keeps_its_state_bounded(self) -> None:
        self._check("bounded_state")

    def test_releases_what_it_reserves(self) -> None:
        self._check("releases")

    def test_reconfigures(self) -> None:
        self._check("reconfigures")
