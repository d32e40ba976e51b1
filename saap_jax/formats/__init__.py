"""Strict readers: whatever a file holds, plain values that are safe to use or one ValueError."""
