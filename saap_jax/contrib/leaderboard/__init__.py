"""A leaderboard that anybody can enter: `saap enter`, and its page."""
