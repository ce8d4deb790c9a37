"""Formulas out of untrusted text: read by a grammar that is all there is, never evaluated as code.

A formula is numbers, names, + - * / **, brackets and known functions.  What it costs is bounded before it is computed:
characters, depth, size of numbers, exponents, terms of a polynomial.

    rational(text)               its value, exactly; with the numbers that stand in it
    polynomial(text)             its expanded form: exponents of the names -> coefficient
    Differentiable(text, ...)    value and derivative at a point, by dual numbers
"""

import ast
import cmath
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rung.core.errors import TaskError

LONGEST, DEEPEST, PARTS = 1000, 40, 150  # characters, brackets inside each other, operations inside each other
DIGITS = 40  # of a number that is written
BITS = 4000  # of a number that comes out
TERMS, DEGREE = 2000, 64
OPERATORS: Mapping[type, str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}


class NoFormula(TaskError):
    """A text that is none, or one that would cost too much.  It never leaves a scorer: the answer is wrong."""


@dataclass(frozen=True)
class Node:
    """A number, a name, an operation (+ - * / **, or "neg") or a function of its parts."""

    kind: str
    parts: tuple[Any, ...]


def parse(text: str, *, functions: frozenset[str] = frozenset()) -> Node:
    """Raises NoFormula."""
    if len(text) > LONGEST:
        raise NoFormula(f"a formula may have {LONGEST} characters")
    depth = deepest = 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise NoFormula(f"a formula may have {DEEPEST} brackets inside each other")
    try:
        tree = ast.parse(text.strip(), mode="eval").body  # read, not run
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise NoFormula(f"no formula: {error}") from error
    return _node(tree, functions, 0)


def _node(tree: ast.AST, functions: frozenset[str], depth: int) -> Node:
    if depth > PARTS:
        raise NoFormula(f"a formula may have {PARTS} operations inside each other")
    match tree:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            written = repr(value)
            if len(written) > DIGITS or not set(written) <= set("0123456789.e-+"):
                raise NoFormula(f"a number may have {DIGITS} digits")
            return Node("number", (Fraction(written),))
        case ast.Name(id=name):
            return Node("name", (name,))
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _node(inner, functions, depth + 1)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return Node("neg", (_node(inner, functions, depth + 1),))
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            return Node(OPERATORS[type(op)], (_node(left, functions, depth + 1), _node(right, functions, depth + 1)))
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in functions:
            return Node(name, (_node(inner, functions, depth + 1),))
    raise NoFormula(f"{type(tree).__name__} has no place in a formula")


def rational(text: str) -> tuple[Fraction, Counter[Fraction]]:
    """The value of + - * / over numbers, and the numbers written.  Raises NoFormula, also for a division by zero."""
    written: Counter[Fraction] = Counter()

    def value(node: Node) -> Fraction:
        if node.kind == "number":
            written[node.parts[0]] += 1
            return node.parts[0]
        parts = [value(part) for part in node.parts if isinstance(part, Node)]
        if node.kind not in FIELD or (node.kind == "/" and not parts[1]):
            raise NoFormula(f"{node.kind} of these is not computed")
        found = FIELD[node.kind](*parts)
        if max(found.numerator.bit_length(), found.denominator.bit_length()) > BITS:
            raise NoFormula("a number grows too large")
        return found

    return value(parse(text)), written


FIELD: Mapping[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "neg": operator.neg,
}

Monomial = tuple[tuple[str, int], ...]  # names in order, with their exponents


def polynomial(text: str) -> dict[Monomial, Fraction]:
    """Expanded, terms of coefficient zero left out.  Raises NoFormula."""
    return _expand(parse(text))


def _expand(node: Node) -> dict[Monomial, Fraction]:
    match node:
        case Node("number", (value,)):
            return {(): value} if value else {}
        case Node("name", (name,)):
            return {((name, 1),): Fraction(1)}
        case Node("neg", (inner,)):
            return _product({(): Fraction(-1)}, _expand(inner))
        case Node("+" | "-" as sign, (left, right)):
            right_terms = _expand(right) if sign == "+" else _product({(): Fraction(-1)}, _expand(right))
            return _sum(_expand(left), right_terms)
        case Node("*", (left, right)):
            return _product(_expand(left), _expand(right))
        case Node("/", (left, Node("number", (value,)))) if value:
            return _product(_expand(left), {(): 1 / value})
        case Node("**", (base, Node("number", (power,)))) if power.denominator == 1 and 0 <= power <= DEGREE:
            found: dict[Monomial, Fraction] = {(): Fraction(1)}
            terms = _expand(base)
            for _ in range(int(power)):
                found = _product(found, terms)
            return found
    raise NoFormula(f"{node.kind} of these is no polynomial")


