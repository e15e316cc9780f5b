"""The list of mutations fits the code; what the suite says of each is for `make mutants`."""

import ast
import pathlib

import pytest

from tests import mutations
from tests.mutations import MUTATIONS, ROOT, Mutation, mutated

TREE_ORDER = MUTATIONS[0]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_each_fits_the_code(mutation):
    """Its old text is there once, the new one is Python, and the tests named for it exist."""
    ast.parse(mutated(mutation, (ROOT / mutation.file).read_text()))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        names = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in names, test


def test_there_are_enough_and_no_name_twice():
    assert len({mutation.what for mutation in MUTATIONS}) == len(MUTATIONS)
    assert sum(not mutation.needs_gpu for mutation in MUTATIONS) >= 25


def test_text_that_is_gone_or_twice_there_is_refused():
    for text, count in (("", 0), (2 * TREE_ORDER.old, 2)):
        with pytest.raises(ValueError, match=f"got it {count} times"):
            mutated(TREE_ORDER, text)


def test_the_tool_tells_caught_from_survived_from_broken():
    """On copies: this tree stays as it is."""
    before = (ROOT / TREE_ORDER.file).read_text()
    quick = ("tests/test_tree.py::test_the_order_for_a_row_of_256",)
    harmless = Mutation("a comment", TREE_ORDER.file, "import math\n", "import math  # \n", quick)
    for mutation, verdict in (
        (TREE_ORDER._replace(tests=quick), "caught"),
        (harmless, "SURVIVED"),
        (harmless._replace(tests=("tests/test_tree.py::test_gone",)), "BROKEN"),
        (harmless._replace(old="no such text"), "DOES NOT FIT"),
    ):
        assert mutations.try_mutation(mutation).verdict == verdict
    assert (ROOT / TREE_ORDER.file).read_text() == before
    assert not list(pathlib.Path(ROOT).glob("tree"))


def test_a_mutation_for_a_gpu_is_skipped_with_its_reason_where_there_is_none(monkeypatch):
    monkeypatch.setattr(mutations, "has_gpu", lambda: False)
    mutation = next(m for m in MUTATIONS if m.needs_gpu)
    assert mutations.try_mutation(mutation)[1:2] == ("skipped",)
    assert mutations.try_mutation(mutation).detail == mutation.needs_gpu
