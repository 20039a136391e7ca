"""What it saves to choose o+ and to learn it in one pass, against scoring the candidates beforehand.

    python -m benchmarks.target_pass [--tokens 512] [--repeats 3]

Training phase of one problem on a CPU: scoring, teacher, forward, backward, optimizer, by the trainer's own functions.
A small model with random weights; every completion has `--tokens` tokens and fills a micro-batch, layers are
checkpointed. The two ways alternate; a row is the median CPU time of the process, one way over the other, beside the
ratio of passes: 1 a forward, 1 recomputed, 2 a backward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from typing import Any

import torch

from sgpo.algorithm.targets import reachable_target
from sgpo.builders.loss import policy_objective
from sgpo.config import Config
from sgpo.engine.step import optimizer_step, score_contexts
from sgpo.engine.zero import ZeroEngine, init_distributed
from sgpo.model.policy import PolicyModel
from sgpo.types import Contest, TrainSequence

CASES = [(8, 2), (8, 4), (0, 2), (0, 4)]  # live autonomous completions, correct guided ones
PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description="One pass of o+ against two.")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    engine, config = make_engine(), make_config(options.tokens)
    print("| live autonomous | candidates | CPU time, one pass / two | passes, one / two |\n|---|---|---|---|")
    for live, candidates in CASES:
        ways = {shared: partial(step, engine, config, live, candidates, shared) for shared in (False, True)}
        ways[True]()  # warm
        spent: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(options.repeats):
            for shared, run in ways.items():
                began = time.process_time()
                run()
                spent[shared].append(time.process_time() - began)
        before, within = (statistics.median(spent[shared]) for shared in (False, True))
        passes = 4 * live + candidates + 5
        print(f"| {live} | {candidates} | {within / before:.3f} | {(passes - 1) / passes:.3f} |", flush=True)
    engine.close()


def make_engine() -> ZeroEngine:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    lm = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096)).eval()
    return ZeroEngine(
        PolicyModel(lm, gradient_checkpointing=True), device=init_distributed(60), zero_stage=0, dtype="float32",
        lr=1e-6, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip


def make_config(tokens: int) -> Config:
    return Config.model_validate(
        {"model": {"path": "builtin"}, "data": {"train": "builtin"}, "rollout": {"engine": "hf"},
         "engine": {"micro_batch_tokens": tokens + 2 * PROMPT}}
    )  # fmt: skip


def step(engine: ZeroEngine, config: Config, live: int, candidates: int, shared: bool) -> None:
    tokens = config.engine.micro_batch_tokens - 2 * PROMPT
    sequences = [sequence(k, tokens, advantage=(-1.0) ** k, policy_weight=1e-3) for k in range(live)]
    rivals = [sequence(100 + k, tokens, target_weight=1e-3) for k in range(candidates)]
    sizes: dict[str, Any] = {"token_budget": config.engine.micro_batch_tokens, "pad_id": 0}
    contests = [Contest(tuple(rivals))] if shared else []
    if not shared:
        scores = score_contexts(engine, [(s.prompt_ids, s.completion_ids) for s in rivals], **sizes)
        sequences.append(rivals[reachable_target(scores)])
    optimizer_step(engine, sequences, policy_objective(config), lr=1e-6, contests=contests, **sizes)


def sequence(seed: int, tokens: int, **weights: Any) -> TrainSequence:
    ids = torch.randint(4096, (3 * PROMPT + tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    teacher = tuple(ids[PROMPT : 3 * PROMPT]) if "target_weight" in weights else None
    return TrainSequence(tuple(ids[:PROMPT]), tuple(ids[3 * PROMPT :]), teacher_prompt_ids=teacher, **weights)


if __name__ == "__main__":
    main()
