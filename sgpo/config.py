"""Every knob of a run, its default and its range, in one place. Loads without torch.

A run is one YAML file plus `--section.key value` on the command line. Unknown keys, values out of range and pairs that
cannot work together are refused with one sentence before anything is loaded.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from sgpo.utils.config_rules import GONE, check_pairs

Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """What every part of the settings is: frozen, without unknown keys, without infinite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    gone_keys: ClassVar[Mapping[str, str]] = GONE


class RunConfig(Section):
    """Name, folder and seed of the run, and how it resumes."""

    name: str = Field(default="run", pattern=r"^\w[\w.-]*$", description="name of the run, also its folder")
    output_dir: str = Field(default="runs", description="parent folder of the run folder")
    seed: int = Field(default=0, ge=0, description="decides data order and every sampled token")
    resume: Literal["auto", "never"] = Field(
        default="auto", description="auto: go on from the last good checkpoint; never: set an earlier run folder aside"
    )
    timeout_s: float = Field(default=1800, gt=0, description="limit of one collective or one stage between processes")

    @property
    def dir(self) -> Path:
        """The run folder."""
        return Path(self.output_dir) / self.name


class LoraConfig(Section):
    """Adapters in place of training all weights."""

    rank: int = Field(
        default=0, ge=0, description="0: all weights are trained; above: adapters of this rank (needs sgpo[lora])"
    )
    alpha: float = Field(default=32.0, gt=0, description="the update is scaled by alpha / rank")
    modules: tuple[str, ...] = Field(
        default=("all-linear",), min_length=1, description='names of the linear layers, or "all-linear" (not the head)'
    )
    dora: bool = Field(default=False, description="DoRA: the length of each row is learned apart from its direction")
    sync: Literal["auto", "adapters", "merged"] = Field(
        default="auto",
        description="what the rollout engine gets: adapters alone (after one whole sync) or merged weights; auto: "
        "adapters for LoRA on a GPU, else merged weights, with which a CPU samples faster",
    )


class ModelConfig(Section):
    """Which model, in which precision, and how its activations are kept."""

    path: str = Field(description='a Hugging Face folder, or "builtin" for the quickstart model')
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="of the weights; masters are always fp32"
    )
    attn_implementation: str = "sdpa"
    gradient_checkpointing: bool = Field(
        default=False, description="keep only the input of each layer, compute the rest again in backward"
    )
    activation_offload: bool = Field(default=False, description="these inputs wait for backward on the host")
    mlp_tile_tokens: int | None = Field(
        default=None, ge=1, description="tokens that an MLP takes at a time (long sequences); default: all"
    )
    liger: Literal["auto", "on", "off"] = Field(
        default="off", description="Liger's fused RMSNorm, RoPE and SwiGLU; auto: on a GPU where it is installed"
    )
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _pairs(self) -> ModelConfig:
        if self.activation_offload and not self.gradient_checkpointing:
            raise ValueError("activation_offload moves checkpoints; set gradient_checkpointing to true as well")
        return self


class DataConfig(Section):
    """Problems to train and evaluate on, and the prompt template."""

    train: str = Field(description='a JSONL file, "hf:NAME[:SPLIT]", a datasets folder, or "builtin"')
    eval: str | None = Field(default=None, description="held-out problems, same forms")
    train_limit: int | None = Field(default=None, ge=1, description="use only the first rows")
    eval_limit: int | None = Field(default=None, ge=1)
    template: str | None = Field(default=None, description="prompt template (YAML); default: the packaged one")
    strategy_source: Literal["field", "calculator_trace"] = Field(
        default="field",
        description="field: as in the data; calculator_trace: extracted from <<...>> marks of the solution",
    )
    max_prompt_tokens: int = Field(default=2048, ge=1, description="a longer prompt is refused at the start, by id")


