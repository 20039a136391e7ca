"""What a whole optimizer step keeps in memory, in a real engine: scoring, teacher, forward, backward, Adam."""

import math

import torch
from sgpo_kernels import sizes
from sgpo_kernels.testing import Peak, cpu_peak
from transformers import Qwen2Config, Qwen2ForCausalLM

from sgpo.builders.loss import training_loss
from sgpo.config import Config
from sgpo.engine import zero
from sgpo.engine.step import optimizer_step, score_contexts
from sgpo.model.policy import PolicyModel
from sgpo.types import TrainSequence

HIDDEN, SMALL, LARGE = 32, 1024, 3072
PROMPT = 8


def sequence(seed: int, tokens: int, **weights) -> TrainSequence:
    ids = torch.randint(64, (3 * PROMPT + tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    teacher = tuple(ids[PROMPT : 3 * PROMPT]) if "distill_weight" in weights else None
    return TrainSequence(tuple(ids[:PROMPT]), tuple(ids[3 * PROMPT :]), teacher_prompt_ids=teacher, **weights)


def step_peak(device, *, vocab: int, tokens: int) -> Peak:
    """Of a step with completions of `tokens` tokens: two live ones that are scored before, and two targets."""
    numbers = {"hidden_size": HIDDEN, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = Qwen2ForCausalLM(
            Qwen2Config(
                **numbers, vocab_size=vocab, num_hidden_layers=1, tie_word_embeddings=False,
                max_position_embeddings=8192, attn_implementation="sdpa",
            )
        ).eval()  # fmt: skip
    engine = zero.ZeroEngine(
        PolicyModel(lm, gradient_checkpointing=True), device=device, zero_stage=0, dtype="float32", lr=1e-3,
        betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, max_grad_norm=1.0,
    )  # fmt: skip
    config = Config.model_validate(
        {"model": {"path": "builtin"}, "data": {"train": "builtin"}, "rollout": {"engine": "hf"}}
    )
    policy = [sequence(k, tokens, advantage=(-1.0) ** k, policy_weight=0.1) for k in range(2)]
    sizes = {"token_budget": tokens + 2 * PROMPT, "pad_id": 0}

    def step() -> None:
        score_contexts(engine, [(s.prompt_ids, s.completion_ids) for s in policy], **sizes)
        live = [*policy, *(sequence(k, tokens - 8 * (k == 10), distill_weight=0.1) for k in (5, 10))]
        result = optimizer_step(engine, live, training_loss(config), lr=1e-3, **sizes)
        assert len(result.passes) == 4
        assert math.isfinite(result.loss)
        assert result.grad_norm is not None

    peak = cpu_peak(step)
    engine.close()
    return peak


def test_no_tensor_of_a_step_is_as_large_as_tokens_times_vocabulary(device, monkeypatch):
    """And what grows with the vocabulary (weights, states, the head's gradient) does not grow with the tokens.

    The loss's chunk of logits, 64 MiB on a CPU, would hide it: here it is 256 KiB.
    """
    monkeypatch.setattr(sizes, "CPU_CHUNK_BYTES", 1 << 18)
    few, many = 256, 768
    peaks = {(v, n): step_peak(device, vocab=v, tokens=n) for v in (SMALL, LARGE) for n in (few, many)}
    for (vocab, tokens), peak in peaks.items():
        assert peak.largest_bytes < tokens * vocab * 2, (vocab, tokens)  # not even in bf16
    slopes = [(peaks[LARGE, n].peak_bytes - peaks[SMALL, n].peak_bytes) / (LARGE - SMALL) for n in (few, many)]
    assert abs(slopes[1] - slopes[0]) < 0.01 * 4 * (many - few), slopes
    # Gradients, masters' update and dW: a few fp32 copies of the head and of the embedding, no logits.
    assert slopes[1] < 8 * 4 * 2 * HIDDEN, slopes
