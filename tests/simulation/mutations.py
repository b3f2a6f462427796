"""Small bugs drawn by chance, one line each, and whether the tests or the simulation notice them.

    python tests/simulation mutate                      draw, try, and write tests/simulation/mutations.json

Each is planted into a copy of the sources; the narrow unit tests of its file run first, then seeds of the
simulation. What survives both is named in the results, with the reason that somebody has written beside it there.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from plants import ROOT, SOURCES, copied_tree, simulation

RESULTS = ROOT / "tests/simulation/mutations.json"
NUM_SEEDS = 40  # of the simulation, for what the unit tests let through
UNIT_TIMEOUT_S = 240.0
SIMULATION_TIMEOUT_S = 900.0
UNEXPLAINED = "not explained yet"

# Where mutations are drawn from, and the tests that are nearest to each part.
AREAS: dict[str, tuple[str, ...]] = {
    "shared/kvferry/wire/*.py": ("tests/unit/wire",),
    "shared/kvferry/kv/*.py": ("tests/unit/kv",),
    "shared/kvferry/schedule/*.py": ("tests/unit/schedule", "tests/unit/prefill", "tests/unit/decode"),
    "services/gateway/kvferry_gateway/streams/stream.py": ("tests/unit/gateway",),
    "services/gateway/kvferry_gateway/flights/flight.py": ("tests/unit/gateway",),
    "services/gateway/kvferry_gateway/streams/attempt.py": ("tests/unit/gateway",),
    "services/gateway/kvferry_gateway/streams/told.py": ("tests/unit/gateway",),
    "services/gateway/kvferry_gateway/streams/dispatcher.py": ("tests/unit/gateway",),
    "shared/kvferry/worker/handoff/incoming.py": ("tests/unit/worker/handoff",),
    "shared/kvferry/worker/handoff/landing.py": ("tests/unit/worker/handoff",),
    "shared/kvferry/worker/handoff/outgoing.py": ("tests/unit/worker/handoff",),
    "shared/kvferry/worker/handoff/pump.py": ("tests/unit/worker/handoff",),
}

FLIPS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One line of one file, before and after."""

    file: str
    line: int
    kind: str
    before: str
    after: str


@dataclass(frozen=True)
class Trial:
    mutation: Mutation
    caught_by: str = ""  # "unit tests", "simulation"; empty: it survives
    detail: str = ""
    why_it_survives: str = ""


def mutations_of(file: str) -> list[Mutation]:
    """All that can be done to a file. What changes no behaviour by design is left out: logs and assertions."""
    source = (ROOT / file).read_text()
    lines = source.splitlines()
    found: list[Mutation] = []
    for node, kind, mutated in _candidates(ast.parse(source)):
        if node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1]
        text = f"({ast.unparse(mutated)})" if isinstance(mutated, ast.BoolOp) else ast.unparse(mutated)
        after = line[: node.col_offset] + text + line[node.end_col_offset :]
        if line.isascii() and after != line and "log." not in line:
            found.append(Mutation(file, node.lineno, kind, line.strip(), after.strip()))
    return list(dict.fromkeys(found))


def _candidates(tree: ast.Module) -> Iterator[tuple[ast.expr | ast.stmt, str, ast.expr | ast.stmt]]:
    for owner in ast.walk(tree):
        if not isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for statement in owner.body:
            for node in _inside(statement):
                yield from _mutated(node)


