"""People and programs: the command line and the benchmark."""
