"""Every custom autograd function, next to the formula it implements."""
