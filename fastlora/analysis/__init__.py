"""Reads runs and writes artefacts and figures; training never imports it."""
