"""The packed variable-rank adapter: patterns -> slots -> flat buffers, attached to a Hugging Face decoder."""
