"""Where weights, optimizer state and gradients are kept between two visits of a layer."""
