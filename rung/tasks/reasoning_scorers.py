"""How an answer to each data set of reasoning-gym is judged: right or wrong, and nothing paid for a wrong answer.

What the package's own scorers do was read line by line (0.1.25).  Most are kept, and an answer is right where their
score is 1.  Replaced, with the reason in the table below, are those that

    run the answer as code      eval: string_insertion, spiral_matrix, binary_matrix, n_queens; through SymPy's
                                parse_expr: countdown, puzzle24, polynomial_multiplication, both integrations
    call wrong answers right    see WRONG_ANSWERS_PAID

    pass over words             SHAPES: the answer must have its shape and nothing else

Refused is `composite`, which is made of others: a mixture does that.
"""

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from rung.core.errors import TaskError
from rung.tasks.expressions import Differentiable, NoFormula, polynomial, rational

Scorer = Callable[[Any, str, Mapping[str, Any]], float]  # data set, answer, entry -> score; 1 is right

SHAPES: Mapping[str, str] = {  # elsewhere words that follow a right answer are passed over
    "kakurasu": r"[01\s]+",
    "knights_knaves": r"(?:[A-Za-z'-]+ is an? [a-z]+(?:\.|,? and |, |$)\s*)+",
    "quantum_lock": r"[ABC](?:\s*(?:→|->|,|\s)\s*[ABC])*",
    "survo": r"[0-9\s]+",
    "time_intervals": r"(?:[0-9]+ days?,?\s*)?(?:[0-9]+:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?)?",
}
RUN_AS_CODE = (
    *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens"),
    *("countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"),
)
WRONG_ANSWERS_PAID: Mapping[str, str] = {
    "coin_flip": "0 is right for every probability below 1/10000",
    "complex_arithmetic": "nan is right",
    "decimal_arithmetic": "a last digit that is one off is right",
    "figlet_font": "ten right letters are right, whatever follows",
    "fraction_simplification": "what follows a fraction in TeX does not count",
    "game_of_life": "rows and cells too many do not count",
    "game_of_life_halting": "every text is right: bool('False') is true",
    "gsm_symbolic": "the first of many numbers counts",
    "intermediate_integration": "an integral that is written down and not solved is right",
    "letter_jumble": "words too many do not count",
    "number_format": "a neighbouring number within 0.01 is right",
    "number_sorting": "numbers that are off by 1 are right",
    "polynomial_equations": "what is no number among the solutions is passed over",
    "pool_matrix": "1 % off is right",
    "propositional_logic": "a premise, repeated, is a conclusion",
    "puzzle24": "any four numbers will do, and 24.9 is 24",
    "rush_hour": "a piece may jump over others",
    "sokoban": "letters that are no moves are passed over, so that prose solves it",
    "word_sorting": "words too many do not count",
}
REFUSED: Mapping[str, str] = {"composite": "it is made of other data sets: take a mixture of tasks"}

COIN_TOLERANCE = 1e-3  # relative: three digits, of a probability
SLOPE_TOLERANCE = 1e-7  # relative, of a derivative in double precision
POINTS = (0.31 + 0.17j, 0.83 - 0.29j, -0.47 + 0.53j, 1.71 + 0.11j, -1.13 - 0.67j)  # no formula singles them out
PLAIN_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3})?")
NUMBERS = (
    *("basic_arithmetic", "chain_sum", "count_bits", "count_primes", "decimal_chain_sum", "gcd", "gsm_symbolic"),
    *("largest_island", "lcm", "leg_counting", "letter_counting", "number_format", "number_sequence", "products"),
    *("rectangle_count", "rotten_oranges", "simple_equations", "simple_geometry"),
)
FOLDED = (  # upper and lower case are alike
    *("calendar_arithmetic", "color_cube_rotation", "dice", "family_relationships", "figlet_font"),
    *("game_of_life_halting", "letter_jumble", "needle_haystack", "sentence_reordering", "spell_backward"),
    *("syllogism", "tsumego", "zebra_puzzles"),
)
THEIRS = (
    *("advanced_geometry", "arc_agi", "bitwise_arithmetic", "boxnet", "cryptarithm", "graph_color", "group_anagrams"),
    *("jugs", "knight_swap", "palindrome_generation", "palindrome_partitioning", "power_function"),
    *("prime_factorization", "rearc", "rubiks_cube", "shortest_path", "tower_of_hanoi", "word_ladder"),
)


