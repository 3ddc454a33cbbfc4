"""Mathematical answers as exact values: LaTeX or plain text to a polynomial with rational coefficients and roots.

Two answers are equal if their canonical texts are: \\frac{1}{4}, 1/4, 0.25 and .250 all give "1/4". Supports + - * / ^
\\frac \\sqrt, implied products, mixed numbers, thousands commas, single Latin and Greek letters as symbols, i, and
units after a number; not functions (sin, log), relations, ± or matrices, for which `value` returns None and the caller
compares text. Nothing is evaluated by Python, and every size is bounded, so that no text makes it hang.

    python -m pytest tests/test_answers.py
"""

import math
import re
from fractions import Fraction

# A monomial: (square-free radicand, ((symbol, power), ...)); a value: its monomials with their coefficients.
Monomial = tuple[int, tuple[tuple[str, int], ...]]
Value = dict[Monomial, Fraction]

MAX_CHARACTERS = 300
MAX_DEPTH = 20
MAX_TERMS = 100
MAX_EXPONENT = 64
MAX_BITS = 1000  # of a numerator or denominator
MAX_FACTORED = 10**8  # trial division up to its root
ONE: Monomial = (1, ())

_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)|(?P<command>\\[A-Za-z]+)"
    r"|(?P<letter>[A-Za-zα-ωΑ-Ω∞])|(?P<sign>[-+*/^(){}\[\]√]))"
)
# "even" is a word, not e·v·e·n; "xy" beside something else is a product.
_WORD = re.compile(r"\s*[A-Za-z]{3,}|^\s*[A-Za-z]{2}$")
_COMMANDS = {"\\cdot": "*", "\\times": "*", "\\div": "/", "\\dfrac": "\\frac", "\\tfrac": "\\frac", "\\cfrac": "\\frac"}
_SYMBOLS = {
    "\\pi": "π",
    "\\infty": "∞",
    **{f"\\{name}": name for name in ("alpha", "beta", "gamma", "theta", "lambda")},
}
_SPACES = re.compile(r"(?<!\\)\\[,;:! ]|\\q?quad(?![A-Za-z])|~|\\left(?![A-Za-z])|\\right(?![A-Za-z])")
_THOUSANDS = re.compile(r"(?<![0-9.,])([0-9]{1,3}(?:,[0-9]{3})+)(?![0-9,])")
_THIN_THOUSANDS = re.compile(r"(?<=[0-9])\\,(?=[0-9]{3})")
_UNIT = re.compile(
    r"(?:\\(?:text|mbox|mathrm|textrm|rm)\s*\{[^{}]*\}(?:\^\{?[0-9]\}?)?|\^\s*\{?\s*\\circ\s*\}?|°|\\?%"
    r"|(?<=[0-9)}])\s(?!(?:and|or|then|to|is|are|of|plus|minus|times|by)\b)[A-Za-z]{2,}(?:\s+[A-Za-z]+)*(?:\^\{?[0-9]\}?|[²³])?)\s*$"
)


class _Unreadable(Exception):
    """The text is not a supported expression, or too large."""


def value(text: str) -> Value | None:
    """The value of an expression, or None if it cannot be read, divides by zero, or exceeds a bound."""
    text = tidy(text)
    if not text or len(text) > MAX_CHARACTERS:
        return None
    unit = _UNIT.search(text)
    for candidate in ([text[: unit.start()]] if unit else []) + [text]:
        try:
            found = _Parser(_THOUSANDS.sub(lambda match: match[0].replace(",", ""), candidate)).parse()
        except (_Unreadable, ZeroDivisionError):
            continue
        # Nor is a value an answer if its canonical text is too long to be read again.
        return found if len(canonical(found)) <= MAX_CHARACTERS else None
    return None


def rational(text: str) -> Fraction | None:
    """The value of an expression if it is a rational number, else None."""
    found = value(text)
    if found is None or not set(found) <= {ONE}:
        return None
    return found.get(ONE, Fraction(0))


def tidy(text: str) -> str:
    """`text` without insignificant parts: dollar signs, LaTeX spacing and sizes, a final full stop."""
    text = text.replace("\\$", "").replace("$", "").replace("\\(", "").replace("\\)", "")
    text = (
        text.replace("\\[", "")
        .replace("\\]", "")
        .replace("{,}", ",")
        .replace("\\!", "")
        .replace("\\%", "%")
        .replace("**", "^")
    )
    for sign, plain in (("−", "-"), ("–", "-"), ("×", "*"), ("·", "*"), ("÷", "/"), ("²", "^2"), ("³", "^3")):
        text = text.replace(sign, plain)
    text = _SPACES.sub(" ", _THIN_THOUSANDS.sub("", text)).strip()
    return text.rstrip(".").strip() if not text.endswith("...") else text


def canonical(value: Value) -> str:
    """The canonical text of a value; `value` parses it to the same value."""
    terms = [_term(monomial, value[monomial]) for monomial in sorted(value, key=lambda key: (key[1], key[0]))]
    return "+".join(terms).replace("+-", "-") if terms else "0"


