"""fastlora: variable-rank LoRA trained with GRPO, exact to PEFT + TRL."""

__version__ = "0.1.0"
