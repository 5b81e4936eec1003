"""Where completions come from: one protocol, several samplers."""
