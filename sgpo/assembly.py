"""Binds a checked config to real components. What can be wrong with the input is found here, before hours."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from sgpo.algorithm.objective import imitation_objective
from sgpo.config import WITH_DEMONSTRATIONS, Config, OptimConfig, checked, without_gone
from sgpo.data import builtin
from sgpo.data.packing import MicroBatch
from sgpo.data.problems import check_disjoint, load_problems
from sgpo.data.prompts import PromptBuilder, PromptTemplate, eos_token_ids
from sgpo.engine import ranks
from sgpo.engine.adapters import add_adapters
from sgpo.engine.selftest import check_gradients
from sgpo.engine.zero import ZeroEngine
from sgpo.methods.dapo import dapo_sequences
from sgpo.methods.hpt import hpt_sequences
from sgpo.methods.luffy import luffy_sequences
from sgpo.methods.method import Method
from sgpo.methods.sft import sft_step
from sgpo.methods.sgpo import SgpoSettings, sgpo_sequences
from sgpo.models import PolicyModel, eos_ids_of_folder, load_causal_lm, load_tokenizer
from sgpo.provenance import environment
from sgpo.rewards.pool import RewardPool
from sgpo.schema import Problem, PromptPair, RolloutEngine, SgpoError, TrainSequence
from sgpo.seeds import seed_of
from sgpo.sequence_parallel import SequenceParallel, check_size
from sgpo.steps import Objective, objective_with
from sgpo.strategies.calculator import attach_strategies
from sgpo.synced import SyncedRollouts

BUILTIN = "builtin"
_BUILTIN_COUNTS = {"train": 4096, "eval": 256}
_PROBE_TOKENS = 64
_SYNC_TOLERANCE = {"float32": 2e-4, "bfloat16": 0.1}
# Sections that may change between a checkpoint and its resumption without changing what is learnt.
_FREE_SECTIONS = ("run", "log", "checkpoint", "plan")


@dataclasses.dataclass(frozen=True, slots=True)
class TaskData:
    """Problems with both of their prompts, in the same order; a demonstration's ids where the method uses them."""

    problems: list[Problem]
    prompts: list[PromptPair]
    demo_ids: list[tuple[int, ...]] | None = None


def prepare_run_folder(config: Config) -> Path:
    """Creates or re-enters the run folder, writes the resolved config and where the run comes from.

    Raises SgpoError where the folder holds a run with other settings. Call on rank 0 only.
    """
    folder = config.run.dir
    resolved = config.model_dump(mode="json")
    written = folder / "config.yaml"
    if written.exists() and config.run.resume == "never":
        spare = next(p for n in range(1, 10_000) if not (p := folder.with_name(f"{folder.name}.old-{n}")).exists())
        folder.rename(spare)
        print(f"{folder} is set aside as {spare}")
    if written.exists() and (folder / "metrics.jsonl").exists():  # a start that was refused binds nobody
        _check_same(yaml.safe_load(written.read_text(encoding="utf-8")), resolved, written)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        (folder / "environment.json").write_text(json.dumps(environment(), indent=1), encoding="utf-8")
    except OSError as error:
        raise SgpoError(f"run folder {folder} cannot be written: {error.strerror}; set run.output_dir") from error
    return folder


def resolve_model(config: Config) -> Path:
    """The folder of the starting model; makes the built-in one on the spot. Call on rank 0 first."""
    if config.model.path != BUILTIN:
        return Path(config.model.path)
    folder = config.run.dir / "builtin-model"
    if not (folder / "config.json").exists():
        builtin.save_builtin(folder, seed=config.run.seed)
    return folder


def load_task(config: Config, tokenizer: Any, *, split: str) -> TaskData:
    """Problems of `split` ("train" or "eval") with checked prompts."""
    source, limit = (
        (config.data.train, config.data.train_limit)
        if split == "train"
        else (config.data.eval or "", config.data.eval_limit)
    )
    problems = _load(config, source, limit, split)
    needs_guidance = split == "train" and config.rollout.n_guided > 0
    if needs_guidance and (bare := [p.id for p in problems if not p.has_guidance]):
        raise SgpoError(
            f"{source}: {len(bare)} of {len(problems)} problems have neither a strategy nor guidance turns "
            f"(first: {', '.join(bare[:3])}); add them, set data.strategy_source, or set rollout.n_guided to 0"
        )
    prompts = prompt_builder(config, tokenizer).check_all(problems)
    wanted = split == "train" and config.algorithm.method in WITH_DEMONSTRATIONS
    return TaskData(problems, prompts, _demonstrations(config, source, problems, tokenizer) if wanted else None)


