"""What a step does with its numbers, in words: "subtract the number of eggs from the given amount"."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from sgpo.strategies.calculator_marks import Expression
from sgpo.strategies.calculator_names import FACTOR, GIVEN, PERCENTAGE, Name, Names


def describe_operation(tree: Expression | None, names: Names) -> str:
    """One step as an instruction without numbers."""
    if isinstance(tree, ast.UnaryOp):
        tree = tree.operand
    if not isinstance(tree, ast.BinOp):
        return "work out the next quantity"
    if isinstance(tree.op, (ast.Add, ast.Sub)):
        return _sum(tree, names)
    return _product(tree, names)


def _sum(tree: ast.BinOp, names: Names) -> str:
    plus, minus = _flat(tree, ast.Add, ast.Sub)
    if not all(_leaf(node) for node in (*plus, *minus)):
        inner = " and ".join(dict.fromkeys(_verb(node) for node in (*plus, *minus) if not _leaf(node)))
        top = "add the parts up" if not minus else "subtract" if len(plus) == 1 else "add and subtract the parts"
        return f"{inner} first, then {top}"
    added, removed = (
        [GIVEN if name.singular == FACTOR.singular else name for name in _named(nodes, names)]
        for nodes in (plus, minus)
    )
    if not removed:
        return f"add {_joined(added)}"
    if len(added) == len(removed) == 1 and added[0].singular == removed[0].singular:
        return f"take the difference between {added[0].plural}"
    start = _joined(added) if len(added) == 1 else f"the sum of {_joined(added)}"
    return f"subtract {_joined(removed)} from {start}"


def _product(tree: ast.BinOp, names: Names) -> str:
    top, bottom = _flat(tree, ast.Mult, ast.Div)
    if not all(_leaf(node) for node in (*top, *bottom)):
        inner = " and ".join(dict.fromkeys(_verb(node) for node in (*top, *bottom) if not _leaf(node)))
        return f"{inner} first, then {'multiply' if len(top) > 1 else 'divide'}"
    above, below = _named(top, names), _named(bottom, names)
    if len(above) == 2 and len(below) == 1:
        for index, name in enumerate(above):
            other = above[1 - index]
            if below[0].value == 100 and name.singular == PERCENTAGE.singular:
                return f"take the given percentage of {other.singular}"
            if names.is_fraction(name.value or 0, below[0].value or 0):
                return f"take the given fraction of {other.singular}"
    if len(above) == 2 and not below:
        for index, name in enumerate(above):
            if name.singular == PERCENTAGE.singular:
                return f"take the given percentage of {above[1 - index].singular}"
    if not below:
        return f"multiply {_times(above)}"
    if len(above) == 1 and len(below) == 1 and above[0].singular == below[0].singular:
        return f"take the ratio of {above[0].plural}"
    divisor = _times(below) if len(below) == 1 else f"the product of {_joined(below)}"
    if len(above) == 1:
        return f"divide {above[0].singular} by {divisor}"
    return f"multiply {_times(above)}, and divide by {divisor}"


def _flat(node: Expression, forward: type, inverse: type) -> tuple[list[Expression], list[Expression]]:
    """Terms that are added (multiplied) and terms that are subtracted (divided by)."""
    if not isinstance(node, ast.BinOp) or not isinstance(node.op, (forward, inverse)):
        return [node], []
    left, left_inverse = _flat(node.left, forward, inverse)
    right, right_inverse = _flat(node.right, forward, inverse)
    if isinstance(node.op, inverse):
        right, right_inverse = right_inverse, right
    return [*left, *right], [*left_inverse, *right_inverse]


def _leaf(node: Expression) -> bool:
    return isinstance(node, ast.Constant) or (isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant))


def _verb(node: Expression) -> str:
    verbs = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
    if isinstance(node, ast.UnaryOp) and not _leaf(node):
        return _verb(node.operand)
    return verbs[type(node.op)] if isinstance(node, ast.BinOp) else "subtract"


def _named(nodes: Sequence[Expression], names: Names) -> list[Name]:
    return [names.of(_constant(node)) for node in nodes]


def _constant(node: Expression) -> float:
    if isinstance(node, ast.UnaryOp):
        return -_constant(node.operand)
    assert isinstance(node, ast.Constant)
    return float(node.value)  # type: ignore[arg-type]


def _joined(names: Sequence[Name], last: str = "and") -> str:
    """The names as an enumeration; names that repeat are said once, in the plural."""
    count: dict[str, int] = {}
    for name in names:
        count[name.plural] = count.get(name.plural, 0) + 1
    said = list(dict.fromkeys(name.plural if count[name.plural] > 1 else name.singular for name in names))
    return enumerate_words(said, last)


def enumerate_words(items: Sequence[str], last: str = "and") -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def _times(names: Sequence[Name]) -> str:
    return _joined(names, "by" if len(names) == 2 else "and")
