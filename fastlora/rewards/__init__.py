"""Rewards: what a rollout earned, and at which token (`registry.load_rewards` is the way in; one file per built-in reward)."""
