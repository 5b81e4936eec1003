def dry_run(config, console): return 0
