"""From the bytes of an image to the fixed-shape array that a network takes, and back to the pixels of the original."""
