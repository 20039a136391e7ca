"""Trains with an engine that is compared, after every sync, with a fresh one on the exported weights.

python rollout_step_worker.py CONFIG.yaml OUT.json
"""

import json
import sys
from pathlib import Path

from sgpo.builders.model_engine import resolve_model
from sgpo.builders.rollouts import build_rollouts
from sgpo.config import Config
from sgpo.engine.export import export_model
from sgpo.engine.weight_sync import PolicySampler
from sgpo.model.loading import load_tokenizer
from sgpo.train import trainer
from sgpo.types import RolloutRequest, SamplingParams
from sgpo.utils import distributed
from sgpo.utils.config_file import load_settings

GREEDY = SamplingParams(0.0, 1.0, 12)


def sample(engine, prompts):
    requests = [RolloutRequest(i, "auto", 0, tuple(prompt), i) for i, prompt in enumerate(prompts)]
    return [(list(r.completion_ids), list(r.rollout_logprobs)) for r in engine.generate(requests, GREEDY)]


def main(config_path, out):
    config = load_settings(Config, config_path)
    run_dir = config.run.dir
    sync, seen = PolicySampler.sync, []

    def recorded(self, version):
        report = sync(self, version)
        folder = run_dir / f"sync-{version}"
        export_model(self._trainer_engine, load_tokenizer(resolve_model(config)), folder)
        prompts = [self._probe_ids, *(self._probe_ids[: 8 + 3 * i] for i in range(4))]
        seen.append((str(folder), prompts, sample(self, prompts)))
        return report

    PolicySampler.sync = recorded
    trainer.train(config)
    rows = []
    for folder, prompts, running in seen:
        fresh = build_rollouts(config, Path(folder))
        rows.append({"running": running, "fresh": sample(fresh, prompts)})
        fresh.close()
    Path(out).write_text(json.dumps(rows))
    distributed.wait_for_gloo()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
