"""Studies: many runs by one command, with the controls and intervals that decide their claims."""
