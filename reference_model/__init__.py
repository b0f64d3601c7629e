"""METRIS assembled from `metris_blocks`: model, data, scoring, training, viewing and the command line."""
