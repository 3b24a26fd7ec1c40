"""The page to chat on at /: static files that ask this server alone."""
