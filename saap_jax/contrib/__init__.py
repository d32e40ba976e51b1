"""What is kept working and tested, and what nobody has to read: it imports core and wings, and no one imports it."""
