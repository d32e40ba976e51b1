"""The largest ratio within a limit: `saap frontier`, and its page."""
