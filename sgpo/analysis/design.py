"""What is sampled in which context: the problems under study, their types, and a prompt for every draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sgpo.analysis import similarity, transfer
from sgpo.analysis.settings import AnalyzeConfig
from sgpo.analysis.transfer import Draw
from sgpo.builders.task import load_task, prompt_builder
from sgpo.engine.batching import collate, length_sorted
from sgpo.model.loading import check_length, check_token_ids, load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.types import Problem, PromptPair, SgpoError

_MOST_PROBLEMS = 8192  # similarity is P x P
_ANY_LENGTH = 2**20


@dataclass(frozen=True, slots=True)
class Study:
    """The problems under study with all that is known before sampling; lists in the order of the problems."""

    problems: list[Problem]
    prompts: list[PromptPair]
    texts: list[str]
    lengths: list[int]
    alike: torch.Tensor
    clusters: list[int]
    silhouette: float | None
    types: list[str | None]


@dataclass(frozen=True, slots=True)
class Design:
    """Every draw with its prompt; `cells` are the draws of the matrix by (type of the strategy, of the problem)."""

    draws: list[Draw]
    cells: dict[tuple[str, str], list[Draw]]
    prompts: dict[Draw, tuple[int, ...]]
    placeholder_excess: list[int]


def load_study(config: AnalyzeConfig, folder: Path, tokenizer: Any) -> tuple[Study, list[str]]:
    """The problems that have guidance, and the ids of those that have none.

    Raises SgpoError for bad data, and where fewer than two problems are left.
    """
    settings = config.analyze
    source = config.data.train if settings.split == "train" else config.data.eval
    if not source:
        raise SgpoError("analyze.split: eval needs data.eval")
    task = load_task(config, tokenizer, split=settings.split)
    kept = [i for i, problem in enumerate(task.problems) if problem.has_guidance]
    if len(kept) < 2:
        raise SgpoError(f"{source} has {len(kept)} problems with a strategy; transfer needs at least two")
    if len(kept) > _MOST_PROBLEMS:
        raise SgpoError(
            f"{source} has {len(kept)} problems, more than {_MOST_PROBLEMS}; set data.{settings.split}_limit"
        )
    problems = [task.problems[i] for i in kept]
    texts = [transfer.guidance_text(problem) for problem in problems]
    tokens = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    vectors = (
        similarity.tfidf_vectors(texts)
        if settings.similarity == "tfidf"
        else _hidden_vectors(config, folder, tokenizer.pad_token_id, tokens)
    )
    alike = similarity.cosine_similarity(vectors)
    clusters, score = similarity.cluster(alike, settings.clusters)
    types = transfer.types_of(problems, settings.types, clusters)
    prompts = [task.prompts[i] for i in kept]
    study = Study(problems, prompts, texts, [len(ids) for ids in tokens], alike, clusters, score, types)
    return study, [problem.id for problem in task.problems if not problem.has_guidance]


def make_design(config: AnalyzeConfig, folder: Path, tokenizer: Any, study: Study) -> Design:
    """Raises SgpoError where a prompt with another problem's strategy is too long."""
    settings, seed = config.analyze, config.run.seed
    ids = [problem.id for problem in study.problems]
    draws = transfer.assign(ids, study.types, samples=settings.samples, partners=settings.partners, seed=seed)
    names = transfer.matrix_types(study.types, settings.matrix_types)
    wanted = settings.matrix_draws > 0 and len(names) > 1
    cells = transfer.assign_matrix(study.types, names, draws=settings.matrix_draws, seed=seed) if wanted else {}
    every = draws + [draw for cell in cells.values() for draw in cell]
    builder = prompt_builder(config, tokenizer)
    data = config.data.model_copy(update={"max_prompt_tokens": _ANY_LENGTH})
    free = prompt_builder(config.model_copy(update={"data": data}), tokenizer)

    def guided(problem: Problem) -> tuple[int, ...]:
        """Of a placeholder, which may be too long while its length is being found."""
        return free.build(problem).guided or ()

    pairs = sorted({(d.problem, d.source) for d in every if d.arm in transfer.FOREIGN and d.source is not None})
    foreign = [transfer.with_guidance_of(study.problems[i], study.problems[j]) for i, j in pairs]
    foreign_ids = {pair: prompt.guided or () for pair, prompt in zip(pairs, builder.check_all(foreign), strict=True)}
    empty = [
        transfer.placeholder(
            problem,
            settings.placeholder,
            len(prompt.guided or ()),
            count_of=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
            length_of=lambda candidate: len(guided(candidate)),
        )
        for problem, prompt in zip(study.problems, study.prompts, strict=True)
    ]
    empty_ids = [guided(problem) for problem, _ in empty]

    def prompt_of(draw: Draw) -> tuple[int, ...]:
        if draw.arm in transfer.FOREIGN and draw.source is not None:
            return foreign_ids[draw.problem, draw.source]
        pair = study.prompts[draw.problem]
        return {"none": pair.plain, "own": pair.guided or (), "placeholder": empty_ids[draw.problem]}[draw.arm]

    prompts = {draw: prompt_of(draw) for draw in every}
    prompt = max(map(len, prompts.values()))
    longest = prompt + config.rollout.max_new_tokens
    sequence = f"a sequence may have {longest} tokens (prompt {prompt} + rollout.max_new_tokens)"
    check_length(folder, longest, sequence, "lower rollout.max_new_tokens")
    check_token_ids(folder, tokenizer, prompts.values())
    return Design(every, cells, prompts, [excess for _, excess in empty])


def load_policy(config: AnalyzeConfig, folder: Path) -> tuple[PolicyModel, torch.device]:
    """The model that is analysed, ready for passes without gradient, and its device."""
    lm = load_causal_lm(folder, dtype=config.model.dtype, attn_implementation=config.model.attn_implementation)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return PolicyModel(lm.to(device)).eval(), device


@torch.no_grad()
def _hidden_vectors(config: AnalyzeConfig, folder: Path, pad_id: int, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Mean last hidden state of each text, less the mean of all: without that all are alike. float32 [P, H]."""
    model, device = load_policy(config, folder)
    vectors = torch.zeros(len(texts), model.lm.config.get_text_config().hidden_size)
    for group in length_sorted([len(ids) + 1 for ids in texts], config.engine.micro_batch_tokens):
        # Rows that predict ids[1:] and one padding token: all positions of the text.
        batch = collate([texts[i][:1] for i in group], [(*texts[i][1:], pad_id) for i in group], pad_id).to(device)
        states = model.hidden(batch.input_ids, batch.rows).float().cpu()
        for i, part in zip(group, states.split([len(texts[i]) for i in group]), strict=True):
            vectors[i] = part.mean(0)
    return vectors - vectors.mean(0)
