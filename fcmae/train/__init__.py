"""What training of every kind shares: script, loop, plan, checkpoints, run folder, processes."""
