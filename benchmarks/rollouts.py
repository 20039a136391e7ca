"""Rollouts through our vLLM engine beside bare vLLM and transformers, and what a weight sync costs; one row each.

python -m benchmarks.rollouts                                          built-in model, about two minutes on a CPU
python -m benchmarks.rollouts --model models/smollm2-135m --data data/gsm8k_train.jsonl --max-new-tokens 96
python -m benchmarks.rollouts --parts sync --sync-shapes 8192x256x7,49152x576x25 --placements inprocess

Throughput. The requests of a training step (8 plain and 4 guided per problem) go, with equal seeds and settings, to

  ours              VllmEngine.generate, with the callbacks that the trainer gives it
  bare              LLM.generate of an LLM of its own with the same settings, sampled log-probs included
  bare-no-logprobs  the same without log-probs
  bare-defaults     LLM.generate with vLLM's own block size, log-prob mode and scheduling
  hf                HfEngine.generate; its seeds draw other tokens

in turn, every second round in reverse order, each after a reset of the prefix cache (a weight sync does that in
training). Engines run in this process: so does ours in training. `ours_over_peer` is the quotient of sampled tokens per
second in one round, as quantiles over the rounds; `ours_over_peer_cpu` is that per second of this process's CPU time,
which a busy machine disturbs less; `equal_share` is the share of completions that equal those of bare. On a GPU bare is
the LLM inside our engine, since two would not share its memory; the row says so. A completion that neither ends with
EOS nor has its full length, or of ours that differs from bare's, makes the row `wrong`, without a time.

Sync: see `benchmarks/sync_cost.py`.

Only ratios are printed for a CPU, since the machine is shared. Exit code 1 where one of ours is wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import measure
from benchmarks.sync_cost import SYNC_TOLERANCE, sync
from sgpo.builders.rollouts import rollout_engine, vllm_options
from sgpo.builders.task import load_task
from sgpo.config import Config
from sgpo.data import builtin
from sgpo.data.builtin import BUILTIN
from sgpo.data.epochs import problems_of_step
from sgpo.data.prompts import eos_token_ids
from sgpo.model.loading import eos_ids_of_folder, load_tokenizer
from sgpo.train.rollout_batch import build_requests
from sgpo.types import Rollout, RolloutEngine, RolloutRequest, SamplingParams, SgpoError

OURS, BARE = "ours", "bare"
PEERS = (OURS, BARE, "bare-no-logprobs", "bare-defaults", "hf")
# In half precision on a GPU one last bit may part two completions for good.
LEAST_EQUAL = {"cpu": 1.0, "cuda": 0.5}
SYNC_SHAPES = "2048x128x4,8192x256x7,16384x512x9,49152x576x25"  # 1, 8, 39 and 136 million parameters
QUICK_SHAPES = "512x64x2"
N_AUTO, N_GUIDED = 8, 4


class Completion(NamedTuple):
    ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    truncated: bool


@dataclass(frozen=True)
class Peer:
    """One way to sample: `run(count)` takes the first requests and is timed, `read` brings its return into one form."""

    name: str
    note: str
    run: Callable[[int], Any]
    read: Callable[[Any], list[Completion]]
    reset: Callable[[], object] = lambda: None


def complaints(completions: Sequence[Completion], limits: Sequence[int], eos_ids: Sequence[int]) -> str | None:
    """The first thing that is wrong with what a peer returned, or None."""
    if len(completions) != len(limits):
        return f"{len(completions)} completions for {len(limits)} requests"
    for index, (one, limit) in enumerate(zip(completions, limits, strict=True)):
        ended = bool(one.ids) and one.ids[-1] in eos_ids
        if one.truncated == ended or any(token in eos_ids for token in one.ids[:-1]):
            return f"completion {index} says truncated = {one.truncated}, which its tokens do not bear out"
        if len(one.ids) != limit and (one.truncated or len(one.ids) > limit):
            return f"completion {index} has {len(one.ids)} tokens, its limit is {limit}"
        if one.logprobs is None:
            continue
        if len(one.logprobs) != len(one.ids) or not all(-math.inf < value < 1e-5 for value in one.logprobs):
            return f"completion {index}: its log-probs are not one finite number up to 0 per token"
    return None


def compare(
    peers: Sequence[Peer],
    limits: Sequence[int],
    eos_ids: Sequence[int],
    *,
    rounds: int,
    device: str,
    least: float,
    seconds: float = math.inf,
) -> Iterator[dict[str, Any]]:
    """One row per peer, the peers timed in turn after a short warm-up. Every round is checked.

    No further round begins after `seconds`.
    """
    times: dict[str, list[float]] = {peer.name: [] for peer in peers}
    rates: dict[str, list[float]] = {peer.name: [] for peer in peers}
    cpu_rates: dict[str, list[float]] = {peer.name: [] for peer in peers}
    equal: dict[str, list[float]] = {peer.name: [] for peer in peers}
    tokens: dict[str, int] = {}
    gaps: dict[str, float] = {}
    wrong: dict[str, str] = {}
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    for peer in peers:
        peer.run(2)
    end = time.monotonic() + seconds
    for index in range(rounds):
        if index and time.monotonic() > end:
            break
        sampled: dict[str, list[Completion]] = {}
        gc.collect()
        for peer in peers[::-1] if index % 2 else peers:
            peer.reset()
            start, cpu_start = time.perf_counter(), time.process_time()
            returned = peer.run(len(limits))
            synchronize()
            spent, cpu_spent = time.perf_counter() - start, time.process_time() - cpu_start
            found = sampled[peer.name] = peer.read(returned)
            tokens[peer.name] = sum(len(one.ids) for one in found)
            times[peer.name].append(spent * 1e3)
            rates[peer.name].append(tokens[peer.name] / spent)
            cpu_rates[peer.name].append(tokens[peer.name] / cpu_spent)
            if problem := complaints(found, limits, eos_ids):
                wrong.setdefault(peer.name, problem)
        for name, found in sampled.items():
            pairs = list(zip(found, sampled[BARE], strict=False))
            equal[name].append(sum(one.ids == other.ids for one, other in pairs) / len(limits))
            gaps[name] = max(gaps.get(name, 0.0), _gap(pairs))
        print(f"[{time.strftime('%H:%M:%S')}] throughput: round {index + 1} of {rounds}", file=sys.stderr, flush=True)
    if min(equal[OURS]) < least:
        wrong.setdefault(OURS, f"only {min(equal[OURS]):.3f} of the completions are those of bare")
    for peer in peers:
        name = peer.name
        row: dict[str, Any] = {"part": "throughput", "peer": name, "note": peer.note, "rounds": len(times[name])}
        if name in wrong:
            yield {**row, "status": "wrong", "reason": wrong[name]}
            continue
        yield {
            **row,
            "status": "ok",
            "tokens": tokens[name],
            "equal_share": min(equal[name]),
            "logprob_gap_max": gaps[name],
            **measure.quantiles_ms(times[name]),
            **_quantiles(rates[name], "tokens_per_s"),
            **_quotients(rates, name, "ours_over_peer", known=OURS not in wrong),
            **_quotients(cpu_rates, name, "ours_over_peer_cpu", known=OURS not in wrong),
        }


def _quotients(rates: Mapping[str, Sequence[float]], peer: str, name: str, *, known: bool) -> dict[str, float | None]:
    """Quantiles of ours / peer, round by round; None where ours is wrong and its time means nothing."""
    found = _quantiles([ours / theirs for ours, theirs in zip(rates[OURS], rates[peer], strict=True)], name)
    return {key: value if known else None for key, value in found.items()}


def _gap(pairs: Sequence[tuple[Completion, Completion]]) -> float:
    """Largest |log-prob difference| over completions of equal tokens; `complaints` tells of a missing one."""
    both = [(a.logprobs, b.logprobs) for a, b in pairs if a.ids == b.ids and a.logprobs and b.logprobs]
    return max((abs(x - y) for one, other in both for x, y in zip(one, other, strict=False)), default=0.0)


def _quantiles(values: Sequence[float], name: str) -> dict[str, float]:
    shares = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = torch.tensor(values, dtype=torch.float64).quantile(shares).tolist()
    return dict(zip((f"{name}_p10", f"{name}_p50", f"{name}_p90"), found, strict=True))


# throughput


def throughput(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    folder = _model_folder(options, scratch)
    config = _config(options, folder)
    tokenizer = load_tokenizer(folder)
    task = load_task(config, tokenizer, split="train")
    chosen = problems_of_step(len(task.problems), per_step=options.problems, seed=options.seed, step=0)
    group = {"n_auto": N_AUTO, "n_guided": N_GUIDED}
    requests = build_requests(task, chosen, **group, seed=options.seed, step=0)
    sizes = vllm_options(config, folder, from_scratch=False)
    limits = [min(options.max_new_tokens, sizes.max_model_len - len(request.prompt_ids)) for request in requests]
    eos_ids = eos_token_ids(tokenizer, eos_ids_of_folder(folder))
    peers = _peers(config, folder, requests, limits, eos_ids, names=options.peers, on_cpu=options.device == "cpu")
    common = {
        "model": folder.name if options.model != BUILTIN else BUILTIN,
        "data": options.data.name if options.data else BUILTIN,
        "requests": len(requests),
        "problems": options.problems,
        **group,
        "prompt_tokens": sum(len(request.prompt_ids) for request in requests),
        "distinct_prompt_tokens": sum(map(len, {request.prompt_ids for request in requests})),
        "max_new_tokens": options.max_new_tokens,
        "temperature": config.rollout.temperature,
        "top_p": config.rollout.top_p,
        "max_model_len": sizes.max_model_len,
        "max_num_seqs": sizes.max_num_seqs,
    }
    limited = {"rounds": options.rounds, "seconds": options.seconds, "least": LEAST_EQUAL[options.device]}
    for row in compare(peers, limits, eos_ids, device=options.device, **limited):
        yield {**common, **row}


def _model_folder(options: argparse.Namespace, scratch: Path) -> Path:
    if options.model != BUILTIN:
        return Path(options.model)
    builtin.save_builtin(scratch / BUILTIN, seed=options.seed)
    return scratch / BUILTIN


def _config(options: argparse.Namespace, folder: Path) -> Config:
    """A run's config: prompts, sizes and engines are made from it as the trainer makes them."""
    source = {"train": BUILTIN, "train_limit": max(options.problems, 16), "max_prompt_tokens": 128}
    if options.data:
        source |= {"train": str(options.data), "strategy_source": "calculator_trace", "max_prompt_tokens": 600}
    return Config.model_validate(
        {
            "run": {"seed": options.seed},
            "model": {"path": str(folder), "dtype": options.dtype},
            "data": source,
            "rollout": {
                "engine": "vllm",
                "max_new_tokens": options.max_new_tokens,
                "vllm": {"sleep_level": 0, "enforce_eager": options.eager},
            },
        }
    )