def _demonstrations(config: Config, source: str, problems: list[Problem], tokenizer: Any) -> list[tuple[int, ...]]:
    """The problems' own solutions, each within the length of a rollout."""
    method, limit = config.algorithm.method, config.rollout.max_new_tokens
    if lacking := [p.id for p in problems if not p.solution]:
        raise SgpoError(
            f"{source}: method: {method} learns from solutions, which {len(lacking)} of {len(problems)} problems lack "
            f"(first: {', '.join(lacking[:3])}); add the field `solution`, or remove them"
        )
    eos = eos_token_ids(tokenizer, None)[0]
    demos = [(*tokenizer.encode(p.solution, add_special_tokens=False), eos) for p in problems]
    if long := [p.id for p, ids in zip(problems, demos, strict=True) if len(ids) > limit]:
        raise SgpoError(
            f"{source}: {len(long)} solutions have more tokens than rollout.max_new_tokens = {limit} "
            f"(first: {', '.join(long[:3])}); raise it, or remove them"
        )
    return demos


def check_data(config: Config, model_folder: Path, train: TaskData, evaluation: TaskData | None) -> None:
    """What only the data as a whole can tell: enough problems for a step, lengths, no overlap with the evaluation."""
    size = config.engine.sequence_parallel_size
    check_size(size, processes=ranks.world_size(), model=_model_config(model_folder))
    if len(train.problems) < config.rollout.problems_per_step:
        raise SgpoError(
            f"{config.data.train} has {len(train.problems)} problems, fewer than "
            f"rollout.problems_per_step = {config.rollout.problems_per_step}; lower it or add problems"
        )
    share = config.algorithm.mini_batches * ranks.world_size()
    if config.rollout.problems_per_step % share:
        raise SgpoError(
            f"rollout.problems_per_step = {config.rollout.problems_per_step} must be a multiple of "
            f"algorithm.mini_batches x processes = {share}"
        )
    prompt = max(len(ids) for pair in train.prompts for ids in (pair.plain, pair.guided or ()))
    longest = prompt + config.rollout.max_new_tokens
    sequence = f"a sequence may have {longest} tokens (prompt {prompt} + rollout.max_new_tokens)"
    if longest > (budget := config.engine.micro_batch_tokens * size):
        of = "engine.micro_batch_tokens" + (" x engine.sequence_parallel_size" if size > 1 else "")
        raise SgpoError(f"{sequence}, more than {of} = {budget}; raise it or lower the other")
    positions = positions_of(model_folder)
    if positions is not None and longest > positions:
        raise SgpoError(f"{sequence}, more than {positions}, the positions of {model_folder}; lower max_new_tokens")
    if evaluation is not None:
        check_disjoint(train.problems, evaluation.problems)


def positions_of(model_folder: Path) -> int | None:
    """Longest sequence that the model was made for."""
    return _model_config(model_folder).get("max_position_embeddings")


def _model_config(model_folder: Path) -> dict[str, Any]:
    return json.loads((model_folder / "config.json").read_text(encoding="utf-8"))


def check_packages(config: Config) -> None:
    """Optional packages that the config asks for."""
    wanted = {"tensorboard": config.log.tensorboard, "wandb": config.log.wandb_project is not None}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise SgpoError(f"the log section asks for {package}, which is not installed: pip install {package}")


def prompt_builder(config: Config, tokenizer: Any) -> PromptBuilder:
    packaged = Path(builtin.__file__).parent / "templates" / "builtin.yaml"
    template = config.data.template or (str(packaged) if config.data.train == BUILTIN else None)
    return PromptBuilder(tokenizer, PromptTemplate.load(template), max_prompt_tokens=config.data.max_prompt_tokens)


def load_demonstrations(config: Config, tokenizer: Any, eos_id: int) -> list[TrainSequence]:
    """The warm-up's demonstrations as sequences whose completion ends with EOS; a seeded share of them is guided."""
    source = config.warmup.data or ""
    builder = prompt_builder(config, tokenizer)
    if source == BUILTIN:
        demos = builtin.make_demonstrations(seed=config.run.seed, count=config.warmup.limit or 4096)
        rows = [(demo.problem, demo.guided, demo.completion) for demo in demos]
    else:
        problems = _load(config, source, config.warmup.limit, "warmup")
        if lacking := [p.id for p in problems if not p.solution]:
            raise SgpoError(f"{source}: {len(lacking)} problems lack a solution to learn from (first: {lacking[0]})")
        share = config.warmup.guided_share
        rows = [(p, p.has_guidance and _seeded_share(config, p.id) < share, p.solution or "") for p in problems]
    pairs = builder.check_all([problem for problem, _, _ in rows])
    sequences = []
    for (problem, guided, completion), pair in zip(rows, pairs, strict=True):
        prompt = pair.guided if guided and pair.guided is not None else pair.plain
        ids = (*tokenizer.encode(completion, add_special_tokens=False), eos_id)
        if len(prompt) + len(ids) > config.warmup.max_tokens:
            raise SgpoError(
                f"{source}: demonstration {problem.id} has {len(prompt) + len(ids)} tokens, more than "
                f"warmup.max_tokens = {config.warmup.max_tokens}; shorten or remove it"
            )
        sequences.append(TrainSequence(prompt_ids=prompt, completion_ids=ids))
    return sequences


