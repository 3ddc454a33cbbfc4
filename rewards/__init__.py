"""From text to score: the digit rule, answers, reward models, a user's own function.

Every reward is a callable of (prompts, completions), two lists of strings of equal length, that returns one float per
completion. Only `rewards.reward_model` and `rewards.build` need mlx.
"""
