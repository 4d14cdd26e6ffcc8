"""Image files and upscaling."""
