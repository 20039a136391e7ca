"""A Hugging Face language model as the trainer needs it: hidden states and a loss head, never logits."""
