"""Backend `reference`: the operations in plain PyTorch, which the others are held against."""
