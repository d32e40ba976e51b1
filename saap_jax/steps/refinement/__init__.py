"""Other keep-sets of the same share, chosen on the text itself; a file a refinement."""
