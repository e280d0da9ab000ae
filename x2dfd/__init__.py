"""Explainable deepfake detection with a multimodal LLM (X2-DFD, arXiv 2410.06126)."""
