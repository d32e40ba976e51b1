"""One file a command: configuration in, run or result out. Nothing is printed here."""
