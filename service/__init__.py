"""The gateway: images by REST to embeddings and classes."""
