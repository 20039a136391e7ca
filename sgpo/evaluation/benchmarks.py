"""The named benchmarks: their k in the paper, where their rows are, and how rows of common hub copies become problems.

None of them is shipped. A benchmark is read from a folder of JSONL files, from any file, or from a Hugging Face id.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgpo.data.problems import load_problems
from sgpo.types import Problem, SgpoError


@dataclass(frozen=True, slots=True)
class Protocol:
    """How the paper evaluates: sampling, and k of avg@k by benchmark (4 where it does not say)."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_new_tokens: int = 32768


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`samples` is k of avg@k; `files` are the names looked for in a folder; `hub` is a known copy on the hub."""

    name: str
    samples: int
    files: tuple[str, ...]
    hub: str


PAPER = Protocol()
DEFAULT_SAMPLES = 4
"""k of a benchmark that the paper does not have; it is also our choice for GSM8K."""

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark("math500", 4, ("math500.jsonl",), "hf:HuggingFaceH4/MATH-500:test"),
        Benchmark("amc23", 32, ("amc23.jsonl",), "hf:math-ai/amc23:test"),
        Benchmark("aime24", 32, ("aime24.jsonl",), "hf:HuggingFaceH4/aime_2024:train"),
        Benchmark(
            "olympiadbench",
            4,
            ("olympiadbench.jsonl", "olympiadbench_oe_to_maths_en.jsonl"),
            "hf:Hothan/OlympiadBench@OE_TO_maths_en_COMP:train",
        ),
        Benchmark("gsm8k", DEFAULT_SAMPLES, ("gsm8k.jsonl", "gsm8k_test.jsonl"), "hf:openai/gsm8k@main:test"),
    )
}

_TOP_LEVEL_COMMA = re.compile(r",(?!\s)")


def benchmark_samples(name: str) -> int:
    """k of avg@k by default."""
    return BENCHMARKS[name].samples if name in BENCHMARKS else DEFAULT_SAMPLES


def load_benchmark(
    spec: str, folder: str | None, *, limit: int | None = None, empty_answers: bool = False
) -> tuple[str, list[Problem]]:
    """Name and problems of `spec`.

    Args:
        spec: "NAME" (one of BENCHMARKS, in `folder`), "NAME=hf" (its known copy on the hub), or "NAME=SOURCE" with any
            source of `load_problems` and any name.
        folder: with the JSONL files of the named benchmarks.
        limit: only the first rows.
        empty_answers: as in `load_problems`.

    Raises:
        SgpoError: an unknown name, no file, or rows that cannot be read.
    """
    name, given, source = spec.partition("=")
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise SgpoError(f"The benchmark {spec!r} has no usable name: write NAME or NAME=SOURCE.")
    if not given or source == "hf":
        if name not in BENCHMARKS:
            close = difflib.get_close_matches(name.lower().replace("-", ""), BENCHMARKS, n=1, cutoff=0.5)
            raise SgpoError(
                f"The benchmark {name!r} is unknown{f'; did you mean {close[0]!r}?' if close else ''} Known are "
                f"{', '.join(BENCHMARKS)}; your own is written NAME=FILE."
            )
        source = BENCHMARKS[name].hub if source == "hf" else _file_of(BENCHMARKS[name], folder)
    return name, load_problems(source, limit=limit, convert=row_converter(name), empty_answers=empty_answers)


def _file_of(benchmark: Benchmark, folder: str | None) -> str:
    if folder is None:
        raise SgpoError(
            f"Where is the benchmark {benchmark.name}? Set eval.benchmark_dir to the folder with "
            f"{' or '.join(benchmark.files)}, or write {benchmark.name}=FILE, or {benchmark.name}=hf for "
            f"{benchmark.hub.removeprefix('hf:')}."
        )
    for file in benchmark.files:
        if (path := Path(folder) / file).is_file():
            return str(path)
    raise SgpoError(
        f"The folder {folder} has no {' or '.join(benchmark.files)}: put it there, or write {benchmark.name}=FILE."
    )


def row_converter(name: str) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
    """From (number of the row, row as the hub has it) to a row with id, problem and answer.

    Known columns: `problem` or `question`; `answer`, or `final_answer` as a list; `id` or `unique_id`, text or number;
    `context` in front of the question; a `solution` that is a list. What is there already in our form is left alone.
    """

    def convert(number: int, original: dict[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {**original}
        if "problem" not in row and "question" in row:
            row["problem"] = row.pop("question")
        row_id = row.get("id", row.get("unique_id"))
        row["id"] = row_id if isinstance(row_id, str) else f"{name}/{number if row_id is None else row_id}"
        if isinstance(row.get("context"), str) and isinstance(row.get("problem"), str) and row["context"].strip():
            row["problem"] = f"{row['context'].strip()}\n\n{row['problem']}"
        if isinstance(row.get("solution"), list):
            row["solution"] = "\n\n".join(map(str, row["solution"])) or None
        row["answer"] = _answer(name, row)
        return row

    return convert


def _answer(name: str, row: dict[str, Any]) -> Any:
    answer, parts = row.get("answer"), row.get("final_answer")
    if answer is None and isinstance(parts, list):
        answer = ", ".join(str(part).replace("$", "") for part in parts)
    if name == "gsm8k" and isinstance(answer, str) and "####" in answer:  # the hub's answer is the worked solution
        answer = answer.rpartition("####")[2].strip().replace(",", "")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return spaced_list(answer) if row.get("is_multiple_answer") and isinstance(answer, str) else answer


def spaced_list(answer: str) -> str:
    """`8,221` as a list of two answers: `8, 221`, which no reader takes for a thousand."""
    return _TOP_LEVEL_COMMA.sub(", ", answer)


def content_hash(problems: Sequence[Problem]) -> str:
    """Of ids, problem texts and answers, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        for text in (problem.id, problem.problem, problem.answer):
            data = text.encode("utf-8")
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()
