"""What the training scripts share: flags, PPO maths, losses, checkpoints, metrics and plots."""
