"""The scan of model families: it sees what is wrong, says what is refused, and its page is made from its rows."""

import json
from pathlib import Path

import pytest
import torch
from processes import launch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks import families, families_page, run_tables
from benchmarks.family_checks import Outcome, attempt, judged, make_sequences, measured, plain_model, truth_of
from benchmarks.tiny_models import save_tiny, tiny_config
from sgpo.model.loading import load_causal_lm
from sgpo.model.policy import PolicyModel
from sgpo.types import SgpoError

ROOT = Path(__file__).resolve().parents[2]
MODES = families_page.MODES


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Fused experts, a soft-cap and windows, a transform before the head, no attention at all."""
    out = tmp_path_factory.mktemp("families") / "rows.jsonl"
    launch(["-m", "benchmarks.families", "--only", "mixtral,gemma2,bert,mamba,fuyu_no_such", "--out", str(out)])
    return {row["family"]: row for row in map(json.loads, out.read_text().splitlines())}


def statuses(row):
    return {mode: row[mode]["status"] for mode in MODES if mode in row}


@pytest.mark.parametrize(
    ("family", "refused"),
    [("mixtral", set()), ("gemma2", {"packed", "packed, checkpointed"}), ("mamba", {"packed", "packed, checkpointed"})],
)
def test_families_are_right_where_they_are_not_refused(rows, family, refused):
    found = statuses(rows[family])
    assert {mode for mode, status in found.items() if status == "refused"} == refused
    assert set(found.values()) <= {"right", "refused"}
    assert set(found) == set(MODES)
    for mode in set(MODES) - refused - {"bfloat16"}:
        assert rows[family][mode]["logprob_error"] <= 1e-4
    assert 0 < rows[family]["padded"]["gradient_error"] <= 1e-3


def test_a_family_that_cannot_be_trained_is_one_sentence_with_its_name(rows):
    assert statuses(rows["bert"]) == {"padded": "refused", "packed": "refused"}
    assert "bert" in rows["bert"]["padded"]["message"]
    assert "\n" not in rows["bert"]["padded"]["message"]


def test_what_cannot_be_built_is_said_and_says_where_it_comes_from(rows):
    assert rows["fuyu_no_such"]["not_run"].startswith("building: KeyError")
    assert rows["mixtral"]["versions"]["transformers"]
    assert {"commit", "command", "attention", "plain_error"} <= rows["mixtral"].keys()


# ---- deliberately wrong families -----------------------------------------------------------------------------------


def wrong_family(name, bend):
    """A Qwen3 whose forward pass is bent, known to transformers under a name of its own."""
    config = type(f"{name}Config", (Qwen3Config,), {"model_type": name})

    class Bent(Qwen3ForCausalLM):
        config_class = config

        def forward(self, *arguments, **options):
            output = super().forward(*arguments, **options)
            output.logits = bend(output.logits)
            return output

    AutoConfig.register(name, config, exist_ok=True)
    AutoModelForCausalLM.register(config, Bent, exist_ok=True)
    return config


def save_bent(name, bend, folder):
    config = wrong_family(name, bend)
    save_tiny("qwen3", folder)
    settings = {**json.loads((folder / "config.json").read_text()), "model_type": name, "architectures": ["Bent"]}
    (folder / "config.json").write_text(json.dumps(settings))
    assert config.model_type == name


def shifted(logits):
    """Every position also sees the next one."""
    return logits + 0.3 * logits.roll(-1, 1)


def added(logits):
    """Every position sees the sum of all before it, those of other packed sequences too."""
    return logits + 0.1 * logits.cumsum(1)


BENDS = {
    "qwen3_scaled": lambda logits: 1.5 * logits,
    "qwen3_capped": lambda logits: 5 * torch.tanh(logits / 5),
    "qwen3_shifted": shifted,
    "qwen3_added": added,
    "qwen3_dropping": lambda logits: torch.nn.functional.dropout(logits, 0.2),
}


class Trusting:
    """In place of the proof at load: takes everybody's word."""

    def __init__(self, lm):
        self.ordinary_ids = torch.arange(5, 95)

    def measure_logits(self, model):
        pass

    def check(self, model, knob, instead):
        pass


def outcome(folder, truth, **options):
    sequences = make_sequences()

    def check():
        return judged(measured(PolicyModel(load_causal_lm(folder, dtype="float32"), **options), sequences), truth)

    return attempt(check)


@pytest.mark.parametrize("name", BENDS)
def test_the_scan_sees_a_family_that_is_wrong(name, tmp_path, monkeypatch):
    save_bent(name, BENDS[name], tmp_path)
    truth = truth_of(plain_model(tmp_path), make_sequences())
    # With the proof: supported and right, or refused by name. Without: the scan itself must find it.
    proven = outcome(tmp_path, truth)
    assert proven.status == ("right" if name in ("qwen3_scaled", "qwen3_capped") else "refused"), proven
    assert proven.status == "right" or name in proven.message
    monkeypatch.setattr("sgpo.model.policy.Proof", Trusting)
    found = outcome(tmp_path, truth)
    assert found.status == "wrong"
    assert found.logprob_error is not None
    assert found.logprob_error > 1e-3


def test_the_scan_sees_attention_that_ignores_packing(tmp_path, monkeypatch):
    save_tiny("qwen3", tmp_path)
    truth = truth_of(plain_model(tmp_path), make_sequences())
    assert outcome(tmp_path, truth, packed=True).status == "right"
    monkeypatch.setattr("sgpo.model.policy.Proof", Trusting)
    monkeypatch.setattr("sgpo.model.policy.pack_attention", lambda lm: None)
    monkeypatch.setattr("sgpo.model.policy.packed_inputs", lambda lm, lengths, device: {})
    assert outcome(tmp_path, truth, packed=True).status == "wrong"


def test_a_gradient_that_is_lost_or_not_finite_is_wrong():
    logprobs, gradient = torch.zeros(3), {"a": torch.ones(4), "b": torch.full((2,), 1e-3)}
    truth = (logprobs, gradient)
    assert judged(truth, truth) == Outcome("right", "", 0.0, 0.0)
    assert judged((logprobs, {"a": gradient["a"]}), truth).message == "the gradient of b differs by 0.71 of its size"
    assert judged((logprobs, gradient | {"a": torch.full((4,), torch.nan)}), truth).status == "wrong"
    assert judged((logprobs + torch.nan, gradient), truth).status == "wrong"


def test_a_refusal_and_a_traceback_are_told_apart():
    def refuse():
        raise SgpoError("no")

    assert attempt(refuse) == Outcome("refused", "no")
    assert attempt(lambda: {}["x"]).status == "traceback"


# ---- the committed page --------------------------------------------------------------------------------------------


def test_the_page_is_made_from_the_committed_rows():
    page = families_page.page(run_tables.load("families"))
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == page


def test_every_family_has_a_row_and_none_is_wrong():
    committed = run_tables.load("families")
    assert [row["family"] for row in committed if families_page.outcome_of(row) == "wrong"] == []
    from transformers import __version__

    if {row["versions"]["transformers"] for row in committed} == {__version__}:
        assert {row["family"] for row in committed} == set(families.all_families())


def test_a_tiny_configuration_keeps_a_layer_of_each_kind_and_nothing_neutral():
    assert tiny_config("gemma3_text").layer_types == ["sliding_attention", "full_attention"]
    granite, bert = tiny_config("granite"), tiny_config("bert")
    assert granite.logits_scaling != 1
    assert bert.is_decoder
    assert tiny_config("mistral").sliding_window < min(p + c for p, c in ((5, 9), (11, 6), (3, 14)))
