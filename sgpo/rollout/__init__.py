"""Engines that sample completions, behind one protocol (`sgpo.types.RolloutEngine`)."""
