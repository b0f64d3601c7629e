"""What a person looks at: predicted masks and overlays."""
