"""Sampling by vLLM: an engine of our own or running servers, the adapter swapped in after every step and checked before it is used."""
