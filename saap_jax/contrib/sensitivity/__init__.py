"""What each layer costs: `saap sensitivity`, and its page."""
