"""Every knob of `sgpo strategies analyze`. Loads without torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from sgpo.config import Config, Section


class AnalyzeSection(Section):
    """Knobs of the analysis itself."""

    split: Literal["train", "eval"] = Field(default="train", description="problems of data.train or of data.eval")
    output: str | None = Field(default=None, description="folder to write; default: RUN/strategies")
    samples: int = Field(default=8, ge=1, description="completions per problem and arm")
    partners: int = Field(
        default=4, ge=1, description="other problems whose strategies a problem gets in one arm, taken in turn"
    )
    types: str = Field(
        default="stated",
        description="of a problem: stated (in its strategy), clusters (of similar strategies), or a field of the data",
    )
    matrix_draws: int = Field(default=8, ge=0, description="completions per cell of the type x type matrix; 0: none")
    matrix_types: int = Field(default=8, ge=2, description="only so many types, the most frequent, are in the matrix")
    placeholder: str = Field(default=".", min_length=1, description="what an empty strategy of the same length repeats")
    similarity: Literal["tfidf", "hidden"] = Field(
        default="tfidf", description="of strategies: by their words, or by the model's mean hidden states"
    )
    duplicate_similarity: float = Field(default=0.95, gt=0, le=1, description="from here on near-duplicates")
    clusters: int | None = Field(
        default=None, ge=1, description="number of clusters; default: that of the best silhouette"
    )
    score_key: str = Field(default="strategy_score", description="field that holds the quality of the strategy")
    bands: int = Field(default=4, ge=2, description="bins of quality, length and similarity")
    level: float = Field(default=0.05, gt=0, lt=1, description="of the test, problem by problem, of helps and hurts")
    kl_rollouts: int = Field(default=256, ge=0, description="correct guided rollouts whose token KL is taken; 0: none")
    step_pattern: str = Field(
        default=r"\n+|(?<=[.!?])\s+", description="where a step of a completion ends, as a regular expression"
    )

    @field_validator("step_pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression ({error})") from None
        return pattern


class AnalyzeConfig(Config):
    """All of `sgpo train`'s knobs, of which model, data, rollout, reward and engine count here, and its own."""

    analyze: AnalyzeSection = AnalyzeSection()