def _sum(left: dict[Monomial, Fraction], right: dict[Monomial, Fraction]) -> dict[Monomial, Fraction]:
    total = dict(left)
    for names, value in right.items():
        total[names] = total.get(names, Fraction(0)) + value
    return {names: value for names, value in total.items() if value}


def _product(left: dict[Monomial, Fraction], right: dict[Monomial, Fraction]) -> dict[Monomial, Fraction]:
    if len(left) * len(right) > TERMS:
        raise NoFormula("a polynomial grows too large")
    total: dict[Monomial, Fraction] = {}
    for a, x in left.items():
        for b, y in right.items():
            powers = Counter(dict(a))
            powers.update(dict(b))
            value = total.get(names := tuple(sorted(powers.items())), Fraction(0)) + x * y
            if sum(powers.values()) > DEGREE or value.numerator.bit_length() > BITS:
                raise NoFormula("a polynomial grows too large")
            total[names] = value
    return {names: value for names, value in total.items() if value}


# name -> (function, its derivative), over the complex numbers
FUNCTIONS: Mapping[str, tuple[Callable[[complex], complex], Callable[[complex], complex]]] = {
    "exp": (cmath.exp, cmath.exp),
    "log": (cmath.log, lambda z: 1 / z),
    "sqrt": (cmath.sqrt, lambda z: 0.5 / cmath.sqrt(z)),
    "sin": (cmath.sin, cmath.cos),
    "cos": (cmath.cos, lambda z: -cmath.sin(z)),
    "tan": (cmath.tan, lambda z: 1 + cmath.tan(z) ** 2),
    "sinh": (cmath.sinh, cmath.cosh),
    "cosh": (cmath.cosh, cmath.sinh),
    "tanh": (cmath.tanh, lambda z: 1 - cmath.tanh(z) ** 2),
    "asin": (cmath.asin, lambda z: 1 / cmath.sqrt(1 - z * z)),
    "acos": (cmath.acos, lambda z: -1 / cmath.sqrt(1 - z * z)),
    "atan": (cmath.atan, lambda z: 1 / (1 + z * z)),
}


@dataclass(frozen=True)
class Differentiable:
    """A formula in one variable, other names being constants.  Raises NoFormula for a name that is not allowed."""

    text: str
    variable: str
    constants: tuple[str, ...] = ()

    def at(self, point: complex) -> tuple[complex, complex]:
        """Value and derivative at a point, by dual numbers.  Raises NoFormula where it has none."""
        try:
            return self._dual(parse(self.text, functions=frozenset(FUNCTIONS)), point)
        except (ZeroDivisionError, OverflowError, ValueError) as error:
            raise NoFormula(f"no value at {point}: {error}") from error

    def _dual(self, node: Node, point: complex) -> tuple[complex, complex]:
        match node:
            case Node("number", (value,)):
                return complex(value), 0j
            case Node("name", (name,)) if name == self.variable:
                return complex(point), 1 + 0j
            case Node("name", (name,)) if name in self.constants:
                return 1.25 + 0j, 0j
            case Node("neg", (inner,)):
                f, df = self._dual(inner, point)
                return -f, -df
            case Node("+" | "-" | "*" | "/" | "**" as kind, (left, right)):
                return _combine(kind, self._dual(left, point), self._dual(right, point))
            case Node(kind, (inner,)) if kind in FUNCTIONS:
                f, df = self._dual(inner, point)
                function, slope = FUNCTIONS[kind]
                return function(f), slope(f) * df
        raise NoFormula(f"{node.kind} {node.parts[0]!r} has no place here")


def _combine(kind: str, left: tuple[complex, complex], right: tuple[complex, complex]) -> tuple[complex, complex]:
    (f, df), (g, dg) = left, right
    match kind:
        case "+":
            return f + g, df + dg
        case "-":
            return f - g, df - dg
        case "*":
            return f * g, df * g + f * dg
        case "/":
            return f / g, (df * g - f * dg) / g**2
    if dg == 0:
        return f**g, g * f ** (g - 1) * df
    return f**g, f**g * (dg * cmath.log(f) + g * df / f)
