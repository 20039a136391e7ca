"""Problems from files or the built-in task, their prompts, and the order in which they come."""
