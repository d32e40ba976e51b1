"""The sections of each kind of run, built from its records."""
