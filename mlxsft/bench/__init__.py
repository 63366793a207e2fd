"""How fast a machine tunes and answers: a fixed protocol, measured, and results of several machines side by side."""
