"""C sources of the CPU kernels and collectives, and `build`, which compiles and opens them."""
