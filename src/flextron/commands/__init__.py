"""What the command line runs: a module for each verb, with a function `run`, and what they share."""
