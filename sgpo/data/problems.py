"""Problems from JSONL files and from Hugging Face `datasets`: every bad row is named, nothing is repaired in silence.

A row has non-empty strings `id`, `problem` and `answer`; optional are `strategy`, `solution` (strings) and
`guidance_turns` (chat turns that alternate user, assistant and end with assistant). An optional key that is null or an
empty list counts as absent. Everything else is kept in `Problem.extra`. An integer `answer` becomes its decimal string,
because that is what it can only mean; a float is refused, since 0.10 and 0.1 would no longer differ.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sgpo.types import ChatTurn, Problem, SgpoError

MAX_LISTED = 20
"""How many bad rows one error lists before it only counts the rest."""

_REQUIRED = ("id", "problem", "answer")
_OPTIONAL_TEXT = ("strategy", "solution")
_KNOWN = frozenset((*_REQUIRED, *_OPTIONAL_TEXT, "guidance_turns"))
_TABLE_BUILDERS = {".parquet": "parquet", ".json": "json"}

Row = tuple[str, Any]
"""Where the row stands ("file:line") and the decoded row, or the ValueError that decoding raised."""


def load_problems(
    source: str,
    *,
    limit: int | None = None,
    convert: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None,
    empty_answers: bool = False,
) -> list[Problem]:
    """The problems of `source`, in file order.

    Args:
        source: a JSONL file; a `.parquet` or `.json` file, a folder saved by `Dataset.save_to_disk`, or
            "hf:<dataset>[@configuration][:split]" (split "train" unless given), the last four through the `datasets`
            package.
        limit: read and check only this many rows (blank lines not counted).
        convert: from the number of a row (from 0) and the row to one with the keys above, for data in another form.
        empty_answers: whether an answer may be empty, for a caller that leaves such problems out.

    Raises:
        SgpoError: one error for all bad rows, each named by file and line; no file, an empty file, no `datasets`.
    """
    if limit is not None and limit < 1:
        raise SgpoError(f"The limit on problems must be at least 1, got {limit}.")
    problems: list[Problem] = []
    complaints: list[str] = []
    first_place: dict[str, str] = {}
    for number, (place, row) in enumerate(islice(_rows(source), limit)):
        if convert is not None and isinstance(row, dict):
            row = convert(number, row)
        found = [text for text in _row_complaints(row) if not (empty_answers and text == _EMPTY_ANSWER)]
        complaints += [f"{place}: {text}" for text in found]
        if found:
            continue
        problem = _to_problem(row, place)
        if problem.id in first_place:
            complaints.append(f"{place}: duplicate id {problem.id!r}, first used at {first_place[problem.id]}")
        else:
            first_place[problem.id] = place
            problems.append(problem)
    if complaints:
        head = f"{source} has {_count(complaints, 'fault')}; correct or remove these rows"
        raise SgpoError(listing(head, complaints))
    if not problems:
        raise SgpoError(f"{source} holds no problems: expected at least one row with id, problem and answer.")
    return problems


def check_disjoint(train: Sequence[Problem], evaluation: Sequence[Problem]) -> None:
    """Raises SgpoError that lists the pairs of ids whose problem text is in both sets.

    Texts are compared after Unicode NFKC, case folding and joining of white space.
    """
    train_ids = {normalised_text(problem.problem): problem.id for problem in train}
    shared = [
        f"evaluation {problem.id!r} is training {train_ids[key]!r}"
        for problem in evaluation
        if (key := normalised_text(problem.problem)) in train_ids
    ]
    if shared:
        head = f"{_count(shared, 'evaluation problem')} also in the training data; remove them from one of the two sets"
        raise SgpoError(listing(head, shared))


def listing(head: str, items: Sequence[str]) -> str:
    """`head` and the items below it, at most MAX_LISTED of them and then a count."""
    lines = [f"{head}:", *(f"  {item}" for item in items[:MAX_LISTED])]
    if len(items) > MAX_LISTED:
        lines.append(f"  and {len(items) - MAX_LISTED} more")
    return "\n".join(lines)


def _count(items: Sequence[str], noun: str) -> str:
    return f"{len(items)} {noun}{'' if len(items) == 1 else 's'}"


def normalised_text(text: str) -> str:
    """The text after Unicode NFKC, case folding and joining of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _rows(source: str) -> Iterator[Row]:
    if source.startswith("hf:"):
        return _dataset_rows(source)
    path = Path(source)
    if not path.exists():
        raise SgpoError(
            f"No data file at {source}: expected a JSONL, JSON or parquet file, a folder saved by datasets, "
            'or "hf:<dataset>[@configuration][:split]".'
        )
    if path.is_dir() or path.suffix in _TABLE_BUILDERS:
        return _dataset_rows(source)
    return _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    # Bytes, split at \n only: one undecodable line is named and the others are still checked.
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    yield f"{path}:{number}", _decoded(raw)
    except OSError as error:
        raise SgpoError(f"Cannot read {path}: {error.strerror}.") from error


