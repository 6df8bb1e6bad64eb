"""The programs that the benchmarks run, in our own assembler's language, shaped as a compiler shapes code."""
