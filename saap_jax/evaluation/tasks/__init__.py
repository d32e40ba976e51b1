"""Zero-shot tasks: multiple choice from local files, and those of lm-evaluation-harness, scored by one core."""