def _decoded(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except ValueError as error:  # UnicodeDecodeError, JSONDecodeError, an integer of too many digits
        return error


def _dataset_rows(source: str) -> Iterator[Row]:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise SgpoError(f"Reading {source} needs the package datasets: pip install datasets, or use JSONL.") from error

    split = "train"
    path = Path(source)
    try:
        if source.startswith("hf:"):
            name, _, wanted = source.removeprefix("hf:").partition(":")
            split = wanted or split
            name, _, configuration = name.partition("@")
            table = datasets.load_dataset(name, configuration or None, split=split)
        elif path.is_dir():
            table = datasets.load_from_disk(source)
            if isinstance(table, datasets.DatasetDict):
                table = table[split]
        else:
            table = datasets.load_dataset(_TABLE_BUILDERS[path.suffix], data_files=source, split=split)
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        raise SgpoError(
            f"The datasets package cannot load split {split!r} of {source} ({_first_line(error)}): "
            "check the name, the split and the format."
        ) from error
    for number, row in enumerate(table, start=1):
        yield f"{source} row {number}", row


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _row_complaints(row: Any) -> list[str]:
    if isinstance(row, UnicodeDecodeError):
        return [f"not UTF-8 ({row.reason} at byte {row.start} of the line)"]
    if isinstance(row, ValueError):
        return [f"not valid JSON ({row})"]
    if not isinstance(row, dict):
        return [f"expected a JSON object, got {_kind(row)}"]
    required = (_text_complaint(key, row.get(key, _MISSING)) for key in _REQUIRED)
    optional = (_text_complaint(key, row[key]) for key in _OPTIONAL_TEXT if row.get(key) is not None)
    turns = _turn_complaints(row.get("guidance_turns"))
    return [*filter(None, (*required, *optional)), *turns]


_MISSING = object()
_EMPTY_ANSWER = "'answer' is empty"


def _text_complaint(key: str, value: Any) -> str | None:
    if value is _MISSING:
        return f"missing key {key!r}"
    if key == "answer" and _is_int(value):
        return None
    if not isinstance(value, str):
        return f"{key!r} must be a string, got {_kind(value)}"
    if not value.strip():
        return f"{key!r} is empty"
    if not _is_encodable(value):
        return f"{key!r} holds half of a surrogate pair, which is not text"
    return None


def _turn_complaints(turns: Any) -> Iterator[str]:
    if turns is None:
        return
    if not isinstance(turns, list):
        yield f"'guidance_turns' must be a list of chat turns, got {_kind(turns)}"
        return
    for index, turn in enumerate(turns):
        role = ("user", "assistant")[index % 2]
        if not isinstance(turn, dict) or set(turn) != {"role", "content"}:
            yield f"guidance turn {index} must be an object with the keys role and content"
        elif turn["role"] != role:
            yield f"guidance turn {index} must have the role {role!r} (the two alternate), got {turn['role']!r}"
        elif complaint := _text_complaint("content", turn["content"]):
            yield f"guidance turn {index}: {complaint}"
    if len(turns) % 2:
        yield "'guidance_turns' must end with an assistant turn"


def _to_problem(row: dict[str, Any], place: str) -> Problem:
    turns: Iterable[dict[str, Any]] = row.get("guidance_turns") or ()
    return Problem(
        id=row["id"],
        problem=row["problem"],
        answer=str(row["answer"]),
        strategy=row.get("strategy"),
        guidance_turns=tuple(ChatTurn(turn["role"], turn["content"]) for turn in turns),
        solution=row.get("solution"),
        extra={key: value for key, value in row.items() if key not in _KNOWN},
        place=place,
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "an integer", float: "a float"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
