"""Small tools that any folder may use; they know nothing of training."""