def _peers(
    config: Config,
    folder: Path,
    requests: Sequence[RolloutRequest],
    limits: Sequence[int],
    eos_ids: Sequence[int],
    *,
    names: Sequence[str],
    on_cpu: bool,
) -> list[Peer]:
    rollout = config.rollout
    sampling = SamplingParams(rollout.temperature, rollout.top_p, rollout.max_new_tokens)
    engine: Any = rollout_engine(
        config, folder, from_scratch=False
    )  # before vllm: its module says what vllm is to read when imported
    hf = rollout_engine(
        config.model_copy(update={"rollout": rollout.model_copy(update={"engine": "hf"})}), folder, from_scratch=False
    )
    from vllm import SamplingParams as VllmSampling
    from vllm.sampling_params import RequestOutputKind

    prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]

    def bare(llm: Any, logprobs: int | None) -> Callable[[int], Any]:
        params = [
            VllmSampling(
                temperature=rollout.temperature,
                top_p=rollout.top_p,
                max_tokens=limit,
                seed=request.seed,
                stop_token_ids=list(eos_ids),
                ignore_eos=True,
                logprobs=logprobs,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for request, limit in zip(requests, limits, strict=True)
        ]
        return lambda count: llm.generate(prompts[:count], params[:count], use_tqdm=False)

    def ours(one: RolloutEngine) -> Callable[[int], Any]:
        done: list[Rollout] = []
        return lambda count: one.generate(requests[:count], sampling, lambda *_: None, done.append)

    def peer(name: str, note: str, llm: Any, run: Callable[[int], Any]) -> Peer:
        return Peer(name, note, run, _from_vllm, llm.reset_prefix_cache)

    own, note = engine._llm, "the LLM inside our engine"
    if on_cpu:
        other: Any = rollout_engine(config, folder, from_scratch=False)
        own, note = other._llm, "an LLM of its own"
    peers = [
        Peer(OURS, "in this process", ours(engine), _from_rollouts, engine._llm.reset_prefix_cache),
        peer(BARE, note, own, bare(own, 0)),
        peer("bare-no-logprobs", note, own, bare(own, None)),
        Peer("hf", "transformers' generate; draws other tokens", ours(hf), _from_rollouts),
    ]
    if on_cpu and "bare-defaults" in names:
        defaults = _default_llm(folder, config)
        peers.append(peer("bare-defaults", "an LLM of its own", defaults, bare(defaults, 0)))
    return [one for one in peers if one.name in names]


def _default_llm(folder: Path, config: Config) -> Any:
    """The lengths of the run, vLLM's own choice in everything else; the KV cache is ours, since vLLM would take all."""
    from vllm import LLM

    from sgpo.rollout.vllm_guest import undisturbed

    sizes = vllm_options(config, folder, from_scratch=False)
    memory = (sizes.kv_cache_mib or 512) * 2**20
    options = {"max_model_len": sizes.max_model_len, "dtype": config.model.dtype, "kv_cache_memory_bytes": memory}
    with undisturbed():
        return LLM(str(folder), skip_tokenizer_init=True, generation_config="vllm", **options)


def _from_rollouts(rollouts: Sequence[Rollout]) -> list[Completion]:
    return [Completion(one.completion_ids, one.rollout_logprobs, one.truncated) for one in rollouts]


def _from_vllm(outputs: Sequence[Any]) -> list[Completion]:
    found = [output.outputs[0] for output in outputs]
    return [
        Completion(
            tuple(one.token_ids),
            None if one.logprobs is None else tuple(one.logprobs.logprobs),
            one.finish_reason != "stop",
        )
        for one in found
    ]


# command line


def table(row: Mapping[str, Any], device: str) -> str:
    """A row as a line to read."""
    name = row.get("peer") or f"{row['placement']} {row['parameters'] / 1e6:.1f} M parameters"
    if row["status"] != "ok":
        return f"{name}: {row['status']}, {row['reason']}"
    if row["part"] == "throughput":
        keys = [f"ours_over_peer_{key}" for key in ("p10", "p50", "p90", "cpu_p50")]
        ratio = " ".join("-" if row[key] is None else f"{row[key]:.3f}" for key in keys)
        rate = f", {row['tokens_per_s_p50']:.0f} tokens/s" if device.startswith("cuda") else ""
        equal = f"{row['equal_share']:.3f} equal to {BARE}'s"
        return f"{name:17} ours / it: p10, p50, p90, CPU = {ratio}; {row['tokens']} tokens, {equal}{rate}"
    parts = (2 * row["checksum_ms_min"], row["load_ms"], row["probe_ms"])
    shares = ", ".join(f"{part / row['sync_ms_min']:.0%}" for part in parts)
    memory = ", ".join("?" if row[key] is None else f"{row[key]:.0f}" for key in ("extra_mib", "trainer_extra_mib"))
    speed = f", {row['sync_ms_min']:.1f} ms" if device.startswith("cuda") else ""
    return (
        f"{name:32} {row['bytes'] / 2**20:.0f} MiB: {row['sync_over_copy']:.1f} copies; checksums, load, probe = "
        f"{shares}; peak {memory} MiB{speed}"
    )


def _shapes(text: str) -> list[tuple[int, ...]]:
    shapes = [tuple(int(part) for part in one.split("x") if part.isdecimal()) for one in text.split(",")]
    if any(len(shape) != 3 or min(shape) < 1 or shape[1] % 64 for shape in shapes):
        raise SgpoError(f"--sync-shapes takes VOCABxHIDDENxLAYERS, hidden a multiple of 64, with commas; got {text!r}.")
    return shapes


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="throughput,sync")
    parser.add_argument("--model", default=BUILTIN, help="a local model folder; default: the built-in model")
    parser.add_argument("--data", type=Path, help="JSONL with calculator marks in `solution`; default: built-in task")
    parser.add_argument("--problems", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=600.0, help="no further round begins after that")
    parser.add_argument("--peers", help=f"default all: {', '.join(PEERS)}")
    parser.add_argument("--sync-shapes", default=SYNC_SHAPES, help="VOCABxHIDDENxLAYERS, with commas")
    parser.add_argument("--sync-rounds", type=int, default=5)
    parser.add_argument("--placements", default="inprocess,process")
    parser.add_argument("--device", choices=LEAST_EQUAL, default="cpu")
    parser.add_argument("--dtype", choices=SYNC_TOLERANCE, help="default: float32 on the CPU, else bfloat16")
    parser.add_argument("--eager", action="store_true", help="GPU: no CUDA graphs, a quicker start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/rollouts.jsonl"))
    parser.add_argument("--quick", action="store_true", help="the smallest of everything: does it run?")
    options = parser.parse_args(arguments)
    if options.quick:
        options.problems, options.max_new_tokens, options.rounds, options.sync_rounds = 2, 12, 2, 2
        options.sync_shapes = QUICK_SHAPES
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    options.peers = options.peers.split(",") if options.peers else list(PEERS)
    options.parts, options.placements = options.parts.split(","), options.placements.split(",")
    options.sync_shapes = _shapes(options.sync_shapes)
    return options


