"""Llama-3.2-Vision as ONNX files of fixed shapes, one a network, for compilers that take no others (TPU-MLIR)."""
