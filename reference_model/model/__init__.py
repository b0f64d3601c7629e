"""The network: encoders, guidance, mask decoder, loss."""
