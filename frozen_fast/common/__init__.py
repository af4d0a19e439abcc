"""What every room may need: files that survive a kill, log lines, this process's rank. Import its modules by name."""
