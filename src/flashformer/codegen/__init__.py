"""Numbers into C++, and where images and compiled kernels are kept."""
