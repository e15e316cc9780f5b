"""Does the suite notice when the code is wrong? `make mutants` breaks it in one place at a time and runs the tests.

python -m tests.mutations [--check] [--only TEXT] [--gpu] [--jobs N]

Each mutation of `tests.mutation_list` is applied to a temporary copy of the tree, never in place. It is caught where
the tests named for it fail, after they have passed on an unchanged copy. Exits with 1 if one survives or doesn't fit
the code. `--check` runs no test: it lists those that no longer fit, with the reason.
"""

import argparse
import ast
import collections
import concurrent.futures
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.mutation_list import MUTATIONS, Mutation

ROOT = pathlib.Path(__file__).parent.parent
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "results", "dist")


def misfit(mutation: Mutation) -> str:
    """Why a mutation does not fit the code and the tests as they are; "" where it does."""
    try:
        text = (ROOT / mutation.file).read_text()
    except FileNotFoundError:
        return f"{mutation.file} must be there, got no such file"
    if (count := text.count(mutation.old)) != 1:
        return f"{mutation.file} must hold the old text once, got it {count} times"
    try:
        ast.parse(_mutated(mutation, text))
    except SyntaxError as error:
        return f"the new text must be Python, got {error.msg} in line {error.lineno}"
    gone = [test for test in mutation.tests if not _is_there(test)]
    return f"each test must be there, got none of the name {gone[0]}" if gone else ""


def _mutated(mutation: Mutation, text: str) -> str:
    """The file's text with the mutation."""
    return text.replace(mutation.old, mutation.new)


def _is_there(test: str) -> bool:
    """Whether a file of tests is there, or the function of a test, whatever its parameters."""
    file, _, name = test.partition("::")
    function = name.partition("[")[0]
    return (ROOT / file).is_file() and (not function or function in _functions(ROOT / file))


@functools.cache
def _functions(file: pathlib.Path) -> set[str]:
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}


def misfits(mutations: Sequence[Mutation]) -> dict[str, str]:
    """`misfit` of those that don't fit, by `what`; asks pytest whether a test has the parameters that are named."""
    found = {m.what: reason for m in mutations if (reason := misfit(m))}
    files = {test.partition("::")[0] for m in mutations if m.what not in found for test in m.tests}
    if not files:
        return found
    _, output = run_tests(ROOT, sorted(files), "--collect-only")
    names = set(output.splitlines())
    whole = {name.partition("[")[0] for name in names} | files
    for mutation in mutations:
        gone = [test for test in mutation.tests if test not in names | whole]
        if gone and mutation.what not in found:
            found[mutation.what] = f"each test must be collected, got none of the name {gone[0]}"
    return found


class Result(NamedTuple):
    mutation: Mutation
    verdict: str  # "caught", "SURVIVED", "DOES NOT FIT", "BROKEN" or "skipped"
    seconds: float
    detail: str = ""


def copy_of_the_tree(directory: str) -> pathlib.Path:
    tree = pathlib.Path(directory) / "tree"
    shutil.copytree(ROOT, tree, ignore=_LEFT_OUT)
    return tree


def run_tests(tree: pathlib.Path, tests: Iterable[str], *flags: str) -> tuple[int, str]:
    """pytest's exit code and what it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *flags, *tests]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several may share a GPU
    }
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@functools.cache
def has_gpu() -> bool:
    """Asked of a process of its own, which gives its memory back."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "gpu"


def try_mutation(mutation: Mutation) -> Result:
    start = time.monotonic()

    def result(verdict: str, detail: str = "") -> Result:
        return Result(mutation, verdict, time.monotonic() - start, detail)

    if reason := misfit(mutation):
        return result("DOES NOT FIT", reason)
    if mutation.needs_gpu and not has_gpu():
        return result("skipped", mutation.needs_gpu)
    with tempfile.TemporaryDirectory() as directory:
        tree = copy_of_the_tree(directory)
        file = tree / mutation.file
        file.write_text(_mutated(mutation, file.read_text()))
        code, output = run_tests(tree, mutation.tests, "-x")
    # 1: tests failed. Anything else is no test that ran: a name that is gone, code that can't be imported.
    return result({0: "SURVIVED", 1: "caught"}.get(code, "BROKEN"), "" if code == 1 else output[-1500:])


def fail_unchanged(mutations: Iterable[Mutation], jobs: int) -> list[str]:
    """Those of the mutations' tests that fail on a copy without any mutation."""
    tests = {test: None for m in mutations if has_gpu() or not m.needs_gpu for test in m.tests}
    if not tests:
        return []  # named none, pytest would run all
    with tempfile.TemporaryDirectory() as directory:
        code, output = run_tests(copy_of_the_tree(directory), tests, "-n", str(jobs))
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+\.py(?:::[^\n]*?)?)(?: - |$)", output, re.MULTILINE)
    if code and not failed:
        sys.exit(f"the tests must run on the unchanged code, got\n{output[-1500:]}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="list those that no longer fit, and run no test")
    parser.add_argument("--only", default="", help="mutations whose name holds this text")
    parser.add_argument("--gpu", action="store_true", help="those alone that can't be seen without a GPU")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    arguments = parser.parse_args()
    mutations = [m for m in MUTATIONS if arguments.only in m.what and (m.needs_gpu or not arguments.gpu)]
    reasons = misfits(mutations)
    if arguments.check:
        for what, reason in reasons.items():
            print(f"{what}: {reason}")
        sys.exit(bool(reasons))
    failed = fail_unchanged([m for m in mutations if m.what not in reasons], arguments.jobs)

    def attempt(mutation: Mutation) -> Result:
        if mutation.what in reasons:
            return Result(mutation, "DOES NOT FIT", 0.0, reasons[mutation.what])
        own = [test for test in failed if test.startswith(mutation.tests)]
        return Result(mutation, "BROKEN", 0.0, f"fails unchanged: {own[0]}") if own else try_mutation(mutation)

    results = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(attempt, mutations):
            results.append(result)
            print(f"{result.verdict:>12}  {result.seconds:5.0f} s  {result.mutation.what}", flush=True)
            if result.detail:
                print("              " + result.detail.strip().replace("\n", "\n              "), flush=True)
    counts = collections.Counter(result.verdict for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    sys.exit(bool(counts.keys() - {"caught", "skipped"}))


if __name__ == "__main__":
    main()
