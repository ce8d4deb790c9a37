"""The journal of grades: a verifier's clock must not change a resumed run, so what it said is read, not asked again.

Grades, *unknown* ones too, are on disk before the step that uses them.  A grade belongs to the tokens it judged: a
key with other tokens is not found, and the answer is graded again.  Where the verifier stopped the run, the journal
says so, and the unknown grades of that step are asked again: it may have been mended since.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rung.core.config import decode, encode
from rung.core.rundir import RunDir
from rung.core.words import Grade


@dataclass(frozen=True, kw_only=True)
class GradeKey:
    """Which answer of a run: `draw` counts refills and repeats of a problem, `sample` numbers a group."""

    step: int
    problem: str
    draw: int
    sample: int


class GradeJournal:
    """The grades of one run from step `since` on, kept in `grades.jsonl`."""

    def __init__(self, run: RunDir, since: int = 0):
        self._run = run
        self._known: dict[tuple[GradeKey, str], Grade] = {}
        for record in run.read("grades"):
            if "stopped" in record:
                self._forget(record["step"])
            elif record["step"] >= since:
                grade = decode(Grade, record["grade"])
                key = decode(GradeKey, {name: record[name] for name in ("step", "problem", "draw", "sample")})
                self._known[key, record["tokens"]] = grade

    def lookup(self, key: GradeKey, token_ids: Sequence[int]) -> Grade | None:
        """The grade that these tokens got, None where they were never graded."""
        return self._known.get((key, fingerprint(token_ids)))

    def write(self, entries: Iterable[tuple[GradeKey, Sequence[int], Grade]]) -> None:
        """Add grades; they are on disk when this returns."""
        records = []
        for key, token_ids, grade in entries:
            tokens = fingerprint(token_ids)
            self._known[key, tokens] = grade
            records.append(asdict(key) | {"tokens": tokens, "grade": encode(grade)})
        self._run.append("grades", records)

    def stop(self, step: int) -> None:
        """The verifier stopped the run in `step`: what it left unknown there will be asked again."""
        self._run.append("grades", [{"step": step, "stopped": True}])
        self._forget(step)

    def _forget(self, step: int) -> None:
        self._known = {at: grade for at, grade in self._known.items() if grade.known or at[0].step != step}


def fingerprint(token_ids: Sequence[int]) -> str:
    """Hash of an answer's token ids."""
    return hashlib.blake2b(",".join(map(str, token_ids)).encode(), digest_size=16).hexdigest()
