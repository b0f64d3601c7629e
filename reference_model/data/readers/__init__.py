"""One reader a layout of data on disk, behind one interface."""
