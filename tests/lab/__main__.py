"""`make lab`: every policy against its oracle, in a simulation over the gateway's own policy objects and decisions.

    make lab                                          all scenarios, with the default policies
    make lab ARGS="A1 A2"                             some
    make lab ARGS="A1 --policy my_module:MyPolicy"    with somebody's policy in place of the default ones of its slot

The numbers are means over the seeds with a 95 % confidence interval. A control is a policy that is known to be bad and has to miss the
target: a target that it reached would show nothing. Ends with 1 when a target is missed.
"""

import argparse
import difflib
import importlib
import json
import pkgutil
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from gateway.errors import ConfigError
from gateway.policy import PolicyType
from tests.bench import machine
from tests.lab import report
from tests.lab.scenario import Measured, Scenario, Stack

FOLDER = Path(__file__).parent


def modules() -> dict[str, str]:
    """Names of modules by scenario, from the files: a1_overload.py has A1."""
    found = {}
    for module in pkgutil.iter_modules([str(FOLDER)]):
        if match := re.fullmatch(r"([a-z]\d)_\w+", module.name):
            found[match[1].upper()] = f"tests.lab.{module.name}"
    return dict(sorted(found.items()))


def scenario(name: str) -> Scenario:
    found: Scenario = importlib.import_module(modules()[name]).SCENARIO
    return found


def policy_type(spec: str) -> PolicyType:
    """`module:Name`: a PolicyType, a class that one of the module's policy types builds, or the name of one. Raises ValueError."""
    module_name, _, name = spec.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"--policy {spec}: {module_name!r} cannot be imported ({why}); it is looked for here and on PYTHONPATH") from None
    named = getattr(module, name, None)
    if isinstance(named, PolicyType):
        return named
    brought: list[PolicyType] = list(module.nearloop_policy_types()) if hasattr(module, "nearloop_policy_types") else []
    fitting = [one for one in brought if name in ("", one.name) or (named is not None and one.build is named)]
    if len(fitting) == 1:
        return fitting[0]
    there = ", ".join(one.name for one in brought) or "none"
    raise ValueError(f"--policy {spec}: {name or 'nothing'!r} is no policy type and no class that one builds; {module_name} brings {there}")


def stack_of(spec: str | None) -> Stack:
    """Raises ValueError, and ConfigError for a policy that the gateway would refuse as well."""
    if spec is None:
        return Stack()
    chosen = policy_type(spec)
    extra = () if chosen in Stack().types().values() else (chosen,)
    return Stack(extra=extra).with_({"use": chosen.name}, name=chosen.name)


def play(name: str, spec: str | None, seed: int, quick: bool) -> list[Measured]:
    """One seed of one scenario, in a process of its own."""
    return scenario(name).run(stack_of(spec), seed, quick)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="SCENARIO", help=f"of {', '.join(modules())}; all without")
    parser.add_argument("--policy", metavar="MODULE:NAME", help="in place of the default policies of its slot")
    parser.add_argument("--seeds", type=int, help="how many (by scenario, mostly 5)")
    parser.add_argument("--quick", action="store_true", help="one seed and short runs: numbers that mean little")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there as well")
    options = parser.parse_args()
    options.names = [name.upper() for name in options.names] or list(modules())
    for name in options.names:
        if name not in modules():
            close = difflib.get_close_matches(name, modules(), n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(modules())}"
            parser.error(f"there is no scenario {name!r}; {hint}")
    if options.seeds is not None and options.seeds < 1:
        parser.error("--seeds must be at least 1")
    sys.path.insert(0, str(Path.cwd()))
    try:
        stack_of(options.policy).build()
    except (ValueError, ConfigError) as error:
        parser.error(str(error))
    return options


def seeds_of(options: argparse.Namespace) -> tuple[dict[str, range], list[str]]:
    """Seeds by scenario, and what is wrong with those that cannot be imported: they do not keep the others from running."""
    seeds, failures = {}, []
    for name in options.names:
        try:
            own = scenario(name).seeds
        except Exception as error:
            failures.append(f"{name}: {modules()[name]} cannot be imported: {type(error).__name__}: {error}")
        else:
            seeds[name] = range(1, (1 if options.quick else options.seeds or own) + 1)
    return seeds, failures


def run_all(options: argparse.Namespace) -> tuple[list[report.Row], list[str]]:
    """The rows, and what could not be measured. Costs are real time, so what measures them has the machine for itself, at the end."""
    began_s = time.monotonic()
    seeds, failures = seeds_of(options)
    measured: dict[str, list[Measured]] = {name: [] for name in sorted(seeds)}
    for names, workers in (([name for name in seeds if name[0] != "G"], 2), ([name for name in seeds if name[0] == "G"], 1)):
        with ProcessPoolExecutor(workers) as pool:
            jobs = {pool.submit(play, name, options.policy, seed, options.quick): (name, seed) for name in names for seed in seeds[name]}
            for number, job in enumerate(as_completed(jobs), 1):
                name, seed = jobs[job]
                try:
                    measured[name] += job.result()
                except Exception as error:
                    failures.append(f"{name}, seed {seed}: {type(error).__name__}: {error}")
                print(f"  {number}/{len(jobs)}  {name} seed {seed}  {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)
    return [row for name, found in measured.items() for row in report.rows(name, found)], failures


def main() -> int:
    options = parse_arguments()
    began_s = time.monotonic()
    about = machine.describe()
    print(f"{about['cpu']}, {about['cores']} cores, Python {about['python']}", flush=True)
    found, failures = run_all(options)
    print("\n" + report.text(found))
    bad = [row for row in found if row.bad]
    judged = [row for row in found if row.target is not None]
    print(f"\n{len(judged) - len(bad)} of {len(judged)} verdicts as they should be; took {time.monotonic() - began_s:.0f} s")
    for failure in failures:
        print(f"NOT MEASURED {failure}")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": report.document(found), "failures": failures}, indent=1) + "\n")
    return 1 if bad or failures else 0


if __name__ == "__main__":
    sys.exit(main())
