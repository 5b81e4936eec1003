"""A reward: reward.functions = ["docs/own/reward.py:short"]. It runs in a process of its own, and is killed when it hangs."""


def short(texts, examples):
    """1 for an answer of at most 8 characters, falling to 0 at 40."""
    return [max(0.0, min(1.0, (40 - len(text)) / 32)) for text in texts]
