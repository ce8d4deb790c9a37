"""Blackjack from an infinite deck, as Gymnasium's Blackjack-v1 plays it, state by state."""

from collections.abc import Iterator

from rung.core.errors import ConfigError, nearest
from rung.mdp.finite import FiniteMDP, from_function

CARDS = {card: (4 if card == 10 else 1) / 13 for card in range(1, 11)}  # an ace is 1, or 11 while that does not bust
STAND = 17  # from here on the dealer takes no card
RULES = ("sutton", "plain", "natural")

Hand = tuple[int, bool]  # total, and whether an ace counts as 11 in it


def blackjack(rules: str = "sutton") -> FiniteMDP:
    """Hit or stick against the dealer's open card; gamma is 1.

    rules: a natural (ace and ten at once) wins against all but another one ("sutton": `sab=True`), counts as 21
    ("plain"), or does and pays 1.5 ("natural").                                       [Sutton & Barto, example 5.1]"""
    if rules not in RULES:
        raise ConfigError(f"unknown rules {rules!r}. {nearest(rules, RULES)}")
    dealers = {card: _dealer(card) for card in CARDS}
    states: dict[str, tuple[Hand, bool, int]] = {}

    def named(hand: Hand, natural: bool, dealer: int) -> str:
        name = "natural" if natural else f"{hand[0]} with an ace" if hand[1] else str(hand[0])
        name = f"{name} against {dealer}"
        states[name] = (hand, natural, dealer)
        return name

    start: dict[str, float] = {}
    for first, chance_1 in CARDS.items():
        for second, chance_2 in CARDS.items():
            hand = _with(_with((0, False), first), second)
            for dealer, chance_3 in CARDS.items():
                name = named(hand, hand[0] == 21, dealer)
                start[name] = start.get(name, 0.0) + chance_1 * chance_2 * chance_3

    def outcomes(name: str | None) -> dict[str, list[tuple[float, str | None, float]]]:
        if name is None:
            return {}
        hand, natural, dealer = states[name]
        stick: list[tuple[float, str | None, float]] = [
            (chance, None, _pay(hand[0], natural, total, other, rules))
            for (total, other), chance in dealers[dealer].items()
        ]
        hit: list[tuple[float, str | None, float]] = []
        for card, chance in CARDS.items():
            drawn = _with(hand, card)
            hit.append((chance, None, -1.0) if drawn[0] > 21 else (chance, named(drawn, False, dealer), 0.0))
        return {"stick": stick, "hit": hit}

    return from_function(outcomes, list(start), 1.0, start=start)


def _with(hand: Hand, card: int) -> Hand:
    total, ace = hand[0] + card, hand[1]
    if card == 1 and not ace and total + 10 <= 21:
        return total + 10, True
    return (total - 10, False) if ace and total > 21 else (total, ace)


def _pay(mine: int, natural: bool, theirs: int, their_natural: bool, rules: str) -> float:
    theirs = 0 if theirs > 21 else theirs
    won = float((mine > theirs) - (mine < theirs))
    if rules == "sutton" and natural and not their_natural:
        return 1.0
    return 1.5 if rules == "natural" and natural and won == 1 else won


def _dealer(card: int) -> dict[tuple[int, bool], float]:
    """Chances of the dealer's final total (above 21: bust) and of a natural, given the open card."""
    ends: dict[tuple[int, bool], float] = {}
    for end, chance in _draws(_with((0, False), card), 1, 1.0):
        ends[end] = ends.get(end, 0.0) + chance
    return ends


def _draws(hand: Hand, cards: int, chance: float) -> Iterator[tuple[tuple[int, bool], float]]:
    if cards > 1 and hand[0] >= STAND:
        yield (hand[0], cards == 2 and hand[0] == 21), chance
        return
    for card, share in CARDS.items():
        yield from _draws(_with(hand, card), cards + 1, chance * share)
