"""A program run to its end: tasks, the directories their outputs lie in, and what is done about trouble."""
