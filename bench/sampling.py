"""Milliseconds to draw one token for each of 64 rows of 49 152 words, at temperature 1 and at the default recipe's."""

from bench.harness import Side, announce, measure, options, seconds


def main() -> None:
    """Our sampler alone: its bar is a number."""
    given = options(__doc__)
    announce(given)
    rows, vocabulary = (4, 1000) if given.quick else (64, 49152)
    for temperature in (1.0, 1.2):
        spec = {"rows": rows, "vocabulary": vocabulary, "temperature": temperature}
        side = Side(name="rung", job="bench.ours:sampling", spec=spec)
        what = f"sampling: {rows} rows of {vocabulary} words, temperature {temperature}"
        measure(what, side, lambda turn: 1e3 * seconds(turn), unit="ms", bar="<= 5 ms", given=given)


if __name__ == "__main__":
    main()
