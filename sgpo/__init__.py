"""Strategy-Guided Policy Optimization: a trainer with its own fused losses (`sgpo_kernels`)."""
