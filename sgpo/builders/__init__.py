"""From a checked config to the parts of a run: one file per part, and no part knows another."""
