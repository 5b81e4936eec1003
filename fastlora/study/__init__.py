"""Studies: many runs as cells, scheduled by Ray, kept by what they compute, ending in a report (`python -m fastlora.study --help`)."""