def build_engine(config: Config, model_folder: Path, optim: OptimConfig, device: torch.device) -> ZeroEngine:
    lm = load_causal_lm(model_folder, dtype=config.model.dtype, attn_implementation=config.model.attn_implementation)
    return engine_on(config, lm, optim, device)


def engine_on(config: Config, lm: Any, optim: OptimConfig, device: torch.device) -> ZeroEngine:
    """The engine on a model that is loaded, after a proof that it loses no gradient."""
    if config.model.lora.rank:
        _with_adapters(config, lm)
    size, timeout_s = config.engine.sequence_parallel_size, config.run.timeout_s
    engine = ZeroEngine(
        PolicyModel(
            lm,
            parallel=SequenceParallel(lm, size, timeout_s=timeout_s) if size > 1 else None,
            packed=config.engine.packing == "packed",
            gradient_checkpointing=config.model.gradient_checkpointing,
            activation_offload=config.model.activation_offload,
            mlp_tile_tokens=config.model.mlp_tile_tokens,
            liger=config.model.liger,
        ),
        device=device,
        zero_stage=config.engine.zero_stage,
        dtype=config.model.dtype,
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
        optimizer_state=config.engine.optimizer_state,
        offload_during_rollout=config.engine.offload_states_during_rollout,
    )
    check_gradients(engine, dtype=config.model.dtype)
    return engine


def _with_adapters(config: Config, lm: Any) -> Any:
    lora = config.model.lora
    add_adapters(lm, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dora=lora.dora, seed=config.run.seed)
    return lm


def build_rollouts(config: Config, model_folder: Path, *, from_scratch: bool = False) -> RolloutEngine:
    """The engine named by rollout.engine, in this process or in one of its own.

    `from_scratch`: its weights come from a sync (vLLM does not even load any); adapters too, where it has any.
    """
    build = partial(rollout_engine, config, model_folder, from_scratch)
    if config.rollout.placement == "inprocess":
        return build()
    from sgpo.rollout.process import EngineProcess

    devices = config.rollout.devices
    chosen = str(devices[ranks.local_rank() % len(devices)]) if devices else None
    return EngineProcess(build, stall_s=config.rollout.stall_s, devices=chosen)


def rollout_engine(config: Config, model_folder: Path, from_scratch: bool) -> RolloutEngine:
    """The engine itself; each is imported only when it is asked for."""
    tokenizer = load_tokenizer(model_folder)
    eos_ids = eos_token_ids(tokenizer, eos_ids_of_folder(model_folder))
    if config.rollout.engine == "vllm":
        from sgpo.rollout.vllm_engine import VllmEngine

        return VllmEngine(
            model_folder,
            eos_ids=eos_ids,
            dtype=config.model.dtype,
            options=vllm_options(config, model_folder, from_scratch),
        )
    from sgpo.rollout.hf_engine import HfEngine

    lm = load_causal_lm(model_folder, dtype=config.model.dtype, attn_implementation=config.model.attn_implementation)
    return HfEngine(
        _with_adapters(config, lm) if from_scratch and config.syncs_adapters(cuda=torch.cuda.is_available()) else lm,
        eos_ids=eos_ids,
        pad_id=tokenizer.pad_token_id,
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
        max_batch_tokens=config.rollout.max_batch_tokens,
        stall_s=config.rollout.stall_s,
    )


