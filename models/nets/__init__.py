"""One file per family of networks.

A family is a module that the catalogue names. It imports torch only inside its functions:

build(builder, num_classes) → the network in PyTorch, untrained; where the family says SIZED = True, build(builder,
    num_classes, size) with the side of the input in pixels. One that makes images of latents has `latent_size`.
graph(network, card) → a module from the images [batch, height, width, 3] uint8 to the task's outputs, ready for export
wake(network, card, images) makes an untrained network give answers that depend on the image
reference(network, card) → what the graph must agree with: a function from the same images to the same outputs, by name

A network that makes images (the card has a `latent_size`) takes latents f32 [batch, latent_size] and, where the card
has labels, labels i64 [batch] in place of images, in this order: so do its `graph` and its `reference`. One that takes
images and can also make them, such as an autoencoder, gives this second graph as

decoder_graph(network, card), decoder_reference(network, card) → as the two above, from latents to `images_out`

For a family that learns, also:

build_for_training, with the arguments of build → the same with what only serves training, such as auxiliary heads
IGNORED_PREFIXES: how the parameters of these begin; weights may hold them or lack them, published ones lack them
parts(network, builder) → Parts: which modules are the head, and the stages of the backbone from the input on

and where they are needed:

published_state(state) → what a published file of weights holds, for the network as `build` gives it; own ones unchanged
backbone_state(state) → a classifier's weights as those of the network's backbone
losses(network, images uint8 [batch, height, width, 3], targets) → losses by name; of detectors

What else its losses need is between the family and the module of its task in models.learning; classifiers give
training_logits(outputs), features(network, parts, images) and head(network, parts).
"""
