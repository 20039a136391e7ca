"""What the settings of a run must not say together, and the keys of earlier versions. Loads without torch."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

# Keys of earlier versions, and what a config that has one is told. The config.yaml of an old run may have them.
RENAMED = {"algorithm.target": "algorithm.selection", "model.lora.targets": "model.lora.modules"}
GONE = {
    "engine.shared_target_pass": "is gone: o+ is always chosen by a scoring pass before training; remove the line",
    **{old: f"has another name now: write {new}" for old, new in RENAMED.items()},
}

# What a method's paper sets; each is a default that the key itself overrides.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "dapo": {"dual_clip": 10.0, "refill_rounds": 9, "overlong_share": 0.2},
    "luffy": {"normalize_std": False, "clip_low": None, "clip_high": None, "entropy_coef": 0.001},
    "hpt": {"normalize_std": False, "clip_low": None, "clip_high": None},
}

# What apply_chat_template takes beside the template's own arguments, which alone are the user's.
_TAKEN_BY_PROMPTS = {
    *("conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize"),
    *("continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "strftime_now"),
}


def check_pairs(config: Any) -> None:
    """Raises ValueError with one sentence for settings (`sgpo.config.Config`) of different sections that cannot work
    together."""
    if taken := sorted(_TAKEN_BY_PROMPTS & config.data.template_kwargs.keys()):
        raise ValueError(f"data.template_kwargs: {', '.join(taken)} is set by sgpo itself; remove it")
    if config.model.activation_offload and not config.model.gradient_checkpointing:
        raise ValueError("model.activation_offload moves checkpoints; set model.gradient_checkpointing to true as well")
    method = config.algorithm.method
    if method == "grpo" and not config.algorithm.autonomous_grpo:
        raise ValueError("method: grpo and algorithm.autonomous_grpo: false leave no loss; switch the latter on")
    if method != "sgpo" and config.rollout.n_guided > 0:
        raise ValueError(f"method: {method} uses no guided rollouts; set rollout.n_guided to 0")
    if (method == "sft") != (config.rollout.n_auto == 0):
        raise ValueError(f"method: {method} and rollout.n_auto = {config.rollout.n_auto}: 0 is for sft, and only 0")
    if config.algorithm.refill_rounds and config.rollout.overlap:
        raise ValueError("algorithm.refill_rounds decides after sampling, rollout.overlap before; switch one off")
    batch = config.rollout.problems_per_step * (config.rollout.n_auto + config.rollout.n_guided)
    if config.train.max_rollouts is not None and not 0 < batch <= config.train.max_rollouts:
        raise ValueError(f"train.max_rollouts must hold at least one batch of rollouts ({batch})")
    needs_guided = method == "sgpo" and config.algorithm.distillation is not None
    if needs_guided and config.rollout.n_guided == 0:
        raise ValueError("rollout.n_guided = 0 leaves SGPO nothing to distil; raise it or use method: grpo")
    if needs_guided and config.data.without_strategy == "grpo" and not config.algorithm.autonomous_grpo:
        raise ValueError("data.without_strategy: grpo needs algorithm.autonomous_grpo: true, or they learn nothing")
    if config.rollout.problems_per_step % config.algorithm.mini_batches:
        raise ValueError("algorithm.mini_batches must divide rollout.problems_per_step")
    if config.rollout.n_auto == 1 and config.algorithm.autonomous_grpo:
        raise ValueError("rollout.n_auto = 1 gives no group to compare with; use at least 2")
    if config.rollout.engine == "vllm" and max(config.rollout.temperature, config.eval.temperature) > 2:
        raise ValueError("vLLM takes temperatures up to 2; lower rollout.temperature or eval.temperature, or use hf")
    if config.engine.sequence_parallel_size > 1 and config.model.attn_implementation != "sdpa":
        raise ValueError("engine.sequence_parallel_size above 1 needs model.attn_implementation: sdpa")
    if config.model.lora.dora and config.model.lora.sync == "adapters" and config.rollout.engine == "vllm":
        raise ValueError("vLLM has no DoRA adapters; set model.lora.sync to merged (or leave it at auto)")
    if config.engine.offload_states_during_rollout and config.rollout.placement == "process":
        raise ValueError(
            "engine.offload_states_during_rollout is for rollout.placement: inprocess, where both share the memory"
        )
    if config.warmup.enabled and config.warmup.data is None:
        raise ValueError("warmup.enabled needs warmup.data")
    reward, algorithm = config.reward, config.algorithm
    if ":" not in reward.kind and not 0 <= reward.correct_above < 1:
        raise ValueError(
            f"reward.correct_above = {reward.correct_above:g} does not part the rewards 0 and 1 of {reward.kind}; it "
            "must be at least 0 and below 1"
        )
    if needs_guided and algorithm.alpha == "adaptive" and algorithm.alpha_max < algorithm.alpha_0:
        logger.warning(
            "warning: algorithm.alpha_max = %g is below alpha_0 = %g: every problem that is solved with the strategy "
            "alone gets alpha_max", algorithm.alpha_max, algorithm.alpha_0,
        )  # fmt: skip
