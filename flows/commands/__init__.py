"""One command of the command line per file: its flags, its output for people, its result for machines."""
