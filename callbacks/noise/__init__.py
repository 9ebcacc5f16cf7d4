"""What the gradient noise scale is measured from: gradients of single backwards, and sums over them."""
