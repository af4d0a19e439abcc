"""C kernels for CPUs and the library that compiles and loads them."""
