"""A trained model on disk, on the Hugging Face Hub, and as a program of one file."""
