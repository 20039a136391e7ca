"""Training runs: the loop of Algorithm 1, the SFT warm-up before it, and what a step reads and reports."""
