"""How networks learn: transfer, augmentation, the training loop, metrics. Arrays in, arrays out; no storage."""
