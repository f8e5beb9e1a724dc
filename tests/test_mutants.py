"""The table of tests/stress/mutants.py fits the code. Whether the tests see each fault, that command says."""

import collections
import types

import pytest
from stress import mutants


def test_every_fault_can_be_planted():
    """Each is code, and another one than before; a fact has two or more; the tests that are named are there."""
    found = mutants.read()
    facts = collections.Counter(mutant.fact for mutant in found)
    assert len(found) >= 60 and min(facts.values()) >= 2
    for mutant in found:
        text = mutants.planted(mutant)
        assert text != (mutants.ROOT / mutant.file).read_text()
        compile(text, mutant.file, "exec")
        for test in mutant.tests:
            name, _, function = test.partition("::")
            assert f"def {function}" in (mutants.ROOT / "tests" / name).read_text(), test


def test_a_fault_that_fits_no_more_is_named(tmp_path):
    (tmp_path / "file.py").write_text("a = 1\na = 1\n")
    for old in ("a = 1", "b = 1"):
        with pytest.raises(ValueError, match=f"file.py holds . times, not once: {old}"):
            mutants.planted(types.SimpleNamespace(file="file.py", old=old, new="a = 2"), tmp_path)
