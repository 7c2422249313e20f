"""Elastic training: one run, from sampling to snapshots."""
