"""The list of mutations fits the code; what the suite says of each is for `make mutants`."""

import ast
import sys

import pytest

from tests import mutations
from tests.mutations import MUTATIONS, ROOT, misfit

TREE_ORDER = next(m for m in MUTATIONS if m.what == "tree order: the warps from the lowest bit")
HARMLESS = TREE_ORDER._replace(what="a comment", old="import math\n", new="import math  # \n")
QUICK = ("tests/test_tree.py::test_the_order_for_a_row_of_256",)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_each_fits_the_code(mutation):
    assert misfit(mutation) == ""


def test_pytest_knows_each_test():
    """With its parameters, which a list of cases may lose."""
    assert mutations.misfits(MUTATIONS) == {}


def test_no_name_is_there_twice():
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)


def has_code(file) -> bool:
    """A function or a class; files of a folder that only import, and the version, are none."""
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(file.read_text()).body)


def test_every_module_is_reached_without_a_gpu():
    files = [file for folder in ("pallas_qk", "torch_ref") for file in (ROOT / folder).rglob("*.py") if has_code(file)]
    reached = {mutation.file for mutation in MUTATIONS if not mutation.needs_gpu}
    assert {file.relative_to(ROOT).as_posix() for file in files} == reached


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"file": "pallas_qk/_gone.py"}, "pallas_qk/_gone.py must be there, got no such file"),
        ({"old": "no such text"}, "pallas_qk/_options.py must hold the old text once, got it 0 times"),
        ({"old": "@dataclasses.dataclass"}, "pallas_qk/_options.py must hold the old text once, got it 3 times"),
        ({"old": "import math", "new": "import"}, "the new text must be Python, got invalid syntax in line 4"),
        (
            {"tests": (*QUICK, "tests/test_tree.py::test_gone[3]")},
            "each test must be there, got none of the name tests/test_tree.py::test_gone[3]",
        ),
        ({"tests": ("tests/test_gone.py",)}, "each test must be there, got none of the name tests/test_gone.py"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_no_longer_fits_is_told(changes, reason):
    assert misfit(TREE_ORDER._replace(**changes)) == reason


def test_the_check_lists_what_no_longer_fits_and_runs_nothing(monkeypatch, capsys):
    other, gone = HARMLESS._replace(old="no such text"), "tests/test_tree.py::test_the_order_names_each_bit_once[3]"
    lost = HARMLESS._replace(what="lost", tests=(*QUICK, gone))
    monkeypatch.setattr(mutations, "try_mutation", None)
    monkeypatch.setattr(sys, "argv", ["mutations", "--check"])
    told = f"a comment: {misfit(other)}\nlost: each test must be collected, got none of the name {gone}\n"
    for listed, code, printed in (([TREE_ORDER], 0, ""), ([TREE_ORDER, other, lost], 1, told)):
        monkeypatch.setattr(mutations, "MUTATIONS", listed)
        with pytest.raises(SystemExit) as caught:
            mutations.main()
        assert int(caught.value.code) == code
        assert capsys.readouterr().out == printed


def test_the_tool_tells_caught_from_survived_from_broken():
    """On copies: this tree stays as it is."""
    before = (ROOT / TREE_ORDER.file).read_text()
    for mutation, verdict in (
        (TREE_ORDER._replace(tests=QUICK), "caught"),
        (HARMLESS._replace(tests=QUICK), "SURVIVED"),
        (HARMLESS._replace(tests=("tests/test_tree.py::test_the_order_names_each_bit_once[3]",)), "BROKEN"),
        (HARMLESS._replace(old="no such text"), "DOES NOT FIT"),
    ):
        assert mutations.try_mutation(mutation).verdict == verdict
    assert (ROOT / TREE_ORDER.file).read_text() == before
    assert not list(ROOT.glob("tree"))


def test_a_mutation_for_a_gpu_is_skipped_with_its_reason_where_there_is_none(monkeypatch):
    monkeypatch.setattr(mutations, "has_gpu", lambda: False)
    mutation = next(m for m in MUTATIONS if m.needs_gpu)
    assert mutations.try_mutation(mutation)[1:2] == ("skipped",)
    assert mutations.try_mutation(mutation).detail == mutation.needs_gpu
