"""Pictures: read and written without loss, and upscaled in tiles that fit into memory."""
