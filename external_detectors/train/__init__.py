"""`python -m external_detectors.train NAME --data MANIFEST`: train an expert from scratch to committed weights.

Real and fake take the same way: the manifest's pictures, the library's own face finder and crop, the same random
degradation. Sampling is balanced over labels, then sources. Stops and resumes: the state is kept in `--state`.
"""
