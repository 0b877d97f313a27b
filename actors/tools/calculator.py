"""Calculator[expression]: exact arithmetic on what a model writes, without eval.

An expression is split into tokens that are all known, then read with Python's `ast` and computed in fractions,
so that 0.1 + 0.2 is 0.3. Knows nothing of tools beyond ToolError.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

from actors.errors import ToolError

MAX_CHARS = 500
MAX_DEPTH = 250  # a sum of as many terms fits into MAX_CHARS
MAX_BITS = 2048  # of numerator or denominator: some 600 digits
MAX_ROUND_DIGITS = 100
SHOWN_DIGITS = 15  # significant, of a result that is no integer
IRRATIONAL_DIGITS = 50  # of square roots and fractional powers

_THOUSANDS = r"\d{1,3}(?:,\d{3})+(?![\d,])"
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?"
_TOKEN = re.compile(
    rf"\s*(?:(?P<thousands>{_THOUSANDS}(?:\.\d+)?)|(?P<number>{_NUMBER})|(?P<times>[xX×·])(?![A-Za-z_])"
    r"|(?P<name>[A-Za-z_]\w*)|(?P<op>\*\*|//|[-−+*/÷^%(),$]))"
)
_SAME = {"−": "-", "÷": "/", "^": "**"}


def calculator(expression: str) -> str:
    """Compute an arithmetic expression: + - * / // % ** ( ), sqrt, abs, round, min, max."""
    if len(expression) > MAX_CHARS:
        raise ToolError(f"The expression is too long: {len(expression)} characters, at most {MAX_CHARS}.")
    text = _normal(expression.strip().rstrip("=").rstrip())
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as e:
        raise ToolError(f"Cannot read the expression [{expression}].") from e
    try:
        return _format(_value(tree.body, 0))
    except ZeroDivisionError as e:
        raise ToolError("Division by zero.") from e
    except ArithmeticError as e:
        raise ToolError("The result is too large or not a number.") from e


def _normal(expression: str) -> str:
    """The expression in Python's spelling: 1,234 → 1234 (outside a function's brackets), 20% → (20/100)."""
    out: list[str] = []
    opened: list[tuple[int, bool]] = []  # where an operand in brackets starts in `out`, and whether it is a call
    operand: int | None = None  # where the operand just read starts
    position = 0
    while position < len(expression):
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ToolError(f"Unexpected {expression[position:].strip()[:20]!r} in the expression.")
        kind, token = str(match.lastgroup), match[match.lastgroup or 0]
        if kind == "thousands" and opened and opened[-1][1]:  # max(1,234) has two arguments
            token = token.split(",")[0]
            kind = "number"
            position = match.start("thousands") + len(token)
        else:
            position = match.end()
        start, operand = operand, None
        if kind in ("number", "thousands"):
            operand = len(out)
            out.append(_exact(token.replace(",", "")))
        elif kind == "times":
            out.append("*")
        elif kind == "name":
            if token not in _FUNCTIONS:
                raise ToolError(f"Unknown name {token!r}; functions: {', '.join(_FUNCTIONS)}.")
            out.append(token)
        elif token == "(":
            is_call = bool(out) and out[-1] in _FUNCTIONS
            opened.append((len(out) - is_call, is_call))
            out.append(token)
        elif token == ")":
            operand = opened.pop()[0] if opened else None
            out.append(token)
        elif token == "%" and start is not None and not re.match(r"\s*[\d.($A-WYZa-wyz]", expression[position:]):
            out.insert(start, "(")
            out.append("/100)")
            operand = start
        elif token != "$":
            out.append(_SAME.get(token, token))
    return " ".join(out)


def _exact(number: str) -> str:
    """A decimal as a fraction: 0.1 → (1/10)."""
    decimal = Decimal(number)
    if decimal and abs(decimal.adjusted()) > MAX_BITS // 4:
        raise ToolError("A number is too large or too small.")
    ratio = Fraction(decimal)
    return str(ratio) if ratio.denominator == 1 else f"({ratio})"


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if base < 0:
            raise ToolError("A negative number has no real fractional power.")
        return _irrational(lambda: _decimal(base) ** _decimal(exponent))
    size = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(base) not in (0, 1) and size * abs(exponent) > 2 * MAX_BITS:
        raise ToolError("The result is too large.")
    return Fraction(base ** int(exponent)) if abs(base) != 1 else (base if exponent % 2 else Fraction(1))


def _sqrt(number: Fraction) -> Fraction:
    if number < 0:
        raise ToolError("A negative number has no real square root.")
    root = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
    return root if root * root == number else _irrational(lambda: _decimal(number).sqrt())


def _irrational(compute: Callable[[], Decimal]) -> Fraction:
    with localcontext() as context:
        context.prec = IRRATIONAL_DIGITS
        result = compute()
    if result and abs(result.adjusted()) > MAX_BITS // 4:
        raise ToolError("The result is too large or too small.")
    return Fraction(result)


def _decimal(number: Fraction) -> Decimal:
    return Decimal(number.numerator) / Decimal(number.denominator)


def _round(number: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    if digits.denominator != 1 or abs(digits) > MAX_ROUND_DIGITS:
        raise ToolError(f"round wants a whole number of digits, at most {MAX_ROUND_DIGITS}.")
    return Fraction(round(number, int(digits)))


_OPERATORS: dict[type[ast.AST], Callable[..., Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: lambda a, b: Fraction(a // b),
    ast.Mod: operator.mod,
    ast.Pow: _power,
    ast.UAdd: lambda a: a,
    ast.USub: lambda a: -a,
}
_FUNCTIONS: dict[str, tuple[Callable[..., Fraction], int, int]] = {  # with the least and most arguments
    "sqrt": (_sqrt, 1, 1),
    "abs": (lambda number: abs(number), 1, 1),
    "round": (_round, 1, 2),
    "min": (lambda *numbers: min(numbers), 1, MAX_CHARS),
    "max": (lambda *numbers: max(numbers), 1, MAX_CHARS),
}


def _value(node: ast.AST, depth: int) -> Fraction:
    """The node's value; only nodes named here are computed."""
    if depth > MAX_DEPTH:
        raise ToolError(f"The expression is nested too deeply: at most {MAX_DEPTH} levels.")
    match node:
        case ast.Constant(value=int() as number):
            result = Fraction(number)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_value(left, depth + 1), _value(right, depth + 1))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            result = _OPERATORS[type(op)](_value(operand, depth + 1))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            function, least, most = _FUNCTIONS[name]
            if not least <= len(args) <= most:
                raise ToolError(f"{name} wants {least if least == most else f'{least} or more'} arguments.")
            result = function(*[_value(arg, depth + 1) for arg in args])
        case _:
            raise ToolError(f"Cannot compute [{ast.unparse(node)[:40]}].")
    if max(result.numerator.bit_length(), result.denominator.bit_length()) > MAX_BITS:
        raise ToolError("The result is too large or too small.")
    return result


def _format(number: Fraction) -> str:
    if number.denominator == 1:
        return str(number.numerator)
    with localcontext() as context:
        context.prec = SHOWN_DIGITS
        shown = _decimal(number).normalize()
    return f"{shown:f}" if -7 <= shown.adjusted() <= 20 else f"{shown:e}"
