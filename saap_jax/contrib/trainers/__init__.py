"""Checkpoints of trainers, MaxText and Tunix: read and written."""