class VllmConfig(Section):
    """Sizes of the vLLM sampler."""

    max_model_len: int | None = Field(
        default=None, ge=2, description="prompt and completion together; default: the longest that the run may need"
    )
    max_num_seqs: int = Field(default=256, ge=1, description="requests that decode at the same time")
    max_num_batched_tokens: int | None = Field(default=None, ge=1, description="tokens of one forward pass")
    kv_cache_mib: int | None = Field(
        default=None, ge=1, description="memory of the KV cache; default: by gpu_memory_utilization, on a CPU 512"
    )
    gpu_memory_utilization: float = Field(
        default=0.4, gt=0, le=1, description="share of the GPU for weights and KV cache; the trainer needs the rest"
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="consecutive ranks that share one engine")
    enforce_eager: bool = Field(default=False, description="true: no CUDA graphs (less memory, slower decoding)")
    sleep_level: Literal[0, 1, 2] | None = Field(
        default=None,
        description="while the trainer works: 0 keep all, 1 move the weights to the host, 2 drop them (they are synced "
        "at the next wake); default: 2 in the trainer's process on a GPU, else 0",
    )


class RolloutConfig(Section):
    """What is sampled, how, and by which sampler."""

    engine: Literal["auto", "vllm", "hf"] = Field(
        default="auto",
        validate_default=True,
        description="auto: vllm where it is installed, else hf (transformers' generate)",
    )
    placement: Literal["inprocess", "process"] = Field(
        default="inprocess", description="process: the engine runs in a process of its own, one per rank"
    )
    devices: list[int | str] | None = Field(
        default=None, description="placement process: CUDA_VISIBLE_DEVICES of the engine, one entry per local rank"
    )
    overlap: bool = Field(
        default=False,
        description="sample the next step while this one trains: one step off-policy; needs placement process and "
        "importance_cap",
    )
    importance_cap: float | None = Field(
        default=None, gt=0, description="weight policy tokens by min(pi_trainer / pi_sampler, cap); default: off"
    )
    importance_level: Literal["token", "sequence"] = "token"
    stall_s: float = Field(default=600.0, gt=0, description="an engine that does not move for so long is cut")
    sync_tolerance: float | None = Field(
        default=None,
        gt=0,
        description="mean |log-prob gap| in nats between engine and trainer on a fixed text that stops the run after a "
        "weight sync; default: 2e-4 in float32, 0.1 in bfloat16",
    )
    problems_per_step: int = Field(default=128, ge=1)
    n_auto: int = Field(default=8, ge=0, description="completions without the strategy (G1); 0 with method: sft")
    n_guided: int = Field(default=4, ge=0, description="completions with the strategy (G2)")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=16384, ge=1)
    max_batch_tokens: int = Field(
        default=65536, ge=1, description="hf engine: rows x (prompt + new tokens) of one batch"
    )
    vllm: VllmConfig = VllmConfig()

    @field_validator("engine")
    @classmethod
    def _installed(cls, engine: str) -> str:
        """What a run folder records is the engine that ran."""
        found = importlib.util.find_spec("vllm") is not None
        if engine == "vllm" and not found:
            raise ValueError("vllm is not installed; pip install 'sgpo[vllm]', or use hf")
        return ("vllm" if found else "hf") if engine == "auto" else engine

    @model_validator(mode="after")
    def _pairs(self) -> RolloutConfig:
        if self.overlap and (self.placement != "process" or self.importance_cap is None):
            raise ValueError("overlap needs placement: process (to sample meanwhile) and importance_cap (to correct)")
        if self.placement == "process" and self.vllm.tensor_parallel_size > 1:
            raise ValueError("placement: process runs one GPU per engine; set vllm.tensor_parallel_size to 1")
        if self.devices is not None and self.placement != "process":
            raise ValueError("devices is for placement: process; an engine in the trainer's process has its device")
        return self


class RewardConfig(Section):
    """What judges a completion, and the limits of one judgement."""

    kind: str = Field(
        default="math_verify", description='"math_verify", "exact", or a function as "package.module:function"'
    )
    require_box: bool = Field(
        default=True, description="false: where there is no box, Math-Verify looks for an answer in the text"
    )
    workers: int = Field(default=2, ge=1)
    timeout_s: float = Field(
        default=10.0, gt=0, description="a result that takes longer is killed, counted and worth 0"
    )
    memory_mib: int = Field(default=1024, ge=64, description="memory that one result may take")
    max_chars: int = Field(default=200_000, ge=1, description="longer completions are not parsed, counted and worth 0")


