"""The experts: one file each, their weights and cards in `weights/`, their training in `train/`."""
