"""Questions and answers out of a folder of images with named masks."""
