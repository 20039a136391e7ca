"""The method and the loss that the config names: which sequences a step learns from, and by which formula."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from sgpo.algorithm.dapo import dapo_sequences
from sgpo.algorithm.hpt import hpt_sequences
from sgpo.algorithm.loss import LossSettings, SgpoLoss
from sgpo.algorithm.luffy import luffy_sequences
from sgpo.algorithm.method import Method
from sgpo.algorithm.sft import sft_step
from sgpo.algorithm.sgpo import SgpoSettings, sgpo_sequences
from sgpo.config import WITH_DEMONSTRATIONS, Config


def sgpo_settings(config: Config) -> SgpoSettings:
    """The switches of SGPO in the config; GRPO is SGPO without distillation."""
    chosen = {f.name: getattr(config.algorithm, f.name) for f in dataclasses.fields(SgpoSettings)}
    if config.algorithm.method == "grpo":
        chosen["distillation"] = None
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


def loss_settings(config: Config) -> LossSettings:
    """The loss that the config describes. Zero is no entropy bonus; a method with demonstrations imitates them."""
    algorithm = config.algorithm
    return LossSettings(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        entropy_coef=algorithm.entropy_coef or None,
        distillation="sft" if algorithm.method in WITH_DEMONSTRATIONS else algorithm.distillation,
        max_token_kl=algorithm.max_token_kl,
        over_limit=algorithm.over_limit,
        demo_shaping=algorithm.demo_shaping if algorithm.method == "luffy" else None,
        temperature=config.rollout.temperature,
        column_tolerance=config.engine.column_tolerance,
        impl=config.engine.loss_impl,
    )


def training_loss(config: Config) -> SgpoLoss:
    """The loss of one micro-batch, as an object: `print` it to see every number."""
    return SgpoLoss(loss_settings(config))
