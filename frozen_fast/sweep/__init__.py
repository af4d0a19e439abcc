"""Settings found by measurement: each trial a process of its own, failures as results, a ranking and a ready config."""
