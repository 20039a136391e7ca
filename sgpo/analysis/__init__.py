"""Are strategies reusable? What `sgpo strategies analyze` samples, measures and shows."""
