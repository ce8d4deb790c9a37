"""The journal of grades: a verifier's clock must not change a resumed run, so what it said is read, not asked again.

Grades, *unknown* ones too, are on disk before the step that uses them; so are an environment's replies before the next
turn is sampled.  A grade or reply belongs to the tokens it judged (a whole episode so far): a key with other tokens is
not found, and the answer is judged again.  Where the verifier stopped the run, the journal
says so, and the unknown grades of that step are asked again: it may have been mended since.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rung.core.config import decode, encode
from rung.core.rundir import RunDir
from rung.core.words import Grade, Reply


@dataclass(frozen=True, kw_only=True)
class GradeKey:
    """Which answer of a run: `draw` counts refills and repeats of a problem, `sample` numbers a group."""

    step: int
    problem: str
    draw: int
    sample: int


class GradeJournal:
    """The grades and replies of one run from step `since` on, kept in `grades.jsonl`."""

    def __init__(self, run: RunDir, since: int = 0):
        self._run = run
        self._known: dict[tuple[GradeKey, str], Grade] = {}
        self._replies: dict[tuple[GradeKey, str], Reply] = {}
        for record in run.read("grades"):
            if "stopped" in record:
                self._forget(record["step"])
            elif record["step"] >= since:
                key = decode(GradeKey, {name: record[name] for name in ("step", "problem", "draw", "sample")})
                if "reply" in record:
                    self._replies[key, record["tokens"]] = decode(Reply, record["reply"])
                else:
                    self._known[key, record["tokens"]] = decode(Grade, record["grade"])

    def lookup(self, key: GradeKey, token_ids: Sequence[int], *, final: bool = True) -> Grade | Reply | None:
        """What was said to these tokens, None where they were never judged.

        final: the grade alone is wanted; else the reply, where there was one
        """
        at = key, fingerprint(token_ids)
        return self._known.get(at) if final else self._replies.get(at, self._known.get(at))

    def write(self, entries: Iterable[tuple[GradeKey, Sequence[int], Grade | Reply]]) -> None:
        """Add grades and replies; they are on disk when this returns."""
        records = []
        for key, token_ids, said in entries:
            tokens = fingerprint(token_ids)
            if isinstance(said, Reply):
                self._replies[key, tokens] = said
            else:
                self._known[key, tokens] = said
            records.append(asdict(key) | {"tokens": tokens, type(said).__name__.lower(): encode(said)})
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
