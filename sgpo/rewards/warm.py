"""Imported by the server that forks the reward workers, for its side effect: Math-Verify is loaded and warm.

The first result compiles large regular expressions and parser tables; that time would otherwise count against the
first completion of every new worker.
"""

from sgpo.rewards.verifier import verify_answer

verify_answer("\\boxed{\\frac{1}{2}}", "0.5")
verify_answer("\\boxed{x + 1}", "1 + x")