def _term(monomial: Monomial, coefficient: Fraction) -> str:
    root, powers = monomial
    factors = [f"√{root}"] if root != 1 else []
    factors += [symbol if power == 1 else f"{symbol}^({power})" for symbol, power in powers]
    if coefficient == 1 and factors:
        return "*".join(factors)
    return "*".join([str(coefficient), *factors])


def _checked(terms: Value) -> Value:
    """`terms` without zeros. Raises _Unreadable if they are too many or too large."""
    kept = {monomial: number for monomial, number in terms.items() if number}
    if len(kept) > MAX_TERMS:
        raise _Unreadable
    for number in kept.values():
        if max(number.numerator.bit_length(), number.denominator.bit_length()) > MAX_BITS:
            raise _Unreadable
    return kept


def _add(a: Value, b: Value, sign: int = 1) -> Value:
    total = dict(a)
    for monomial, number in b.items():
        total[monomial] = total.get(monomial, Fraction(0)) + sign * number
    return _checked(total)


def _multiply(a: Value, b: Value) -> Value:
    if len(a) * len(b) > MAX_TERMS**2:
        raise _Unreadable
    total: Value = {}
    for (root_a, powers_a), number_a in a.items():
        for (root_b, powers_b), number_b in b.items():
            shared = math.gcd(root_a, root_b)  # √a √b = g √(ab/g²), and ab/g² is square-free again
            powers = dict(powers_a)
            for symbol, power in powers_b:
                powers[symbol] = powers.get(symbol, 0) + power
            sign = 1
            if "i" in powers:
                sign = -1 if powers["i"] % 4 in (2, 3) else 1
                powers["i"] %= 2
            monomial = (root_a * root_b // shared**2, tuple(sorted((s, p) for s, p in powers.items() if p)))
            if monomial[0] > MAX_FACTORED or any(abs(power) > MAX_EXPONENT for power in powers.values()):
                raise _Unreadable
            total[monomial] = total.get(monomial, Fraction(0)) + sign * shared * number_a * number_b
    return _checked(total)


def _inverse(a: Value) -> Value:
    """1/a, for one term, or for two whose product with their conjugate is a single term."""
    if not a:
        raise ZeroDivisionError
    if len(a) == 1:
        ((root, powers), number) = next(iter(a.items()))
        swapped: Value = {(root, tuple((symbol, -power) for symbol, power in powers)): 1 / (number * root)}
        return _multiply(swapped, {ONE: Fraction(1)})
    if len(a) > 2:
        raise _Unreadable
    first, second = a.items()
    conjugate = dict([first, (second[0], -second[1])])
    norm = _multiply(a, conjugate)
    if len(norm) != 1:
        raise _Unreadable
    return _multiply(conjugate, _inverse(norm))


def _power(base: Value, exponent: Fraction) -> Value:
    if exponent.denominator == 2:
        return _power(_root(base, 2), Fraction(exponent.numerator))
    if exponent.denominator != 1 or abs(exponent) > MAX_EXPONENT:
        raise _Unreadable
    factor = _inverse(base) if exponent < 0 else base
    result: Value = {ONE: Fraction(1)}
    for _ in range(abs(exponent.numerator)):
        result = _multiply(result, factor)
    return result


def _root(radicand: Value, degree: int) -> Value:
    """The principal root of a rational number. Raises _Unreadable if it is not representable."""
    if not set(radicand) <= {ONE}:
        raise _Unreadable
    number = radicand.get(ONE, Fraction(0))
    if degree != 2:
        roots = [_whole_root(abs(part), degree) for part in (number.numerator, number.denominator)]
        if number < 0 and degree % 2 == 0:
            raise _Unreadable
        return _checked({ONE: Fraction(roots[0], roots[1]) * (-1 if number < 0 else 1)})
    outer, inner = _square_free(abs(number.numerator) * number.denominator)  # √(p/q) = √(pq) / q
    symbols = (("i", 1),) if number < 0 else ()
    return _checked({(inner, symbols): Fraction(outer, number.denominator)})


def _whole_root(number: int, degree: int) -> int:
    if not 2 <= degree <= 10 or number.bit_length() > 50:
        raise _Unreadable
    guess = round(number ** (1 / degree))
    if guess**degree != number:
        raise _Unreadable
    return guess


def _square_free(number: int) -> tuple[int, int]:
    """(a, b) with number = a² b and b square-free."""
    whole = math.isqrt(number)
    if whole * whole == number:
        return whole, 1
    if number > MAX_FACTORED:
        raise _Unreadable
    outer, divisor = 1, 2
    while divisor * divisor <= number:
        while number % (divisor * divisor) == 0:
            number //= divisor * divisor
            outer *= divisor
        divisor += 1
    return outer, number


class _Parser:
    """Recursive descent: sum of products of powers of atoms."""

    def __init__(self, text: str):
        self.tokens: list[tuple[str, str, bool]] = []  # kind, text, whether white space stands before it
        self.index = 0
        self.depth = 0
        place = 0
        text = text.rstrip()
        while place < len(text):
            match = _TOKEN.match(text, place)
            if match is None or match.lastgroup is None:
                raise _Unreadable
            word = match[match.lastgroup]
            if _WORD.match(text, place):
                raise _Unreadable
            self.tokens.append((match.lastgroup, _COMMANDS.get(word, word), match.start(match.lastgroup) > place))
            place = match.end()

    def parse(self) -> Value:
        result = self._sum()
        if self.index < len(self.tokens):
            raise _Unreadable
        return result

    def _peek(self, ahead: int = 0) -> tuple[str, str, bool]:
        return self.tokens[self.index + ahead] if self.index + ahead < len(self.tokens) else ("end", "", False)

    def _take(self, *wanted: str) -> bool:
        if self._peek()[1] in wanted and self._peek()[0] != "end":
            self.index += 1
            return True
        return False

    def _sum(self) -> Value:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _Unreadable
        result = self._product()
        while self._peek()[1] in ("+", "-"):
            sign = 1 if self._take("+") or not self._take("-") else -1
            result = _add(result, self._product(), sign)
        self.depth -= 1
        return result

    def _product(self) -> Value:
        result = self._signed()
        while True:
            kind, word, _ = self._peek()
            if self._take("*"):
                result = _multiply(result, self._signed())
            elif self._take("/"):
                result = _multiply(result, _inverse(self._signed()))
            elif kind == "letter" or kind == "command" or word in ("(", "√", "["):
                result = _multiply(result, self._raised())
            else:
                return result  # a number after a factor is not a product: "3 4" is two answers

    def _signed(self) -> Value:
        sign = 1
        while self._peek()[1] in ("+", "-"):
            sign = sign if self._take("+") or not self._take("-") else -sign
        return _multiply({ONE: Fraction(sign)}, self._raised())

    def _raised(self) -> Value:
        base = self._atom()
        if not self._take("^"):
            return base
        negative = self._take("-")
        exponent = self._atom()
        if not set(exponent) <= {ONE}:
            raise _Unreadable
        return _power(base, exponent.get(ONE, Fraction(0)) * (-1 if negative else 1))

    def _atom(self) -> Value:
        kind, word, _ = self._peek()
        self.index += 1
        if kind == "number":
            return self._mixed(_number(word))
        if kind == "letter" or word in _SYMBOLS:
            return {(1, ((_SYMBOLS.get(word, word), 1),)): Fraction(1)}
        if word in ("(", "[", "{"):
            return self._until({"(": ")", "[": "]", "{": "}"}[word])
        if word == "\\frac":
            return _multiply(self._argument(), _inverse(self._argument()))
        if word in ("√", "\\sqrt"):
            degree = 2
            if word == "\\sqrt" and self._take("["):
                inside = self._until("]")
                degree = int(inside.get(ONE, Fraction(0)))
            return _root(self._argument() if word == "\\sqrt" else self._atom(), degree)
        raise _Unreadable

    def _until(self, closing: str) -> Value:
        result = self._sum()
        if not self._take(closing):
            raise _Unreadable
        return result

    def _argument(self) -> Value:
        """The argument of \\frac or \\sqrt: a group in braces, or one digit, so that \\frac12 is a half."""
        kind, word, _ = self._peek()
        if kind == "number" and word.isdigit() and len(word) > 1:
            self.tokens[self.index] = (kind, word[1:], False)
            return {ONE: Fraction(int(word[0]))}
        if kind == "number":
            self.index += 1
            return {ONE: _number(word)}
        return self._atom()

    def _mixed(self, whole: Fraction) -> Value:
        """`whole`, with the proper fraction directly after it: 1\\frac{1}{2}, 1 1/2."""
        plain = {ONE: whole} if whole else {}
        if whole.denominator != 1:
            return plain
        if self._peek()[1] == "\\frac":
            start = self.index
            part = self._atom()
            if set(part) == {ONE} and 0 < part[ONE] < 1:
                return {ONE: whole + part[ONE]}
            self.index = start
        (kind, top, spaced), (_, slash, _), (after, bottom, _) = self._peek(), self._peek(1), self._peek(2)
        if (kind, slash, after, spaced) == ("number", "/", "number", True) and top.isdigit() and bottom.isdigit():
            part_number = Fraction(int(top), int(bottom)) if int(bottom) else Fraction(1)
            if part_number < 1:
                self.index += 3
                return {ONE: whole + part_number}
        return plain


def _number(word: str) -> Fraction:
    mantissa, _, exponent = word.lower().partition("e")
    if len(mantissa) > MAX_CHARACTERS or len(exponent) > 4 or abs(int(exponent or 0)) > MAX_CHARACTERS:
        raise _Unreadable
    return Fraction(mantissa.removesuffix(".")) * Fraction(10) ** int(exponent or 0)
