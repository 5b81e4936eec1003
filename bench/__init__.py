"""The comparison with TRL + PEFT, and the benchmarks of single ops. Never imported by fastlora."""
