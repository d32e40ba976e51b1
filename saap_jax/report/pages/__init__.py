"""The blocks of each kind of run, and of the tables that commands print."""
