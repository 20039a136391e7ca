"""How long a step will take, phase by phase, from rates that are given or assumed."""

from __future__ import annotations

from sgpo.planning.training_memory import TrainingMemory

# Assumptions, not measurements: training TFLOP/s, sampled tokens/s of a model of 1e9 weights, GiB/s to the host.
CARD_RATES = {
    "24gb": (80.0, 12_000.0, 20.0),
    "80gb": (380.0, 25_000.0, 40.0),
    "141gb": (400.0, 32_000.0, 40.0),
    "cpu": (0.05, 150.0, 5.0),
}


def phase_seconds(planner: TrainingMemory, name: str) -> tuple[float, str]:
    """(seconds of a step, what they are spent on), all completions at full length: an upper bound.

    2 FLOP per weight and token forward, 4 backward, 2 more of all that is recomputed, and attention.
    """
    config, given, count = planner.config, planner.config.plan.rates, planner.place.processes
    tflops, decode, link = CARD_RATES[planner.place.card]
    flops = (given.matmul_tflops or tflops) * 1e12 * count
    tokens_per_s = (given.decode_tokens_per_s or decode * min(1.0, 1e9 / planner.P)) * count
    link = (given.host_gib_per_s or link) * 2**30
    rollout, new = config.rollout, config.rollout.max_new_tokens
    per_token = 2.0 * planner.P + 2.0 * planner.sizes.layers * planner.sizes.query * planner.sequence
    student = rollout.problems_per_step * (rollout.n_auto + planner.distils) * planner.sequence
    teacher = rollout.problems_per_step * planner.distils * planner.sequence
    again = float(config.model.gradient_checkpointing)
    if config.model.mlp_tile_tokens is not None:
        again += 3 * planner.sizes.hidden * planner.sizes.intermediate / planner.sizes.layer_parameters
    if name == "rollout":
        return rollout.problems_per_step * (rollout.n_auto + rollout.n_guided) * new / tokens_per_s, "decoding"
    if name == "score":
        guided = rollout.problems_per_step * rollout.n_guided * planner.sequence
        return guided * planner.distils * per_token / flops, "matrix products"
    if name == "forward":
        return (student + teacher) * per_token / flops, "matrix products"
    if name == "backward":
        return student * (2.0 + again) * per_token / flops, "matrix products"
    if name == "optimizer":
        share = planner.trained / count
        if planner.state == "cpu_offload":
            return share * (4.0 * planner.s + 28.0) / link * config.algorithm.mini_batches, "host memory"
        return share * 28.0 / (20 * link) * config.algorithm.mini_batches, "device memory"
    if name == "sync":
        return planner.s * planner.P / (link if planner.cuda else 20 * link), "weight transfer"
    return 0.0, "disk"
