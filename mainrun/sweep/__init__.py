"""Many trials of one search space: the search, the engines, the folder and what it came to."""
