"""The page of the docs that says what works with what is what comes of it."""

import pytest
from lightning_utilities.core.imports import RequirementCache
from support import FAILURES, PAGE, STRATEGIES, WORKS, all_outcomes, page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not RequirementCache("torch>=2.7"), reason="torch 2.6 has no FSDP2 on the CPU"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of every combination under every strategy."""
    return all_outcomes(tmp_path_factory.mktemp("support"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_combination_works_or_is_refused_with_a_sentence(strategy, made):
    others = {key: result for key, result in made[strategy].items() if result != WORKS}
    assert len(others) < len(made[strategy])
    assert not {key: result for key, result in others.items() if result.startswith(FAILURES)}


def test_the_page_is_made_of_what_came_of_them(made):
    assert PAGE.read_text() == page(made), "`python tests/support.py` makes it anew"
