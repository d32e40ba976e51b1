"""What is pruned: `base` is the seam, `llama` and `traced` implement it, `opened` finds the one that is asked for."""
