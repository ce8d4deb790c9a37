"""Questions out of a file of JSON lines, read strictly: every line counts, and one that cannot be used is named.

A line is a table.  Its question is in the column `question` or `prompt` (a text, or a list of messages as chat data has
them), or `messages`, where a last turn of the assistant is the answer; its answer in `answer` or `solution`.  A column
"split" (train, validation, held_out) says which part a line belongs to.  All other columns are kept as they are.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rung.core.config import strict_json
from rung.core.errors import TaskError, nearest
from rung.core.words import Message, Problem, Role
from rung.tasks.base import problem_id, split_of

QUESTIONS, ANSWERS = ("question", "prompt", "messages"), ("answer", "solution")
SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns, "" for the usual ones; the system message of every question, "" for none."""

    question: str = ""
    answer: str = ""
    system: str = ""
    needs_answer: bool = True
    drop_duplicates: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line: its table as it stands, what is asked, and the known answer."""

    line: int
    table: Mapping[str, Any]
    asked: str | list[Mapping[str, Any]]
    messages: tuple[Message, ...]
    answer: str | None


def read(path: str, columns: Columns) -> tuple[Row, ...]:
    """Raises TaskError with the file and the line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error.strerror}") from error
    tables = [
        (number, _table(line, f"{path}, line {number}"))
        for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
        if line.strip()
    ]
    if not tables:
        raise TaskError(
            f'{path} has no questions: every line is a JSON table such as {{"question": "...", "answer": "..."}}'
        )
    first = tables[0][1]
    question = columns.question or _column(first, QUESTIONS, "question", path)
    answer = columns.answer or _column(first, ANSWERS, "answer", path, optional=True)
    rows = [_row(table, number, question, answer, columns, f"{path}, line {number}") for number, table in tables]
    return _unique(rows, path, drop=columns.drop_duplicates)


def problem_of(row: Row, task: str, **facts: str | int | float | bool) -> Problem:
    """The row as a problem; its id is that of its words."""
    if isinstance(row.table.get("split"), str):
        facts = {**facts, "split": row.table["split"]}
    content = "\n".join(f"{message.role} {message.content}" for message in row.messages)
    return Problem(id=problem_id(content), messages=row.messages, answer=row.answer, task=task, facts=facts)


def _table(line: bytes, where: str) -> dict[str, Any]:
    try:
        table = strict_json(line)
    except UnicodeDecodeError as error:
        raise TaskError(f"{where} is not UTF-8: byte {error.start + 1} is 0x{line[error.start]:02x}") from error
    except ValueError as error:
        raise TaskError(f"{where} is not JSON: {error}") from error
    if not isinstance(table, dict):
        hint = ": write every table on a line of its own, without a list around them" if isinstance(table, list) else ""
        raise TaskError(f"{where} must be a table of names and values, and is {_shown(table)}{hint}")
    try:
        json.dumps(table, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise TaskError(f"{where} holds half of a surrogate pair, which is no character") from error
    return table


def _column(table: Mapping[str, Any], usual: tuple[str, ...], what: str, path: str, *, optional: bool = False) -> str:
    found = [name for name in usual if name in table]
    if len(found) == 1 or (optional and not found):
        return found[0] if found else ""
    if found:
        raise TaskError(
            f"{path} has the columns {' and '.join(found)}: name the {what} by the option `{what}` "
            f"(--task.options.{what})"
        )
    raise TaskError(
        f"{path} needs a column {', '.join(usual[:-1])} or {usual[-1]}, or the option `{what}` that names another "
        f"(--task.options.{what}); it has {', '.join(table)}"
    )


def _row(table: Mapping[str, Any], number: int, question: str, answer_column: str, columns: Columns, where: str) -> Row:
    for name in (question, *([answer_column] if answer_column and columns.needs_answer else [])):
        if name not in table:
            raise TaskError(f"{where} has no {name!r}. {nearest(name, table) if table else 'It is empty.'}")
    asked, answer = table[question], table.get(answer_column) if answer_column else None
    turns = [Message("user", asked)] if isinstance(asked, str) else _messages(asked, question, where)
    if turns[-1].role == "assistant" and answer is None and not answer_column:
        *turns, last = turns
        answer, asked = last.content, asked[:-1]
    if not turns or turns[-1].role == "assistant" or not turns[-1].content.strip():
        raise TaskError(
            f"{where}: {question!r} must end with something that is asked, and is {_shown(table[question])}"
        )
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str | None) or (columns.needs_answer and not (answer or "").strip()):
        if not answer_column and answer is None:
            raise TaskError(
                f"{where} has no answer: needed a column {' or '.join(ANSWERS)}, or the option `answer` "
                f"that names another (--task.options.answer); it has {', '.join(table)}"
            )
        raise TaskError(f"{where}: the answer must be a text or a number, and is {_shown(answer)}")
    if columns.system and turns[0].role != "system":
        turns.insert(0, Message("system", columns.system))
    return Row(line=number, table=table, asked=asked, messages=tuple(turns), answer=answer)


def _messages(asked: Any, question: str, where: str) -> list[Message]:
    roles = get_args(Role)
    if not isinstance(asked, list) or not asked:
        raise TaskError(f"{where}: {question!r} must be a text or a list of messages, and is {_shown(asked)}")
    for turn in asked:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str) or turn.get("role") not in roles:
            raise TaskError(
                f"{where}: a message has a role ({', '.join(roles)}) and a content that is a text; this one is "
                f"{_shown(turn)}"
            )
    return [Message(turn["role"], turn["content"]) for turn in asked]


def _unique(rows: list[Row], path: str, *, drop: bool) -> tuple[Row, ...]:
    """A question that is listed twice could be learnt from in one part and reported on in another."""
    seen: dict[str, Row] = {}
    for row in rows:
        problem = problem_of(row, "")
        try:
            split_of(problem)
        except TaskError as error:
            raise TaskError(f"{path}, line {row.line}: {error}") from None
        other = seen.setdefault(problem.id, row)
        if other is not row and not (drop and other.answer == row.answer):
            same = "with one answer: keep one of them, or set drop_duplicates (--task.options.drop-duplicates)"
            two = f"with two answers, {_shown(other.answer)} and {_shown(row.answer)}: keep one of them"
            raise TaskError(
                f"{path}, lines {other.line} and {row.line} ask the same {same if other.answer == row.answer else two} "
                f"({_shown(row.messages[-1].content)})"
            )
    return tuple(seen.values())


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."
