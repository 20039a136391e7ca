"""The paper's method and its relatives, as plain numbers and tensors: who learns what, with which weight and loss."""
