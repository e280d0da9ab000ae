"""The experts: one file each, and how ours is trained in `train/`."""