def check(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("vllm") is None:
        raise SgpoError("this benchmark needs vLLM, which is not installed: pip install 'sgpo[vllm]'.")
    if (options.device == "cuda") != torch.cuda.is_available():
        raise SgpoError("--device must be cuda where torch sees a GPU, since vLLM takes it, and cpu where it does not.")
    for name, given, known in (
        ("--parts", options.parts, ("throughput", "sync")),
        ("--placements", options.placements, ("inprocess", "process")),
        ("--peers", options.peers, PEERS),
    ):
        if unknown := set(given) - set(known):
            raise SgpoError(f"Unknown {name} {', '.join(sorted(unknown))}: expected some of {', '.join(known)}.")
    if missing := {OURS, BARE} - set(options.peers):
        raise SgpoError(f"--peers lacks {', '.join(sorted(missing))}, which all others are held against.")
    counts = ("problems", "max_new_tokens", "rounds", "sync_rounds")
    if low := [f"--{name.replace('_', '-')}" for name in counts if getattr(options, name) < 1]:
        raise SgpoError(f"{', '.join(low)} must be at least 1.")


def main(arguments: Sequence[str] | None = None) -> int:
    failed = False
    try:
        options = parse(arguments)
        check(options)
        common = {"benchmark": "rollouts", "dtype": options.dtype, "seed": options.seed}
        common |= measure.origin(options.device, "benchmarks.rollouts")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch, options.out.open("a", encoding="utf-8") as file:
            for part in options.parts:
                for row in {"throughput": throughput, "sync": sync}[part](options, Path(scratch)):
                    file.write(json.dumps({**common, **row}) + "\n")
                    file.flush()
                    print(table(row, options.device), flush=True)
                    failed |= row["status"] != "ok"
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
