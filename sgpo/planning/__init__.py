"""What a run will need, told before anything is loaded: memory by phase, time, and what to change."""
