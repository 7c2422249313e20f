"""What the command line runs: a module for each of config/, and `loading`, which they share."""
