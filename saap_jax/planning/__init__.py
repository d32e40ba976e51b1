"""Does a job fit a machine, and how long does it take there? Answered before the machine is asked for."""
