"""From files on disk to batches: readers, transforms, collation."""
