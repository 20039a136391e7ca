"""Tiny random models of many families, in every way that the trainer runs them: right to 1e-4 nats, or refused.

The truth is each model's own logits in float64, one sequence at a time.
"""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sgpo_kernels.testing import cpu_peak
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from sgpo.algorithm.loss import LabelLogprobs, LossSettings, SgpoLoss
from sgpo.engine.batching import Contexts, collate, collate_training
from sgpo.model.lora import add_adapters
from sgpo.model.policy import PolicyModel
from sgpo.types import SgpoError, TrainSequence

VOCAB = 99
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GPT2 = {"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
BERT = {k: v for k, v in SHAPE.items() if k not in ("num_key_value_heads", "head_dim")} | {"is_decoder": True}
CAPPED = {**SHAPE, "sliding_window": 64}
PROMPTS = [tuple(range(5, 12)), tuple(range(20, 25)), tuple(range(40, 49))]
COMPLETIONS = [tuple(range(50, 57)), (60, 61), tuple(range(70, 76))]
WAYS = {
    "padded": {},
    "packed": {"packed": True},
    "checkpointed": {"gradient_checkpointing": True},
    "tiled": {"mlp_tile_tokens": 5},
    "adapters": {},
}
WINDOW, TILES = "needs full causal attention in every layer", "no dense MLP to tile"
# A family, its settings, how its products become logits, and the ways that are refused, with words of the sentence.
FAMILIES = {
    "llama": ("llama", SHAPE, (1, None), {}),
    "llama, tied": ("llama", {**SHAPE, "tie_word_embeddings": True}, (1, None), {}),
    "qwen3": ("qwen3", SHAPE, (1, None), {}),
    "qwen3_moe": ("qwen3_moe", {**SHAPE, **EXPERTS}, (1, None), {"tiled": TILES}),
    "mixtral": ("mixtral", {**SHAPE, **EXPERTS}, (1, None), {"tiled": TILES}),
    "gemma2, cap 30": ("gemma2", CAPPED, (1, 30.0), {"packed": WINDOW}),
    "gemma2, cap 0.5": ("gemma2", {**CAPPED, "final_logit_softcapping": 0.5}, (1, 0.5), {"packed": WINDOW}),
    "gemma2, no cap": ("gemma2", {**CAPPED, "final_logit_softcapping": None}, (1, None), {"packed": WINDOW}),
    "recurrent_gemma": (
        "recurrent_gemma", {**CAPPED, "lru_width": 64, "attention_window_size": 64, "num_hidden_layers": 3}, (1, 30.0),
        {"packed": WINDOW, "tiled": TILES},
    ),
    "cohere": ("cohere", SHAPE, (0.0625, None), {}),
    "granite": ("granite", {**SHAPE, "logits_scaling": 8.0}, (1 / 8, None), {}),
    "hyperclovax": ("hyperclovax", {**SHAPE, "logits_scaling": 0.125}, (0.125, None), {}),
    "minicpm3": (
        "minicpm3", {**SHAPE, "dim_model_base": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                     "qk_rope_head_dim": 8, "v_head_dim": 16}, (0.25, None), {},
    ),
    "llama4_text": (
        "llama4_text", {**SHAPE, "num_local_experts": 2, "intermediate_size_mlp": 96, "attention_chunk_size": 64},
        (1, None), {"packed": WINDOW, "tiled": TILES},
    ),
    "gpt2": ("gpt2", GPT2, (1, None), {"tiled": TILES}),
    "opt": ("opt", {**BERT, "word_embed_proj_dim": 32, "ffn_dim": 96, "dropout": 0.1}, (1, None), {"tiled": TILES}),
    "phi": ("phi", BERT, (1, None), {"tiled": TILES}),
    "bert-generation, whose last norm is in the last layer": ("bert-generation", BERT, (1, None), {"tiled": TILES}),
    "bart, likewise": (
        "bart", {**BERT, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96,
                 "dropout": 0.1, "attention_dropout": 0.1}, (1, None),
        {"packed": "an attention of its own", "tiled": TILES},
    ),
    "xlm, which multiplies behind its last norm": (
        "xlm", {**BERT, "emb_dim": 64, "n_layers": 2, "n_heads": 4, "causal": True}, (1, None),
        {"packed": "an attention of its own", "checkpointed": "no layers that support it", "tiled": TILES},
    ),
    "afmoe, with shared experts": (
        "afmoe", {**CAPPED, **EXPERTS, "num_shared_experts": 1, "layer_types": ["full_attention"] * 2}, (1, None),
        {"tiled": TILES},
    ),
    "falcon, of linear layers of its own": (
        "falcon", {**BERT, "ffn_hidden_size": 96}, (1, None), {"packed": "an attention of its own", "tiled": TILES},
    ),
    "doge": ("doge", SHAPE, (1, None), {"packed": "DogeAttention has attention_mask of its own"}),
    "bert": ("bert", BERT, None, dict.fromkeys(WAYS, "not its last hidden states times its output matrix")),
    "roberta": ("roberta", BERT, None, dict.fromkeys(WAYS, "not its last hidden states times its output matrix")),
}  # fmt: skip


def randomised(lm, seed: int = 0):
    """Every weight, norm and bias random: what starts at 0 or 1 would hide a mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(noise * (0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5) + norm)
    return lm.eval()


def family(name: str):
    kind, settings, *_ = FAMILIES[name]
    return randomised(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)))


@torch.no_grad()
def truth(lm) -> torch.Tensor:
    """Log-probs of the completions, from the model's own float64 logits."""
    exact = copy.deepcopy(lm).double()
    exact.set_experts_implementation("eager")
    found = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = exact(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits
        logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def ours(model: PolicyModel) -> torch.Tensor:
    return model(LabelLogprobs(), Contexts(collate(PROMPTS, COMPLETIONS, 0, packed=model.packed)))


def policy_of(lm, way: str) -> PolicyModel:
    if way == "adapters":
        add_adapters(lm, rank=2, alpha=4, modules=["all-linear"], dora=False, seed=0)
    return PolicyModel(lm, **WAYS[way])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_or_refused_in_every_way(name):
    lm = family(name)
    expected, (_, _, logits, refused) = truth(lm), FAMILIES[name]
    for way in WAYS:
        if way in refused:
            with pytest.raises(SgpoError) as error:
                policy_of(copy.deepcopy(lm), way)
            sentence = str(error.value)
            assert refused[way] in sentence, way
            assert "\n" not in sentence
            continue
        model = policy_of(copy.deepcopy(lm), way)
        assert (ours(model) - expected).abs().max() < 1e-4, way
        if way == "checkpointed":  # what is computed again is what was computed
            model(LabelLogprobs(), Contexts(collate(PROMPTS, COMPLETIONS, 0))).sum().backward()
        scale, cap = logits
        assert model.head.logits.scale == pytest.approx(scale, rel=1e-5)
        assert model.head.logits.softcap == (None if cap is None else pytest.approx(cap, rel=1e-6))


@pytest.mark.parametrize("name", ["gemma2, cap 0.5", "granite", "minicpm3", "opt", "mixtral", "llama, tied"])
def test_the_gradient_of_the_loss_is_that_of_the_logits(name):
    """Of policy, KL and temperature together, through scale and cap, checkpointed; against float64 autograd."""
    lm = family(name)
    made = [
        TrainSequence(PROMPTS[0], COMPLETIONS[0], advantage=0.7, policy_weight=0.1),
        TrainSequence(PROMPTS[1], COMPLETIONS[2], distill_weight=0.2, teacher_prompt_ids=PROMPTS[2]),
    ]
    model = PolicyModel(copy.deepcopy(lm), gradient_checkpointing=True)
    settings = LossSettings(clip_low=0.2, clip_high=0.28, max_token_kl=None, temperature=0.7, entropy_coef=0.03)
    loss, _ = model(SgpoLoss(settings), collate_training(made, 0, with_teacher=True))
    loss.backward()

    exact = copy.deepcopy(lm).double()
    exact.set_experts_implementation("eager")

    def logprobs(prompt, completion):
        logits = exact(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        return (logits[len(prompt) - 1 : -1] / 0.7).log_softmax(-1)

    policy, student = logprobs(PROMPTS[0], COMPLETIONS[0]), logprobs(PROMPTS[1], COMPLETIONS[2])
    with torch.no_grad():
        teacher = logprobs(PROMPTS[2], COMPLETIONS[2])
    taken = policy.gather(-1, torch.tensor(COMPLETIONS[0])[:, None])
    entropy = -(policy.exp() * policy).sum()
    wanted = -0.1 * (0.7 * (taken - taken.detach()).exp().sum() + 0.03 * entropy)
    wanted = wanted + 0.2 * (teacher.exp() * (teacher - student)).sum()
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4, abs=1e-5)
    found = dict(model.lm.named_parameters())
    total = torch.cat([p.grad.flatten() for p in exact.parameters() if p.grad is not None]).norm()
    for label, parameter in exact.named_parameters():
        if parameter.grad is not None:
            assert (found[label].grad - parameter.grad).norm() < 1e-4 * total, label


# ---- models that nobody has built yet ------------------------------------------------------------------------------


class Changed(LlamaForCausalLM):
    """A Llama whose logits go through `bend` (and whose forward pass may drop or look at its neighbours)."""

    bend = staticmethod(lambda logits: logits)
    noise = 0.0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = nn.functional.dropout(self.bend(output.logits), self.noise)
        return output


def changed(bend=None, **attributes) -> Changed:
    lm = randomised(Changed(LlamaConfig(**SHAPE)))
    if bend is not None:
        lm.bend = bend
    for name, value in attributes.items():
        setattr(lm, name, value)
    return lm


def close(value):
    def bend(logits):
        return torch.cat([logits[..., :90], torch.full_like(logits[..., 90:], value)], -1)

    return bend


BENDS = {
    "a scale": lambda z: z * 3.7,
    "a division": lambda z: z / 24,
    "a cap": lambda z: 5 * torch.tanh(z / 5),
    "a scale under a cap": lambda z: 2 * torch.tanh(0.3 * z / 2),
    "a scale above a cap": lambda z: 0.3 * 2 * torch.tanh(z / 2),
    "a cut vocabulary": lambda z: z[..., :90],
    "a cut vocabulary under a cap": lambda z: 3 * torch.tanh(z[..., :90] / 3),
    "closed columns": close(-torch.inf),
    "columns closed by a number": close(torch.finfo(torch.float32).min),
    "a shift of every row": lambda z: z - z.logsumexp(-1, keepdim=True),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bend", [name for name in BENDS if "shift" not in name])
def test_what_the_losses_can_do_is_measured(bend, packed):
    lm = changed(BENDS[bend])
    expected = truth(lm)
    assert (ours(PolicyModel(lm, packed=packed)) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("bend", "words"),
    [
        (lambda z: z**3, "nor a scale or soft-cap of that"),
        (lambda z: -z, "nor a scale or soft-cap of that"),
        (lambda z: z.clamp(-1, 1), "nor a scale or soft-cap of that"),
        (lambda z: z.roll(1, -1), "nor a scale or soft-cap of that"),
        (lambda z: z + torch.linspace(0, 1, z.shape[-1]), "nor a scale or soft-cap of that"),
        (lambda z: torch.cat([z, z], -1), "198 logits, but an output matrix of 99 rows"),
        (lambda z: z * torch.nan, "for random tokens are not finite"),
        (lambda z: z.no_such_thing, "code fails with AttributeError"),
    ],
)
def test_what_they_cannot_do_is_refused(bend, words):
    with pytest.raises(SgpoError, match=r"llama.*" + words):
        PolicyModel(changed(bend))


def test_dropout_that_stays_on_is_refused_by_its_name():
    with pytest.raises(SgpoError, match=r"two forward passes of llama.*dropout"):
        PolicyModel(changed(noise=0.1))
    lm = family("gpt2").train()
    with pytest.raises(SgpoError, match="dropout"):
        PolicyModel(lm)


def test_padding_that_changes_other_tokens_is_refused():
    """Attention without a causal mask, for one: what stands behind a sequence must not reach it."""
    lm = changed()
    lm.model.embed_tokens.register_forward_hook(lambda _, given, output: output + 0.1 * given[0].shape[1])
    with pytest.raises(SgpoError, match=r"engine\.packing: padded changes what llama computes.*nats"):
        PolicyModel(lm)


@pytest.mark.parametrize(
    ("knob", "options"),
    [
        ("model.gradient_checkpointing", {"gradient_checkpointing": True}),
        ("model.mlp_tile_tokens", {"mlp_tile_tokens": 5}),
    ],
)
def test_a_change_that_changes_the_model_is_refused_by_the_name_of_its_knob(knob, options, monkeypatch):
    import sgpo.model.policy as policy

    lm = changed()
    for function in ("checkpoint_layers", "tile_mlps"):
        monkeypatch.setattr(policy, function, lambda lm, *_, **__: lm.model.norm.weight.data.mul_(1.01))
    with pytest.raises(SgpoError, match=rf"{knob} changes what llama computes: .* up to [\d.]+ nats .*(set it|leave)"):
        PolicyModel(lm, **options)


@pytest.mark.parametrize("name", ["s_aux", "softcap", "position_bias", "attention_mask"])
def test_packed_attention_drops_nothing_that_it_is_given(name):
    from sgpo.model.activations import _attention_per_sequence

    states = torch.randn(1, 4, 10, 16)
    module: Any = SimpleNamespace(training=False, num_key_value_groups=1, is_causal=True)

    def attend(**given):
        return _attention_per_sequence(
            module, states, states, states, **{"attention_mask": None, "sequence_lengths": (4, 6), **given}
        )[0]

    plain = attend(dropout=0.0, scaling=0.25, position_ids=torch.arange(10), is_causal=True, sliding_window=6)
    assert plain.shape == (1, 10, 4, 16)
    with pytest.raises(SgpoError, match=f"{name} of its own; set engine.packing to padded"):
        attend(**{name: torch.ones(4)})
    with pytest.raises(SgpoError, match="sliding_window of its own"):
        attend(sliding_window=5)


def test_a_norm_that_is_called_twice_is_not_where_rows_are_picked():
    class Twice(LlamaModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            kwargs["inputs_embeds"] = self.norm(self.embed_tokens(kwargs.pop("input_ids")))
            return super().forward(*args, **kwargs)

    lm = family("llama")
    lm.model.__class__ = Twice
    expected = truth(lm)
    assert (ours(PolicyModel(lm)) - expected).abs().max() < 1e-4


def test_a_bfloat16_model_is_proven_in_float32_and_left_as_it_was():
    """Its own rounding hides nothing: what a family does is found as in float32."""
    for name in ("llama", "gemma2, cap 30", "qwen3_moe"):
        lm = family(name).bfloat16()
        before = {key: value.clone() for key, value in lm.state_dict().items()}
        model = PolicyModel(lm, gradient_checkpointing=True)
        assert all(torch.equal(before[key], value) for key, value in lm.state_dict().items())
        assert {parameter.dtype for parameter in lm.parameters()} == {torch.bfloat16}
        assert model.head.logits.softcap == (30.0 if "cap" in name else None)
    lm = changed().bfloat16()
    layer: Any = lm.model.layers[0]
    layer.self_attn.forward = _with_a_mask(layer.self_attn.forward)
    with pytest.raises(SgpoError, match="attention_mask of its own"):
        PolicyModel(lm, packed=True)


def _with_a_mask(forward):
    def attend(hidden_states, **kwargs):
        return forward(hidden_states, **{**kwargs, "attention_mask": torch.zeros(1, 1, *[hidden_states.shape[1]] * 2)})

    return attend


def test_the_proof_makes_no_second_copy_of_a_model():
    shape = {**SHAPE, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 12, "head_dim": 64}
    lm = randomised(LlamaForCausalLM(LlamaConfig(**shape))).bfloat16()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in lm.parameters())
    assert cpu_peak(lambda: PolicyModel(lm, gradient_checkpointing=True)).peak_bytes < weights / 2
