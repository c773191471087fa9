"""One file per family of networks.

A family is a module that the catalogue names. It has four functions, and imports torch only inside them:

build(builder, num_classes) → the network in PyTorch, untrained
graph(network, card) → a module from the images [batch, height, width, 3] uint8 to the task's outputs, ready for export
wake(network, card, images) makes an untrained network give answers that depend on the image
reference(network, card) → what the graph must agree with: a function from the same images to the same outputs, by name
"""