def _inside(node: ast.AST) -> Iterator[ast.AST]:
    """A statement and all that runs as a part of it, function by function."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Assert):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _inside(child)


def _mutated(node: ast.AST) -> Iterator[tuple[ast.expr | ast.stmt, str, ast.expr | ast.stmt]]:
    match node:
        case ast.Compare(left, [operator], [right]) if type(operator) in FLIPS:
            yield node, "comparison", ast.Compare(left, [FLIPS[type(operator)]()], [right])
        case ast.Constant(value=int(number)) if not isinstance(number, bool):
            yield node, "off by one", ast.Constant(number + 1)
        case ast.BoolOp(operator, values):
            other = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield node, "and/or", ast.BoolOp(other, values)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if not _is_constant(test):
            yield test, "negated", ast.UnaryOp(ast.Not(), test)
        case ast.Expr(value=ast.Call() | ast.Await()) | ast.AugAssign():
            yield node, "dropped", ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "dropped", ast.Pass()


def _is_constant(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant)


def drawn(seed: int, count: int) -> list[Mutation]:
    """Each part of the code is as likely as any other, and then each kind of mutation within it."""
    chance = random.Random(f"mutations {seed}")
    by_area = {
        area: [mutation for path in sorted(ROOT.glob(area)) for mutation in mutations_of(str(path.relative_to(ROOT)))]
        for area in AREAS
    }
    chosen: dict[Mutation, None] = {}
    while len(chosen) < count:
        pool = by_area[chance.choice(list(AREAS))]
        kind = chance.choice(sorted({mutation.kind for mutation in pool}))
        chosen[chance.choice([mutation for mutation in pool if mutation.kind == kind])] = None
    return list(chosen)


def try_out(mutation: Mutation, root: Path, num_processes: int) -> Trial:
    """Plant it into the tree and look who notices."""
    path = root / mutation.file
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    line = lines[mutation.line - 1]
    if line.strip() != mutation.before:
        raise AssertionError(f"{mutation.file}:{mutation.line} has changed")
    lines[mutation.line - 1] = line.replace(mutation.before, mutation.after)
    path.write_text("".join(lines))
    try:
        if (test := _failing_test(_nearest_tests(mutation), root)) is not None:
            return Trial(mutation, "unit tests", test)
        arguments = ("--seeds", str(NUM_SEEDS), "--processes", str(num_processes), "--first-failure")
        try:
            run = simulation(root, "sweep", *arguments, timeout=SIMULATION_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Trial(mutation, "simulation", "it does not end")
        if run.returncode:
            said = [line for line in run.stdout.splitlines() if line.startswith("seed ")]
            return Trial(mutation, "simulation", (said or run.stderr.splitlines()[-1:] or ["?"])[0][:200])
        return Trial(mutation)
    finally:
        path.write_text(before)


def _nearest_tests(mutation: Mutation) -> tuple[str, ...]:
    return next(tests for area, tests in AREAS.items() if (ROOT / mutation.file) in set(ROOT.glob(area)))


def _failing_test(tests: tuple[str, ...], root: Path) -> str | None:
    """The first of these tests to fail; None if all pass."""
    path = os.pathsep.join(str(root / source) for source in SOURCES)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        run = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=UNIT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return "they do not end"
    if run.returncode == 0:
        return None
    failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
    return (failed or ["they do not run"])[0].split(" - ")[0]


def mutate(seed: int, count: int, num_processes: int, *, resume: bool = False) -> int:
    """Try them all, print each, write the results. Returns how many survive. `resume`: those of before stand."""
    known = {_key(trial.mutation): trial for trial in _trials_of_before()}
    trials: list[Trial] = []
    with copied_tree() as root:
        shutil.copytree(ROOT / "tests/unit", root / "tests/unit", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        sound: dict[tuple[str, ...], None] = {}
        for mutation in drawn(seed, count):
            before = known.get(_key(mutation))
            if resume and before is not None:
                trials.append(replace(before, mutation=mutation))
                continue
            tests = _nearest_tests(mutation)
            if tests not in sound and (test := _failing_test(tests, root)) is not None:
                raise AssertionError(f"fails without any mutation: {test}")
            sound[tests] = None
            began = time.monotonic()
            trial = try_out(mutation, root, num_processes)
            if not trial.caught_by:
                reason = "" if before is None else before.why_it_survives
                trial = replace(trial, why_it_survives=reason or UNEXPLAINED)
            trials.append(trial)
            print(
                f"{trial.caught_by or 'SURVIVES'}: {mutation.file}:{mutation.line} {mutation.before!r} -> "
                f"{mutation.after!r} {trial.detail} ({time.monotonic() - began:.0f} s)",
                flush=True,
            )
            _write(seed, trials)
    _write(seed, trials)
    num_caught = sum(bool(trial.caught_by) for trial in trials)
    print(f"{num_caught} of {len(trials)} caught ({100 * num_caught / len(trials):.0f} %)")
    return len(trials) - num_caught


def _key(mutation: Mutation) -> str:
    return f"{mutation.file} {mutation.before} -> {mutation.after}"


def _trials_of_before() -> list[Trial]:
    """What the results of before say."""
    if not RESULTS.exists():
        return []
    fields = ("file", "line", "kind", "before", "after")
    return [
        Trial(Mutation(*(row.pop(field) for field in fields)), **row)
        for row in json.loads(RESULTS.read_text())["mutations"]
    ]


def _write(seed: int, trials: list[Trial]) -> None:
    rows = [
        {**asdict(trial.mutation), "caught_by": trial.caught_by, "detail": trial.detail,
         "why_it_survives": trial.why_it_survives}
        for trial in trials
    ]  # fmt: skip
    num_caught = sum(bool(trial.caught_by) for trial in trials)
    result = {"seed": seed, "caught": num_caught, "of": len(trials), "mutations": rows}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
