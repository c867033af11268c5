"""The list of faults is one that can still be put in; `mutations.py` itself says which of them the tests notice."""

from mutations import MUTATIONS, check


def test_every_fault_is_of_a_text_that_occurs_once_and_names_tests_that_are_there():
    for mutation in MUTATIONS:
        check(mutation)


def test_every_fault_changes_something_and_has_a_name_of_its_own():
    assert all(mutation.old != mutation.new for mutation in MUTATIONS)
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)
