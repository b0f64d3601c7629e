"""The page: a checkpoint in the browser."""