def text(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The same text, but for white space at the ends of lines and around it."""
    return float(_lines(answer) == _lines(str(entry["answer"])))


def folded(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The same words in the same order, upper or lower case."""
    return float(answer.casefold().split() == str(entry["answer"]).casefold().split())


def number(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The same number: 046, 46.0 and 46 are equal."""
    given, right = plain_number(answer), plain_number(str(entry["answer"]))
    return float(given is not None and given == right)


def theirs(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The package's own score, 0 where it cannot read the answer; some scorers write into the entry: a copy."""
    try:
        score = float(data.score_answer(answer, copy.deepcopy(dict(entry))))
    except Exception:
        return 0.0
    return min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0


def shaped(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The package's own score of an answer that has the shape of one: it would pass over what follows."""
    name = entry["metadata"]["source_dataset"]
    return theirs(data, answer, entry) if re.fullmatch(SHAPES[name], answer.strip()) else 0.0


def plain_number(written: str) -> Fraction | None:
    """A whole or decimal number, None for any other text."""
    written = written.strip()
    if not PLAIN_NUMBER.fullmatch(written) or not any(character.isdigit() for character in written):
        return None
    try:
        return Fraction(Decimal(written.replace(",", "")))
    except InvalidOperation:
        return None


def _lines(written: str) -> str:
    return "\n".join(line.rstrip() for line in written.strip().splitlines())


def _queens(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return float(_lines(answer) in {_lines(board) for board in entry["metadata"]["valid_answers"]})


def _json(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The same value of JSON, or the same text."""
    if text(data, answer, entry):
        return 1.0
    try:
        return float(_typed(json.loads(answer)) == _typed(json.loads(entry["answer"])))
    except (ValueError, RecursionError):
        return 0.0


def _typed(value: Any) -> Any:
    """For a comparison in which true is not 1."""
    if isinstance(value, list):
        return [_typed(item) for item in value]
    if isinstance(value, dict):
        return {name: _typed(item) for name, item in value.items()}
    return (isinstance(value, bool), value)


def _coins(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """As a fraction, or to three digits."""
    found = entry["metadata"]["rational"]
    right = Fraction(found["numerator"], found["denominator"])
    above, _, below = answer.partition("/")
    parts = [plain_number(above), plain_number(below or "1")]
    if parts[0] is None or not parts[1]:
        return 0.0
    return float(abs(parts[0] / parts[1] - right) <= COIN_TOLERANCE * right)


def _complex(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """Theirs, of digits, signs and i."""
    return theirs(data, answer, entry) if re.fullmatch(r"[0-9+\-.ij ]+", answer) else 0.0


def _fraction(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """n/d or \\frac{n}{d}, in lowest terms."""
    bare = answer.strip().strip("$").strip()
    found = re.fullmatch(r"(?:\\d?frac)\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|([0-9]+)\s*/\s*([0-9]+)", bare)
    right = (entry["metadata"]["simplified_numerator"], entry["metadata"]["simplified_denominator"])
    return float(found is not None and [part for part in found.groups() if part] == [str(part) for part in right])


def _decimals(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """To as many decimals as are asked for: half a unit of the last."""
    given, right = plain_number(answer), Fraction(Decimal(entry["answer"]))
    unit = Fraction(1, 10**data.config.max_num_decimal_places)
    return float(given is not None and abs(given - right) <= unit / 2)


def _matrix(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """To two decimals, as the question asks."""
    right = entry["metadata"]["solution"]
    given = [[plain_number(item) for item in line.split()] for line in answer.strip().splitlines()]
    if [len(row) for row in given] != [len(row) for row in right]:
        return 0.0
    pairs = [pair for rows in zip(given, right, strict=True) for pair in zip(*rows, strict=True)]
    return float(all(a is not None and abs(a - Fraction(b)) <= Fraction(51, 10000) for a, b in pairs))


def _sorted_numbers(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """A list of numbers or of their spellings, each equal and in its place."""
    try:
        given = json.loads(answer.replace("'", '"'))
    except (ValueError, RecursionError):
        return 0.0
    right = [plain_number(str(value)) for value in entry["metadata"]["sorted_numbers"]]
    return float(isinstance(given, list) and [plain_number(str(value)) for value in given] == right)


def _sorted_words(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return float([word.strip() for word in answer.split(",")] == entry["metadata"]["sorted_words"])


def _roots(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """All real solutions to four decimals, in any order; an empty text, or two quotation marks, where there is none."""
    right = [float(value) for value in str(entry["answer"]).split(",") if value.strip()]
    if not right:
        return float(answer.strip() in ("", '""'))
    given = [plain_number(value) for value in answer.split(",")]
    if None in given or len(given) != len(right):
        return 0.0
    pairs = zip(sorted(float(value) for value in given if value is not None), sorted(right), strict=True)
    return float(all(abs(a - b) <= 0.51e-4 for a, b in pairs))


def _conclusion(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """Theirs, but a premise that is only repeated is none."""
    bare = "".join(answer.split())
    return (
        theirs(data, answer, entry) if bare not in {"".join(p.split()) for p in entry["metadata"]["premises"]} else 0.0
    )


def _countdown(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return _reaches(answer, entry["metadata"]["numbers"], entry["metadata"]["target"])


def _24(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return _reaches(answer, entry["metadata"]["numbers"], 24)


def _reaches(answer: str, numbers: list[int], target: int) -> float:
    """+ - * / over exactly these numbers, each once, gives exactly the target."""
    try:
        value, written = rational(answer)
    except NoFormula:
        return 0.0
    return float(value == target and written == Counter(Fraction(n) for n in numbers))


def _expanded(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """The same polynomial; a product that is left as it is asked for is no answer."""
    try:
        equal = polynomial(answer) == polynomial(entry["answer"])
    except NoFormula:
        return 0.0
    return float(equal and not re.search(r"[)a-zA-Z]\s*\*\s*\(|\)\s*\*(?!\*)|\)\s*\*\*", answer))


def _antiderivative(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """Its derivative is the integrand at points of the complex plane that were chosen beforehand.

    Two branches of a root or a logarithm may differ there in the constant, which does not matter.
    """
    found = entry["metadata"]
    given = Differentiable(answer, found["variable"], constants=("C",))
    wanted = Differentiable(found["integrand"], found["variable"])
    seen = 0
    for point in POINTS:
        try:
            right = wanted.at(point)[0]
        except NoFormula:
            continue
        try:
            slope = given.at(point)[1]
        except NoFormula:
            return 0.0
        if not abs(slope - right) <= SLOPE_TOLERANCE * max(1.0, abs(right)):
            return 0.0
        seen += 1
    return float(seen >= 3)


def _sokoban(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    return theirs(data, answer, entry) if re.fullmatch("[LRUD]+", answer) else 0.0


def _rush_hour(data: Any, answer: str, entry: Mapping[str, Any]) -> float:
    """Moves as the rules have them, square by square; solved is when piece A touches the right edge."""
    board = entry["metadata"]["board_config"]
    size = math.isqrt(len(board))
    places = {piece: [i for i, there in enumerate(board) if there == piece] for piece in set(board) - {"o", "x"}}
    if not re.fullmatch(r"[A-Z][+-][1-9](\s+[A-Z][+-][1-9])*", answer.strip()):
        return 0.0
    free = {i for i, there in enumerate(board) if there == "o"}
    for move in answer.split():
        squares = places.get(move[0])
        if squares is None:
            return 0.0
        across = squares[1] == squares[0] + 1
        for _ in range(int(move[2])):
            forward = move[1] == "+"
            end = max(squares) if forward else min(squares)
            new = end + (1 if across else size) * (1 if forward else -1)
            if new not in free or (across and new // size != end // size):
                return 0.0
            left = min(squares) if forward else max(squares)
            squares.remove(left)
            squares.append(new)
            free = (free - {new}) | {left}
    return float(max(places["A"]) % size == size - 1)


SCORERS: Mapping[str, Scorer] = {
    **dict.fromkeys(NUMBERS, number),
    **dict.fromkeys(FOLDED, folded),
    **dict.fromkeys(THEIRS, theirs),
    **dict.fromkeys(SHAPES, shaped),
    "codeio": _json,
    "coin_flip": _coins,
    "complex_arithmetic": _complex,
    "countdown": _countdown,
    "decimal_arithmetic": _decimals,
    "fraction_simplification": _fraction,
    "game_of_life": _json,
    "intermediate_integration": _antiderivative,
    "n_queens": _queens,
    "number_sorting": _sorted_numbers,
    "polynomial_equations": _roots,
    "polynomial_multiplication": _expanded,
    "pool_matrix": _matrix,
    "propositional_logic": _conclusion,
    "puzzle24": _24,
    "rush_hour": _rush_hour,
    "simple_integration": _antiderivative,
    "sokoban": _sokoban,
    "word_sorting": _sorted_words,
}  # all others: `text`


def scorer_of(name: str) -> Scorer:
    """Raises TaskError for a data set that is refused."""
    if name in REFUSED:
        raise TaskError(f"reasoning-gym's {name} is refused: {REFUSED[name]}")
    return SCORERS.get(name, text)
