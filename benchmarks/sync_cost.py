"""What a weight sync costs, as a part of `python -m benchmarks.rollouts`.

VllmEngine.load_weights on random Llama models, in this process and through EngineProcess, beside a plain copy of
the same bytes, by the least of the rounds; on a CPU in CPU time of both processes. `checksum_ms` is one side's, the
trainer's and the engine's are both in `sync_ms`; `probe_ms` is what the engine's log-probs of a fixed text add;
`load_ms` is the rest. `extra_mib` is the peak of the engine's process (host memory, shared blocks included) beyond what
it held before, `trainer_extra_mib` that of the sender.
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from sgpo.model.loading import load_causal_lm, positions_of
from sgpo.types import RolloutEngine
from sgpo.utils.checksums import checksum

SYNC_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
PROBE_TOKENS = 256


def sync(options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, Any]]:
    for shape in options.sync_shapes:
        folder = scratch / "x".join(map(str, shape))
        _random_llama(*shape, seed=options.seed).save_pretrained(folder)
        for placement in options.placements:
            yield {
                "part": "sync",
                "placement": placement,
                **dict(zip(("vocab", "hidden", "layers"), shape, strict=True)),
                **_sync_case(folder, shape, placement, options),
            }


def _random_llama(vocab: int, hidden: int, layers: int, *, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab,
                hidden_size=hidden,
                intermediate_size=3 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 64,
                num_key_value_heads=hidden // 64,
                max_position_embeddings=2 * PROBE_TOKENS,
                tie_word_embeddings=True,
                initializer_range=0.05,
            )
        )


def make_engine(folder: Path, dtype: str) -> RolloutEngine:
    """A function of the module: a child process imports it by name."""
    from sgpo.rollout.vllm_engine import VllmEngine, VllmOptions

    sizes = VllmOptions(max_model_len=positions_of(folder) or 0, max_num_seqs=8, kv_cache_mib=64, enforce_eager=True)
    return VllmEngine(folder, eos_ids=[0], dtype=dtype, options=sizes)


def _sync_case(folder: Path, shape: Sequence[int], placement: str, options: argparse.Namespace) -> dict[str, Any]:
    """The engine starts with other weights than the trainer's, so that the log-probs show whether they came."""
    from sgpo.rollout.process import EngineProcess

    trainer = folder.with_name(f"{folder.name}-trainer")
    _random_llama(*shape, seed=options.seed + 1).save_pretrained(trainer)
    lm = load_causal_lm(trainer, dtype=options.dtype).to(options.device).eval().requires_grad_(False)
    named = dict(lm.named_parameters())
    probe_ids = torch.randint(shape[0], (PROBE_TOKENS,), generator=torch.Generator().manual_seed(options.seed))
    copies = [torch.empty_like(tensor) for tensor in named.values()]
    start = partial(make_engine, folder, options.dtype)
    engine = EngineProcess(start, stall_s=600.0) if placement == "process" else start()
    receipts = []

    def load(ids: Sequence[int]) -> None:
        sent: dict[str, int] = {}

        def recorded() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in named.items():  # as the trainer does, see sgpo.engine.weight_sync
                sent[name] = checksum(tensor)
                yield name, tensor

        receipts.append((sent, engine.load_weights(recorded(), len(receipts), ids)))

    runs: Mapping[str, Callable[[], object]] = {
        "copy": lambda: [to.copy_(tensor) for to, tensor in zip(copies, named.values(), strict=True)],
        "checksum": lambda: [checksum(tensor) for tensor in named.values()],
        "unproved": lambda: load(()),
        "sync": lambda: load(probe_ids.tolist()),
    }
    try:
        child = engine.pid if isinstance(engine, EngineProcess) else None
        times: dict[str, list[float]] = {name: [] for name in runs}
        for index in range(options.sync_rounds + 1):
            for name, run in runs.items():
                begin = _clock(options.device, child)
                run()
                if index:
                    times[name].append((_clock(options.device, child) - begin) * 1e3)
        extra = _peaks([child or os.getpid(), os.getpid()], runs["sync"])
    finally:
        engine.close()
    least = {name: min(values) for name, values in times.items()}  # what else runs can only add
    logits = lm(input_ids=probe_ids[None].to(lm.device)).logits[0, :-1].float().log_softmax(-1).cpu()
    wanted = logits.gather(-1, probe_ids[1:, None])[:, 0]
    gap = float((torch.tensor(receipts[-1][1].probe_logprobs) - wanted).abs().mean())
    arrived = all(sent == receipt.checksums for sent, receipt in receipts)
    size = sum(tensor.nbytes for tensor in named.values())
    row: dict[str, Any] = {"tensors": len(named), "parameters": sum(t.numel() for t in named.values()), "bytes": size}
    row |= {
        "clock": "cpu" if options.device == "cpu" else "wall",
        "rounds": options.sync_rounds,
        "probe_tokens": PROBE_TOKENS,
        "probe_gap_mean": gap,
    }
    if not arrived or not gap <= SYNC_TOLERANCE[options.dtype]:
        return {**row, "status": "wrong", "reason": f"checksums agree: {arrived}; log-prob gap {gap:.2e} nats"}
    for name, values in times.items():
        row |= {f"{name}_ms_min": least[name], **measure.quantiles_ms(values, f"{name}_")}
    return {
        **row,
        "status": "ok",
        "probe_ms": least["sync"] - least["unproved"],
        "load_ms": least["unproved"] - 2 * least["checksum"],
        "sync_over_copy": least["sync"] / least["copy"],
        "extra_mib": extra[0],
        "trainer_extra_mib": extra[1],
    }


def _clock(device: str, child: int | None) -> float:
    """Seconds: on a CPU spent by this process and the child, on a GPU by the clock on the wall."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    spent = time.process_time()
    if child is not None:
        fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time
    return spent


def _peaks(pids: Sequence[int], run: Callable[[], object]) -> list[float | None]:
    """MiB that each process needs beyond what it holds now while `run` runs; None where /proc does not tell."""

    def read(pid: int, key: str) -> int:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    gc.collect()
    try:
        for pid in pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
        before = [read(pid, "VmRSS:") for pid in pids]
        run()
        return [(read(pid, "VmHWM:") - held) / 1024 for pid, held in zip(pids, before, strict=True)]
    except OSError:
        return [None for _ in pids]
