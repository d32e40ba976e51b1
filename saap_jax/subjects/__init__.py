"""What is pruned: `base` is the seam, `llama` implements it, and opens what is asked for; `trace.subject` too."""