def vllm_options(config: Config, model_folder: Path, from_scratch: bool) -> Any:
    """The sizes of the vLLM engine: room for the longest rollout of the run, memory shared with the trainer."""
    from sgpo.rollout.vllm_engine import VllmOptions

    rollout, chosen = config.rollout, config.rollout.vllm
    new_tokens = max(
        rollout.max_new_tokens, config.eval.max_new_tokens if config.data.eval or config.eval.benchmarks else 0
    )
    longest = chosen.max_model_len or config.data.max_prompt_tokens + new_tokens
    lora = config.model.lora
    with_adapters = from_scratch and config.syncs_adapters(cuda=torch.cuda.is_available())
    return VllmOptions(
        max_model_len=min(longest, positions_of(model_folder) or longest),
        max_num_seqs=chosen.max_num_seqs,
        max_num_batched_tokens=chosen.max_num_batched_tokens,
        kv_cache_mib=chosen.kv_cache_mib,
        gpu_memory_utilization=chosen.gpu_memory_utilization,
        tensor_parallel_size=chosen.tensor_parallel_size,
        enforce_eager=chosen.enforce_eager,
        sleep_level=config.sleep_level(cuda=torch.cuda.is_available()),
        from_scratch=from_scratch,
        stall_s=rollout.stall_s,
        lora_rank=lora.rank if with_adapters else 0,
        lora_alpha=lora.alpha,
        lora_targets=None if "all-linear" in lora.targets else tuple(t.rsplit(".")[-1] for t in lora.targets),
    )


def sync_rollouts(
    config: Config, engine: ZeroEngine, rollouts: RolloutEngine, task: TaskData, tokenizer: Any
) -> SyncedRollouts:
    """The engine bound to the trainer; the probe is the first problem's longer prompt."""
    probe = task.prompts[0].guided or task.prompts[0].plain
    return SyncedRollouts(
        engine,
        rollouts,
        probe_ids=probe[:_PROBE_TOKENS],
        tolerance=config.rollout.sync_tolerance or _SYNC_TOLERANCE[config.model.dtype],
        token_budget=config.engine.micro_batch_tokens,
        pad_id=tokenizer.pad_token_id,
        adapters=config.syncs_adapters(cuda=torch.cuda.is_available()),
    )


def build_rewards(config: Config) -> RewardPool:
    reward = config.reward
    return RewardPool(
        reward.kind,
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        memory_mib=reward.memory_mib,
        max_chars=reward.max_chars,
        require_box=reward.require_box,
    )


def sgpo_settings(config: Config) -> SgpoSettings:
    """GRPO is SGPO without distillation."""
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
    def objective(head: Any, bias: Any, hidden: Any, _: Any, micro: MicroBatch) -> Any:
        return imitation_objective(head, bias, hidden, micro.student.targets, micro.target_weight)

    return objective


def on_rank_zero_first(action: Callable[[], Any]) -> Any:
    """Runs `action` on rank 0; an SgpoError there is raised on every rank instead of leaving the others waiting."""
    outcome: Any = None
    if ranks.is_main():
        try:
            outcome = (action(), None)
        except SgpoError as error:
            outcome = (None, str(error))
    value, problem = ranks.broadcast(outcome)
    if problem is not None:
        raise SgpoError(problem)
    return value


def _load(config: Config, source: str, limit: int | None, split: str) -> list[Problem]:
    if source == BUILTIN:
        name = "eval" if split == "eval" else "train"
        return builtin.make_problems(name, seed=config.run.seed, count=limit or _BUILTIN_COUNTS[name])
    problems = load_problems(source, limit=limit)
    if config.data.strategy_source == "calculator_trace":
        problems, _ = attach_strategies(problems)
        if split == "eval":
            return problems
        lacking = sum(not p.has_guidance for p in problems)
        if lacking:
            print(f"{source}: {lacking} of {len(problems)} problems have no calculator marks and are left out")
        problems = [p for p in problems if p.has_guidance]
        if not problems:
            raise SgpoError(f"{source}: no problem has a solution with <<...>> calculator marks; use another source")
    return problems


def _seeded_share(config: Config, problem_id: str) -> float:
    """A number from 0 to 1 that the seed and the problem decide."""
    return seed_of(config.run.seed, "guided demonstration", problem_id) / 2**63


def _check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    old = without_gone(old)
    with suppress(SgpoError):  # a key that did not exist then had what is its default now
        old = checked(Config, old, str(path)).model_dump(mode="json")
    changed = [
        f"{section}.{key} ({old.get(section, {}).get(key)!r} -> {value!r})"
        for section, values in new.items()
        if section not in _FREE_SECTIONS
        for key, value in values.items()
        if old.get(section, {}).get(key) != value
    ]
    if changed:
        raise SgpoError(
            f"{path} belongs to a run with other settings: {', '.join(changed)}; give another run.name, "
            "or --run.resume never to set the old folder aside"
        )


def epoch_order(count: int, *, seed: int, epoch: int) -> Sequence[int]:
    """Order of the problems in an epoch."""
    generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
    return torch.randperm(count, generator=generator).tolist()
