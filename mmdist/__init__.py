"""mmdist: a tensor-parallel launcher and inference engine for multimodal language models."""
