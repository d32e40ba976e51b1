"""Stage 4: numbers about models and how sure they are. Pure: no files of runs, nothing printed."""
