"""Where parameters, optimizer state and gradients are kept between visits of a layer."""
