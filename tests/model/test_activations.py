"""Packed, checkpointed, offloaded and tiled training give the plain gradient; what each keeps is measured."""

import copy

import pytest
import torch
from sgpo_kernels import sizes
from sgpo_kernels.testing import cpu_peak
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from sgpo.algorithm.loss import LossSettings, SgpoLoss
from sgpo.engine.batching import collate_training
from sgpo.model.activations import use_liger
from sgpo.model.policy import PolicyModel
from sgpo.types import SgpoError, TrainSequence

VOCAB = 61
SHAPE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}  # fmt: skip
KINDS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def make(kind: str = "llama", **changes):
    config, model = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lm = model(config(**{**SHAPE, **changes, "attn_implementation": "sdpa"})).eval()
        for name, parameter in lm.named_parameters():  # biases start at 0 and would hide a mistake
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return lm


def ids(seed: int, count: int, vocab: int = VOCAB) -> tuple[int, ...]:
    return tuple(torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def sequences(scale: int = 1) -> list[TrainSequence]:
    """Two policy sequences, two distilled ones whose teacher's prompt is longer, one of both kinds."""
    lengths = [(5, 9), (3, 4), (7, 2), (2, 11), (1, 6)]
    made = []
    for i, (prompt, completion) in enumerate(lengths):
        policy = {"advantage": 0.7 - i, "policy_weight": 0.1} if i in (0, 1, 4) else {}
        target = {"distill_weight": 0.2, "teacher_prompt_ids": ids(50 + i, scale * (prompt + 4))} if i >= 2 else {}
        made.append(TrainSequence(ids(i, scale * prompt), ids(20 + i, scale * completion), **policy, **target))
    return made


def loss_of(model: PolicyModel, micro):
    return model(SgpoLoss(LossSettings(clip_low=0.2, clip_high=0.28, max_token_kl=None)), micro)[0]


def gradients(lm, made: list[TrainSequence], **options) -> dict[str, torch.Tensor]:
    """The gradient of the step's loss, all sequences in one micro-batch."""
    lm = copy.deepcopy(lm)
    micro = collate_training(made, 0, with_teacher=True, packed=options.get("packed", False))
    loss_of(PolicyModel(lm, **options), micro).backward()
    return {name: parameter.grad for name, parameter in lm.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 2e-5) -> None:
    for name, truth in wanted.items():
        assert float(truth.norm()) > 0, name
        assert float((found[name] - truth).norm()) <= tolerance * float(truth.norm()), name


# ---- packed --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_those_of_each_sequence_alone(kind):
    lm = make(kind)
    made = sequences()
    micro = collate_training(made, 0, with_teacher=True, packed=True)
    model = PolicyModel(copy.deepcopy(lm), packed=True)
    policy, target = [made[i] for i in (0, 1, 4)], made[2:]

    def alone(prompt, completion):
        states = lm.base_model(input_ids=torch.tensor([[*prompt, *completion]])).last_hidden_state[0]
        return states[len(prompt) - 1 : -1]

    wanted = torch.cat([alone(s.prompt_ids, s.completion_ids) for s in policy + target])
    found = model.hidden(micro.student.input_ids, micro.student.rows, micro.student.lengths)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    wanted = torch.cat([alone(s.teacher_prompt_ids, s.completion_ids) for s in target])
    found = model.hidden(micro.teacher.input_ids, micro.teacher.rows, micro.teacher.lengths)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert micro.tokens == sum(len(s.prompt_ids) + len(s.completion_ids) for s in made) + sum(
        len(s.teacher_prompt_ids) + len(s.completion_ids) for s in target
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_gradient_is_the_padded_one(kind):
    lm = make(kind)
    assert_same(gradients(lm, sequences(), packed=True), gradients(lm, sequences()))


def test_packing_what_has_no_such_attention_is_refused():
    lm = make("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    with pytest.raises(SgpoError, match=r"sliding_attention.*set engine\.packing to padded"):
        PolicyModel(lm, packed=True)
    # Mistral names no kinds of layers, and has a window all the same.
    for window, positions in ((8, 64), (64, 64), (None, 64)):
        config = MistralConfig(**{**SHAPE, "max_position_embeddings": positions}, sliding_window=window)
        lm = MistralForCausalLM(config).eval()
        if window == 8:
            with pytest.raises(SgpoError, match="sliding_attention"):
                PolicyModel(lm, packed=True)
        else:
            PolicyModel(lm, packed=True)


def test_a_packed_model_never_mixes_sequences_for_want_of_their_lengths():
    model = PolicyModel(make(), packed=True)
    with pytest.raises(SgpoError, match="does not hand the lengths"):
        model.hidden(torch.tensor([[1, 2, 3]]), torch.tensor([1]))


# ---- memory for time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "activation_offload": True},
        {"mlp_tile_tokens": 7},
        {"gradient_checkpointing": True, "activation_offload": True, "mlp_tile_tokens": 7},
    ],
    ids=["checkpointed", "offloaded", "tiled", "all"],
)
def test_the_gradient_is_the_plain_one(options, packed):
    lm = make("qwen2")
    assert_same(gradients(lm, sequences(), packed=packed, **options), gradients(lm, sequences()))


def backward_peak(lm, made, **options) -> int:
    model = PolicyModel(copy.deepcopy(lm), **options)
    micro = collate_training(made, 0, with_teacher=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return cpu_peak(lambda: loss_of(model, micro).backward()).peak_bytes


def test_each_memory_option_lowers_the_peak():
    """Also under DeepSpeed's evaluation mode: transformers alone checkpoints only models in training mode."""
    lm = make(num_hidden_layers=4, intermediate_size=512)
    made = sequences(scale=8)
    plain = backward_peak(lm, made)
    tiled = backward_peak(lm, made, mlp_tile_tokens=64)
    checkpointed = backward_peak(lm, made, gradient_checkpointing=True)
    both = backward_peak(lm, made, gradient_checkpointing=True, mlp_tile_tokens=64)
    assert tiled < 0.6 * plain
    assert checkpointed < 0.5 * plain
    assert both < 0.7 * checkpointed


def test_only_the_input_of_each_layer_goes_to_the_host(monkeypatch):
    moved = []

    class Recorded(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            super().__init__(lambda tensor: moved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recorded)
    model = PolicyModel(make(), gradient_checkpointing=True, activation_offload=True)
    model.hidden(torch.tensor([[1, 2, 3, 4]]), torch.tensor([1])).sum().backward()
    assert [shape for shape in moved if shape != (0,)] == [(1, 4, 32)] * 3


def test_the_final_norm_sees_the_selected_rows_alone():
    model, seen = PolicyModel(make()), []
    model.lm.base_model.norm.register_forward_hook(lambda _, args, out: seen.append(out.shape))
    model.hidden(torch.tensor([[1, 2, 3, 4]]), torch.tensor([1, 3]))
    model.hidden(torch.tensor([[1, 2, 3, 4]]), torch.tensor([1, 3]))
    assert seen == [(1, 2, 32)] * 2


def test_the_peak_of_a_step_has_no_term_of_tokens_times_vocabulary(monkeypatch):
    """What grows with the vocabulary (the head's gradient) is the same for 4 x the tokens.

    The loss's chunk of logits, 64 MiB on a CPU, would hide it: here it is 1 MiB.
    """
    monkeypatch.setattr(sizes, "CPU_CHUNK_BYTES", 1 << 20)

    def bytes_per_entry(scale: int) -> float:
        small, large = (backward_peak(make(num_hidden_layers=1, vocab_size=v), sequences(scale)) for v in (4096, 12288))
        return (large - small) / (12288 - 4096)

    few, many = bytes_per_entry(8), bytes_per_entry(32)
    rows = [len(collate_training(sequences(scale), 0, with_teacher=False).student.rows) for scale in (8, 32)]
    assert abs(many - few) < 0.01 * 4 * (rows[1] - rows[0]), (few, many, rows)


def test_liger_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    lm = make()
    assert not use_liger(lm, "auto")
    assert not use_liger(lm, "off")
    with pytest.raises(SgpoError, match="need a GPU"):
        use_liger(lm, "on")
