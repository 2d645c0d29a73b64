"""From SQL and frames to a program of stages: what is to be done, before anybody knows where."""
