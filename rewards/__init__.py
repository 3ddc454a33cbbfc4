"""Text to score: digit rules, reward models, a user's own function.

Every reward is a callable of (prompts, completions), two lists of strings of equal length, and returns
one float per completion. Only `rewards.reward_model` needs mlx.
"""
