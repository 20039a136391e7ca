"""How good a policy is: avg@k on held-out problems and benchmarks, with intervals and comparisons."""
