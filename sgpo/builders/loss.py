"""The method and the loss that the config names: which sequences a step learns from, and by which formula."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from sgpo.algorithm.dapo import dapo_sequences
from sgpo.algorithm.hpt import hpt_sequences
from sgpo.algorithm.loss import imitation_objective
from sgpo.algorithm.luffy import luffy_sequences
from sgpo.algorithm.method import Method
from sgpo.algorithm.sft import sft_step
from sgpo.algorithm.sgpo import SgpoSettings, sgpo_sequences
from sgpo.config import WITH_DEMONSTRATIONS, Config
from sgpo.engine.batching import MicroBatch
from sgpo.engine.step import Objective, objective_with


def sgpo_settings(config: Config) -> SgpoSettings:
    """The switches of SGPO in the config; GRPO is SGPO without distillation."""
    chosen = {f.name: getattr(config.algorithm, f.name) for f in dataclasses.fields(SgpoSettings)}
    if config.algorithm.method == "grpo":
        chosen["distillation"] = "none"
    return SgpoSettings(**chosen)


def training_method(config: Config) -> Method:
    """The config's method: groups in, weighted training sequences out."""
    algorithm = config.algorithm
    centred = {"normalize_std": algorithm.normalize_std, "max_new_tokens": config.rollout.max_new_tokens}
    methods: dict[str, Any] = {
        "sgpo": partial(sgpo_sequences, settings=sgpo_settings(config)),
        "grpo": partial(sgpo_sequences, settings=sgpo_settings(config)),
        "dapo": partial(dapo_sequences, overlong_share=algorithm.overlong_share, **centred),
        "luffy": partial(luffy_sequences, **centred),
        "hpt": partial(hpt_sequences, gate=algorithm.demo_gate, **centred),
        "sft": sft_step,
    }
    return methods[algorithm.method]


def policy_objective(config: Config) -> Objective:
    """The loss of one micro-batch with the config's switches bound."""
    algorithm = config.algorithm
    over_limit = algorithm.over_limit
    return objective_with(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        entropy_coef=algorithm.entropy_coef,
        distillation="sft" if algorithm.method in WITH_DEMONSTRATIONS else algorithm.distillation,
        demo_shaping=algorithm.demo_shaping if algorithm.method == "luffy" else None,
        max_token_kl=None if over_limit == "off" else algorithm.max_token_kl,
        over_limit="mask" if over_limit == "off" else over_limit,
        temperature=config.rollout.temperature,
        column_tolerance=config.engine.column_tolerance,
        impl=config.engine.loss_impl,
    )


def sft_objective() -> Objective:
    """The loss of the warm-up: weighted negative log-likelihood."""

    def objective(head: Any, bias: Any, hidden: Any, _: Any, micro: MicroBatch) -> Any:
        return imitation_objective(head, bias, hidden, micro.student.targets, micro.target_weight)

    return objective
