"""The network: image encoder, text encoder, extractor, mask decoder, loss, checkpoint."""