# What a method's paper sets; each is a default that the key itself overrides.
_METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "dapo": {"dual_clip": 10.0, "refill_rounds": 9, "overlong_share": 0.2},
    "luffy": {"normalize_std": False, "clip_low": None, "clip_high": None, "entropy_coef": 0.001},
    "hpt": {"normalize_std": False, "clip_low": None, "clip_high": None},
}
WITH_DEMONSTRATIONS = ("sft", "luffy", "hpt")


class AlgorithmConfig(Section):
    """The method and its loss; the defaults are the paper's."""

    method: Literal["sgpo", "grpo", "dapo", "luffy", "hpt", "sft"] = Field(
        default="sgpo", description="one file each in sgpo/algorithm; all but sgpo set rollout.n_guided to 0"
    )
    autonomous_grpo: bool = Field(default=True, description="false: distillation only")
    normalize_std: bool = Field(default=True, description="divide advantages by the standard deviation of the group")
    clip_low: float | None = Field(default=0.2, ge=0, lt=1, description="null: no clip on this side (luffy, hpt)")
    clip_high: float | None = Field(default=0.28, ge=0)
    dual_clip: float | None = Field(default=None, gt=1, description="bound of the loss for negative advantages")
    entropy_coef: float = Field(default=0.0, ge=0, description="entropy bonus on policy tokens; luffy: 0.001")
    refill_rounds: int = Field(
        default=0,
        ge=0,
        description="dynamic sampling: at most so many further batches of problems are sampled in a step, in place of "
        "those that all or none of the rollouts solve; dapo: 9",
    )
    overlong_share: Share = Field(
        default=0.0, description="dapo: over this last share of max_new_tokens the reward falls by 1; dapo: 0.2"
    )
    demo_shaping: float = Field(default=0.1, gt=0, description="luffy: gamma of p / (p + gamma) on demonstrations")
    demo_gate: int = Field(
        default=0, ge=0, description="hpt: a problem with at most so many correct rollouts learns its demonstration"
    )
    mini_batches: int = Field(default=1, ge=1, description="optimizer steps per batch of rollouts")
    distillation: Literal["forward_kl", "reverse_kl", "js", "sft"] | None = Field(
        default="forward_kl", description="of o+ from the guided context; sft: o+ is imitated; null (or none): off"
    )
    selection: Literal["sum", "mean", "all"] = Field(
        default="sum", description="o+: highest sum (Eq. 4) or mean of log-probs; all: every correct guided one (Eq. 2)"
    )
    over_limit: Literal["mask", "clamp", "scale"] = Field(
        default="mask",
        description="a token whose KL exceeds max_token_kl: dropped (Eq. 5), held at the limit, or scaled to it",
    )
    max_token_kl: float | None = Field(default=1.0, gt=0, description="delta; null: no limit")
    alpha: Literal["adaptive", "fixed", "group_advantage"] = "adaptive"
    alpha_0: float = Field(default=0.5, ge=0)
    alpha_gamma: float = Field(default=0.1, gt=0)
    alpha_max: float = Field(default=0.8, ge=0)
    alpha_fixed: float = Field(default=1.0, ge=0)

    @field_validator("distillation", mode="before")
    @classmethod
    def _none(cls, distillation: Any) -> Any:
        return None if distillation == "none" else distillation

    @field_validator("over_limit", mode="before")
    @classmethod
    def _limited(cls, over_limit: Any) -> Any:
        if over_limit == "off":
            raise ValueError("a loss without a limit is written max_token_kl: null now")
        return over_limit

    @model_validator(mode="before")
    @classmethod
    def _of_the_method(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        return {**_METHOD_DEFAULTS.get(str(raw.get("method")), {}), **raw}

    @model_validator(mode="after")
    def _pairs(self) -> AlgorithmConfig:
        if self.alpha_max < self.alpha_0:
            raise ValueError(f"alpha_max = {self.alpha_max} is below alpha_0 = {self.alpha_0}; raise it")
        if self.distillation is None and not self.autonomous_grpo:
            raise ValueError("distillation: null and autonomous_grpo: false leave no loss; switch one of them on")
        return self


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: float = Field(default=1e-6, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_ratio: Share = 0.0
    non_finite: Literal["stop", "skip"] = Field(default="stop", description="on NaN: end the run, or skip the step")


class WarmupOptimConfig(OptimConfig):
    """The same for the warm-up, with defaults of its own."""

    lr: float = Field(default=1e-5, gt=0)
    warmup_ratio: Share = 0.1


class EngineConfig(Section):
    """How the trainer splits states and sequences, and which loss kernels it takes."""

    zero_stage: Literal[0, 1, 2, 3] = 0
    optimizer_state: Literal["full", "cpu_offload", "8bit"] = Field(
        default="full",
        description="fp32 masters and Adam's moments: on the device; on the host and stepped there; on the device, "
        "moments in 8 bits (needs sgpo[8bit])",
    )
    offload_states_during_rollout: bool = Field(
        default=False, description="masters and moments wait on the host while the rollout engine is awake"
    )
    micro_batch_tokens: int = Field(
        default=16384, ge=1, description="tokens of one forward pass, padding included, of each process"
    )
    sequence_parallel_size: int = Field(
        default=1,
        ge=1,
        description="so many processes share every forward pass, each with an equal part of its tokens (Ulysses)",
    )
    packing: Literal["padded", "packed"] = Field(
        default="padded", description="packed: several sequences behind one another in one row, no padding"
    )
    loss_impl: Literal["auto", "triton", "triton-nologits", "torch"] = Field(default="auto", description="kernels")
    column_tolerance: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="0: exact; above: vocabulary columns whose gradient stays below this share of the row's weight are"
        " left out of backward (3.05e-5 is 2^-15; a bound of what is lost is logged as dropped_mass)",
    )

    @model_validator(mode="after")
    def _states(self) -> EngineConfig:
        if self.optimizer_state != "full" and self.zero_stage < 2:
            raise ValueError(f"optimizer_state: {self.optimizer_state} needs zero_stage 2 or 3")
        if self.offload_states_during_rollout and (self.zero_stage != 2 or self.optimizer_state == "cpu_offload"):
            raise ValueError("offload_states_during_rollout needs zero_stage 2 and states on the device")
        return self


class TrainConfig(Section):
    """When the run ends."""

    epochs: float = Field(default=10, gt=0)
    max_steps: int | None = Field(default=None, ge=1, description="stop after this many steps, whatever the epochs say")
    max_rollouts: int | None = Field(
        default=None, ge=1, description="sample no more completions than this: methods compared at an equal budget"
    )


class WarmupConfig(Section):
    """The SFT warm-up before training."""

    enabled: bool = Field(
        default=False, description="sgpo train: run the SFT warm-up first and start from its best model"
    )
    data: str | None = Field(default=None, description='problems with a `solution`, or "builtin"')
    limit: int | None = Field(default=None, ge=1)
    guided_share: Share = Field(
        default=0.0, description="share of the demonstrations whose prompt carries the guidance"
    )
    epochs: float = Field(default=10, gt=0)
    batch_size: int = Field(default=64, ge=1)
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    validate_every: int = Field(
        default=50, ge=1, description="steps between validations; the last step is always validated"
    )
    max_tokens: int = Field(default=16384, ge=1, description="longer demonstrations are refused at the start, by id")
    optim: WarmupOptimConfig = WarmupOptimConfig()


class EvalConfig(Section):
    """Held-out evaluation during a run, and benchmarks of `sgpo eval`."""

    every_steps: int | None = Field(
        default=None, ge=1, description="None: only before the first and after the last step"
    )
    samples: int = Field(default=4, ge=1, description="k of avg@k")
    guided: bool = Field(default=True, description="also measure with the guidance, before and after")
    temperature: float = Field(default=0.6, ge=0, description="0: greedy")
    top_p: float = Field(default=0.95, gt=0, le=1)
    max_new_tokens: int = Field(default=32768, ge=1)
    benchmarks: tuple[str, ...] = Field(
        default=(),
        description="sgpo eval: math500, amc23, aime24, olympiadbench, gsm8k with commas between, or NAME=FILE",
    )
    benchmark_dir: str | None = Field(default=None, description="folder of their JSONL files")
    benchmark_samples: int | None = Field(
        default=None, ge=1, description="k of avg@k; default: the paper's, 32 for amc23 and aime24, else 4"
    )
    benchmark_limit: int | None = Field(default=None, ge=1, description="use only the first rows of each")
    contamination: Literal["report", "refuse", "off"] = Field(
        default="report",
        description="benchmark problems that are in data.train or warmup.data: report also scores the rest alone",
    )
    contamination_overlap: float = Field(
        default=0.5, gt=0, le=1, description="share of a problem's word 13-grams in one training problem that counts"
    )

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _with_commas(cls, names: Any) -> Any:
        if isinstance(names, str):
            return tuple(name.strip() for name in names.split(",") if name.strip())
        return () if names is None else names


class CheckpointConfig(Section):
    """How often a run is saved, and what is kept."""

    every_steps: int = Field(default=20, ge=1)
    keep_last: int = Field(default=2, ge=1)
    keep_best: bool = Field(default=True, description="export the model of the best held-out accuracy to best/")


class LogConfig(Section):
    """Where metrics go, and how many samples are kept."""

    tensorboard: bool = False
    wandb_project: str | None = None
    profile: bool = Field(default=False, description="memory per stage and MFU of every step (sgpo train --profile)")
    peak_tflops: float | None = Field(
        default=None, gt=0, description="of the device, for the MFU; default: known cards, a CPU is measured"
    )
    rollouts_per_step: int = Field(default=4, ge=0, description="samples of each step kept in rollouts.jsonl")


class RatesConfig(Section):
    """Measured speeds, for the plan's times."""

    matmul_tflops: float | None = Field(default=None, gt=0, description="TFLOP/s of training, per GPU")
    decode_tokens_per_s: float | None = Field(default=None, gt=0, description="sampled tokens per second, per GPU")
    host_gib_per_s: float | None = Field(default=None, gt=0, description="between GPU and host, one direction")


class PlanConfig(Section):
    """The machine that `sgpo plan` plans for, and what a plan that does not fit does."""

    on_misfit: Literal["refuse", "warn", "off"] = Field(
        default="refuse", description="sgpo train, where the plan does not fit: stop with exit code 2, say so, no plan"
    )
    card: Literal["24gb", "80gb", "141gb"] | None = Field(default=None, description="plan for this card")
    gpu_memory_gib: float | None = Field(default=None, gt=0, description="plan for a GPU of this size")
    host_memory_gib: float | None = Field(default=None, gt=0, description="default: what this machine has available")
    gpus: int | None = Field(default=None, ge=1, description="processes of the run; default: WORLD_SIZE, else 1")
    gpus_per_host: int = Field(default=8, ge=1, description="processes that share the memory of one host")
    architecture: str | None = Field(
        default=None, description='"qwen2.5-7b", "qwen2.5-1.5b" or a config.json, where model.path is not there yet'
    )
    worst_case_step: bool | None = Field(
        default=None,
        description="sgpo train, before its first step: the longest micro-batch, without effect; default: on a GPU",
    )
    rates: RatesConfig = RatesConfig()


class Config(Section):
    """All settings of a run."""

    run: RunConfig = RunConfig()
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    reward: RewardConfig = RewardConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optim: OptimConfig = OptimConfig()
    engine: EngineConfig = EngineConfig()
    train: TrainConfig = TrainConfig()
    warmup: WarmupConfig = WarmupConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    plan: PlanConfig = PlanConfig()

    @model_validator(mode="after")
    def _pairs(self) -> Config:
        check_pairs(self)
        return self

    def syncs_adapters(self, *, cuda: bool) -> bool:
        """Whether the trainer's rollout engine has adapters of its own, so that a sync sends these alone."""
        lora = self.model.lora
        return lora.rank > 0 and (lora.sync == "adapters" or (lora.sync == "auto" and cuda and not lora.dora))

    def sleep_level(self, *, cuda: bool) -> int:
        """rollout.vllm.sleep_level, and where it is null: 0 without a GPU or in a process of its own, else 2, which
        drops the weights that the next sync brings anyway. Where it would bring adapters alone: 1, a copy on the host.
        """
        if (chosen := self.rollout.vllm.sleep_level) is not None:
            return chosen
        if not cuda or self.rollout.placement != "inprocess":
            return 0
        return 1 if self.syncs_adapters(cuda=cuda) else 2
