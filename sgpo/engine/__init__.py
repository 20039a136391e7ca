"""DeepSpeed around the model: optimizer steps, batches, weight sync with the rollout engine, checkpoints."""
