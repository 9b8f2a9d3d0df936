"""Few cases of many options: every two values of different options meet in one of them."""

import itertools
from collections import Counter
from collections.abc import Iterable


def pairs(*options: Iterable) -> list[tuple]:
    """Return cases with a value of each option; the next is always the one with the most new pairs."""
    values = [list(option) for option in options]
    items = [tuple(enumerate(case)) for case in itertools.product(*(range(len(option)) for option in values))]
    met = {case: set(itertools.combinations(case, 2)) for case in items}
    left, used, cases = set().union(*met.values()), Counter(), []
    while left:
        case = max(items, key=lambda case: (len(left & met[case]), -sum(used[item] for item in case)))
        left -= met[case]
        used.update(case)
        cases.append(tuple(values[option][index] for option, index in case))
    return cases
