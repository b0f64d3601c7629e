"""The blocks in other people's models: one short file each, with every changed line marked."""
