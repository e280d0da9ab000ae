"""`python -m external_detectors.train NAME --data MANIFEST`: train the forensic tower or its heads.

Real and fake take the same way: the manifest's pictures, the library's own face finder and crop, the same random
degradation.
"""
