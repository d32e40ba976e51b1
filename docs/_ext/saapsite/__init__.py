"""What the documentation site has beside Sphinx: a module each, and checks that need no Sphinx."""
