"""Which weights must go together, which units they have, what each costs, and how weights look unit by unit."""
