"""From files on disk to batches: readers, transforms, collation, and the synthetic generator."""
