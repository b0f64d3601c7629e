"""One file per way to compute `masked_attention`; each offers `reasons` (why it cannot run) and `attend`."""
