"""From an image file's bytes to the pixels that the backbone sees, for training and serving alike."""
