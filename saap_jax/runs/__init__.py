"""A run on disk, and what follows from it. Nothing is drawn here."""
